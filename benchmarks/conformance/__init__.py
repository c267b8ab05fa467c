"""What is checked with software of others and is long: ``python -m benchmarks.conformance``."""
