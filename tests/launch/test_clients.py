"""Clients that nobody here wrote, each by its script in benchmarks/clients, against four ranks.

Those that fit beside ds_cp are tried as they are installed; the others have an environment of their
own, which is made when it is missing and the package index answers.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from benchmarks.clients.proxy import Proxy
from benchmarks.clients.run import CLIENTS, Client, own_python, python_of, run
from tests.launch.conftest import KEY

INSTALL_S = 240.0  # seconds that pip gets for one environment
CHECKS = (
    "plain chat",
    "stream",
    "usage in the stream",
    "text completion",
    "async chat",
    "async stream",
    "tools",
    "tools in a stream",
    "agent loop",
    "JSON output",
    "JSON by a schema",
    "JSON by a schema in a stream",
    "response",
    "response in a stream",
    "response with tools",
    "response by a schema",
    "message",
    "tokens counted",
)
ANTHROPIC = {"message", "tokens counted"}
RESPONSES = {each for each in CHECKS if each.startswith("response")}
# What a client has nothing of.
ABSENT = {
    "openai": ANTHROPIC,
    "anthropic": {"text completion", "JSON output"} | RESPONSES,
    "langchain-openai": ANTHROPIC,
    "llm": {"response with tools", "response by a schema"} | ANTHROPIC,
    "litellm": {"tokens counted"},
    "instructor": {"text completion", "async stream", "agent loop"}
    | (RESPONSES - {"response with tools"})
    | ANTHROPIC,
}


@pytest.fixture(scope="module")
def proxy(four: str) -> Iterator[Proxy]:
    with Proxy(four) as running:
        yield running


def python(client: Client) -> Path:
    """One that has the client; the test is skipped where there is none and none can be made."""
    if found := own_python(client):
        return found
    try:
        return python_of(client, INSTALL_S)
    except (RuntimeError, OSError, subprocess.SubprocessError) as err:
        why = " ".join(str(err).split())[-200:]
        again = f"python -m benchmarks.clients --check --only {client.name}"
        pytest.skip(f"its environment cannot be made ({why}); with a package index: {again}")


@pytest.mark.timeout(900)  # the first run installs
@pytest.mark.parametrize(
    "client", [each for each in CLIENTS if each.name in ABSENT], ids=lambda each: each.name
)
def test_a_client_is_served(client: Client, four: str, proxy: Proxy) -> None:
    found = run(client, python(client), four, "tiny", KEY, proxy, CHECKS)
    results = {row["check"]: row for row in found["rows"]}
    assert list(results) == list(CHECKS)
    bad = [row for row in results.values() if row["result"] == "failed"]
    assert not bad, bad
    assert {check for check in CHECKS if results[check]["result"] == "none"} == ABSENT[client.name]


def test_the_prompts_of_clients_span_ranks(four: str) -> None:
    """The description of a tool is longer than what one rank holds here."""
    with httpx.Client(headers={"Authorization": f"Bearer {KEY}"}, timeout=120) as over:

        def spanning() -> float:
            found = re.findall(
                r'ds_cp:mode_counts_total\{.*mode="(?:ring|tree)".*\} (.*)',
                over.get(f"{four}/metrics").text,
            )
            return sum(map(float, found))

        before = spanning()
        tool = {"name": "f", "description": "What it does. " * 50, "input_schema": {}}
        body = {
            "model": "tiny",
            "tools": [tool],
            "max_tokens": 4,
            "messages": [{"role": "user", "content": "Hello"}],
        }
        answer = over.post(f"{four}/v1/messages", json=body)
        assert answer.status_code == 200, answer.text
        assert spanning() > before
