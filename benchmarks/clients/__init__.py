"""Clients of OpenAI's protocol, each in an environment of its own, against a running server.

``python -m benchmarks.clients`` writes ``docs/clients.md`` and ``benchmarks/results/clients.json``.
"""
