"""Terminal agents and agent libraries, unmodified, against a server: ``python -m
benchmarks.agents``."""
