"""Clients of OpenAI's and Anthropic's protocols, each in an environment of its own, against a
running server.

``python -m benchmarks.clients`` writes ``docs/clients.md`` and ``benchmarks/results/clients.json``.
"""
