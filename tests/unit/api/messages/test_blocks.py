"""The turns of a chat that the messages of Anthropic's protocol make."""

from __future__ import annotations

import json
from typing import Any

from ds_cp.api.chat.request import Turn
from ds_cp.api.messages.request import CountRequest
from ds_cp.api.requests.bodies import _to_model
from ds_cp.api.requests.strict_model import Notes
from ds_cp.parsing.history import EarlierCall


def turns(messages: list[dict[str, Any]], **more: Any) -> list[Turn]:
    body = json.dumps({"messages": messages} | more).encode()
    read = _to_model(body, CountRequest, Notes(), None)
    assert isinstance(read, CountRequest), read
    return read.turns


def test_a_conversation_with_tools() -> None:
    cached = {"cache_control": {"type": "ephemeral"}}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "weather?"} | cached]},
        {"role": "assistant", "content": [
            {"type": "thinking", "thinking": "hm", "signature": "s"},
            {"type": "redacted_thinking", "data": "x"},
            {"type": "text", "text": "I look"},
            {"type": "tool_use", "id": "t1", "name": "f", "input": {"city": "Köln"}},
            {"type": "tool_use", "id": "t2", "name": "g", "input": {"raw_arguments": "{x"}},
        ]},
        {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "t1", "content": "rain"},
            {"type": "tool_result", "tool_use_id": "t2", "is_error": True,
             "content": [{"type": "text", "text": "no"}, {"type": "text", "text": "such"}]},
            {"type": "text", "text": "so?"},
            {"type": "text", "text": "and?"},
        ]},
        {"role": "assistant", "content": [
            {"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
    ]  # fmt: skip
    calls = (EarlierCall("t1", "f", '{"city": "Köln"}'), EarlierCall("t2", "g", "{x"))
    system = [{"type": "text", "text": "be"} | cached, {"type": "text", "text": "brief"}]
    assert turns(messages, system=system) == [
        Turn(role="system", content="be\n\nbrief"),
        Turn(role="user", content="weather?"),
        Turn(role="assistant", content="I look", reasoning="hm", calls=calls),
        Turn(role="tool", content="rain", answers="t1"),
        Turn(role="tool", content="Error: no\nsuch", answers="t2"),
        Turn(
            role="user",
            content=[{"type": "text", "text": "so?"}, {"type": "text", "text": "and?"}],
        ),
        Turn(
            role="assistant",
            content=[{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
        ),
    ]


def test_systems_at_the_beginning_are_one() -> None:
    hello = {"role": "user", "content": "x"}
    plain = [Turn(role="user", content="x")]
    assert turns([hello]) == turns([hello], system="") == turns([hello], system=[]) == plain
    found = turns([{"role": "system", "content": "b"}, hello], system="a")
    assert found == [Turn(role="system", content="a\n\nb"), *plain]
    late = turns([hello, {"role": "system", "content": [{"type": "text", "text": "b"}]}])
    assert late == [*plain, Turn(role="system", content="b")]
    assert turns([{"role": "assistant", "content": []}, hello])[0] == Turn(role="assistant")
