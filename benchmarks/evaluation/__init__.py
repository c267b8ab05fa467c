"""The scores of lm_eval by HTTP and by its own backend: ``python -m benchmarks.evaluation``."""
