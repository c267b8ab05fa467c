"""Generated requests against the HTTP front and a real server: ``python -m benchmarks.fuzz``."""
