"""Answers to schemas of a public corpus, and to random ones: ``python -m benchmarks.schemas``."""
