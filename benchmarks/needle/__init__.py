"""A needle in a haystack, one rank against four: ``python -m benchmarks.needle``."""
