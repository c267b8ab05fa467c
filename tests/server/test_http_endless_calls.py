"""A tool call that never ends, in every protocol: its tokens are counted like any others, it ends
at their limit as cut, what was sent of it is bounded by what the model said, and others go on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from tests.helpers.spoken import PIECE
from tests.server.conftest import PATIENCE_S, Running, wait_for

LIMIT = 1000  # tokens
BEGIN = '<tool_call>\n{"name": "f", "arguments": {"city": '
CALL = BEGIN + '"Bonn"}}\n</tool_call>'
ENDLESS = {
    "text": BEGIN + '"' + "x" * 20_000,
    "nested": BEGIN + "[" * 20_000,
    "keys": BEGIN[:-8] + '"a": 1, ' * 2_000,
    "number": BEGIN + "9" * 20_000,
    "name": '<tool_call>\n{"name": "' + "f" * 20_000,
    "white space": "<tool_call>" + " \n" * 10_000,
    "calls": CALL * 400,
    "openings": "<tool_call>" * 2_000,
}
SCHEMA = {"type": "object", "properties": {"city": {}}}
HELLO = [{"role": "user", "content": "hi"}]
Launch = Callable[..., Running]
# Path -> the body of a request with a tool, and how an answer says that it was cut.
PROTOCOLS: dict[str, tuple[dict[str, Any], str]] = {
    "/v1/chat/completions": (
        {
            "messages": HELLO,
            "max_tokens": LIMIT,
            "tools": [{"type": "function", "function": {"name": "f", "parameters": SCHEMA}}],
        },
        '"finish_reason":"length"',
    ),
    "/v1/responses": (
        {
            "input": "hi",
            "max_output_tokens": LIMIT,
            "tools": [{"type": "function", "name": "f", "parameters": SCHEMA}],
        },
        '"reason":"max_output_tokens"',
    ),
    "/v1/messages": (
        {
            "messages": HELLO,
            "max_tokens": LIMIT,
            "tools": [{"name": "f", "input_schema": SCHEMA}],
        },
        '"stop_reason":"max_tokens"',
    ),
}


@pytest.fixture
def others(shared: Running) -> Iterator[Callable[[], None]]:
    """What asks for a short answer, by another connection."""
    with httpx.Client(base_url=shared.url, timeout=PATIENCE_S) as client:

        def ask() -> None:
            reply = client.post("/v1/completions", json={"prompt": "x", "max_tokens": 2})
            assert reply.status_code == 200 and reply.json()["usage"]["completion_tokens"] == 2

        yield ask


@pytest.mark.parametrize("path", PROTOCOLS)
@pytest.mark.parametrize("kind", ENDLESS)
def test_it_ends_at_its_limit(spoken: Launch, others: Any, path: str, kind: str) -> None:
    server = spoken(ENDLESS[kind])
    body, cut = PROTOCOLS[path]
    whole = server.post(path, body)
    assert whole.status_code == 200, whole.text
    assert cut in compact(whole.text), whole.text[:2000]
    assert len(whole.text) < 100 * LIMIT * PIECE
    with httpx.stream("POST", server.url + path, json=body | {"stream": True}) as stream:
        lines = stream.iter_lines()
        next(lines)
        others()
        events = [line for line in lines if line.startswith("data: {")]
    assert cut in compact("".join(events[-3:])), events[-3:]
    assert not any('"error":{' in compact(event) for event in events)
    assert wait_for(lambda: not server.engine.live)


def compact(text: str) -> str:
    return text.replace('": ', '":')


@pytest.mark.parametrize("path", PROTOCOLS)
def test_a_client_that_leaves_ends_it(spoken: Launch, path: str) -> None:
    server = spoken(ENDLESS["text"])
    server.engine.delay_s = 0.01
    body = PROTOCOLS[path][0] | {"stream": True}
    with httpx.stream("POST", server.url + path, json=body, timeout=PATIENCE_S) as stream:
        lines = stream.iter_lines()
        assert any("xx" in line for line in lines)  # the arguments have begun to come
    assert wait_for(lambda: bool(server.engine.aborted) and not server.engine.live)
