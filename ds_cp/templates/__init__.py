"""Chat templates: which one a model has, what it wants, and the processes that render it."""
