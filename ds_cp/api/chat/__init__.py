"""One chat for every protocol: a route turns its body into a ``ChatRequest`` (``request``),
``start`` renders and starts it, and what comes are ``Step``s of events (``events``), which the
route turns into its own JSON (``answer``)."""
