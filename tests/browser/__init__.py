"""The page in a real browser; ``python -m tests.browser`` fetches what that needs and runs it."""
