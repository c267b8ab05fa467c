"""Events of a message: the order of the protocol, and what the anthropic client makes of them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from anthropic.lib.streaming._messages import accumulate_event
from anthropic.types import RawMessageStreamEvent
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from ds_cp.api.chat.events import ArgumentsDelta, CallBegin, CallEnd, Content, Reasoning, Usage
from ds_cp.api.messages.output import SIGNATURE, Output
from ds_cp.api.messages.resource import end_event, new_message

EVENT: Any = TypeAdapter(RawMessageStreamEvent)


def streamed(steps: list[list[Any]], stop: str = "end_turn", **settings: Any) -> list[Any]:
    """The events of a whole stream, checked against the client's types."""
    output = Output(**settings)
    found: list[Any] = [{"type": "message_start", "message": new_message("msg_1", "m", 9)}]
    for step in steps:
        found += output.take(step)
    found += output.close()
    found += [end_event(stop, None, Usage(9, 4, 2, 1)), {"type": "message_stop"}]
    return [EVENT.validate_python(json.loads(json.dumps(event))) for event in found]


def client_reads(events: list[Any]) -> Any:
    """What the client's own accumulator makes of a stream."""
    snapshot: Any = None
    buffers: dict[int, bytes] = {}
    for event in events:
        snapshot = accumulate_event(event=event, current_snapshot=snapshot, json_bufs=buffers)
    return snapshot


def test_the_order_of_the_protocol() -> None:
    events = streamed(
        [
            [Reasoning("a"), Reasoning("b")],
            [Content("hel")],
            [Content("lo"), CallBegin(0, "call_1", "f"), ArgumentsDelta(0, '{"x"')],
            [ArgumentsDelta(0, ": 1}"), CallEnd(0, True)],
            [CallBegin(1, "call_2", "g"), CallEnd(1, True)],
        ],
        "tool_use",
    )
    kinds = [(e.type, getattr(e, "index", None), getattr(getattr(e, "delta", None), "type", None))
             for e in events]  # fmt: skip
    assert kinds == [
        ("message_start", None, None),
        ("content_block_start", 0, None),
        ("content_block_delta", 0, "thinking_delta"),
        ("content_block_delta", 0, "thinking_delta"),
        ("content_block_delta", 0, "signature_delta"),
        ("content_block_stop", 0, None),
        ("content_block_start", 1, None),
        ("content_block_delta", 1, "text_delta"),
        ("content_block_delta", 1, "text_delta"),
        ("content_block_stop", 1, None),
        ("content_block_start", 2, None),
        ("content_block_delta", 2, "input_json_delta"),
        ("content_block_delta", 2, "input_json_delta"),
        ("content_block_stop", 2, None),
        ("content_block_start", 3, None),
        ("content_block_stop", 3, None),
        ("message_delta", None, None),
        ("message_stop", None, None),
    ]
    message = client_reads(events)
    assert [block.type for block in message.content] == ["thinking", "text", "tool_use", "tool_use"]
    assert (message.content[0].thinking, message.content[0].signature) == ("ab", SIGNATURE)
    assert message.content[1].text == "hello"
    assert (message.content[2].name, message.content[2].input) == ("f", {"x": 1})
    assert message.content[3].input == {} and message.stop_reason == "tool_use"
    usage = message.usage
    assert (usage.input_tokens, usage.cache_read_input_tokens, usage.output_tokens) == (7, 2, 4)
    assert usage.output_tokens_details.thinking_tokens == 1


_TEXT = st.text("ab€😀\n", min_size=1)


@given(
    st.lists(
        st.lists(st.one_of(_TEXT.map(Content), _TEXT.map(Reasoning), _TEXT), max_size=4), max_size=8
    )
)
def test_what_the_client_joins_is_the_whole_message(steps: list[list[Any]]) -> None:
    """The blocks of the stream are those of the whole answer, whatever the model does."""
    plain: list[list[Any]] = []
    calls = 0
    for step in steps:
        events: list[Any] = []
        for event in step:
            if isinstance(event, str):
                text = json.dumps({"x": event})
                events += [CallBegin(calls, f"c{calls}", "f"), ArgumentsDelta(calls, text)]
                events.append(CallEnd(calls, True))
                calls += 1
            else:
                events.append(event)
        plain.append(events)
    output = Output()
    for step in plain:
        list(output.take(step))
    list(output.close())
    message = client_reads(streamed(plain))
    found = [block.model_dump(exclude_none=True) for block in message.content]
    assert [b.pop("id", None) for b in found] == [b.get("id") for b in output.blocks]
    assert found == [{k: v for k, v in b.items() if k != "id"} for b in output.blocks]


def test_hidden_thinking_has_no_text() -> None:
    message = client_reads(streamed([[Reasoning("a")], [Content("b")]], hide_thinking=True))
    assert [block.type for block in message.content] == ["thinking", "text"]
    assert message.content[0].thinking == "" and message.content[0].signature == SIGNATURE


def test_arguments_that_are_no_object_are_told_as_they_are() -> None:
    output = Output()
    cut = [CallBegin(0, "c", "f"), ArgumentsDelta(0, '{"x": "ab'), CallEnd(0, False, "cut")]
    list(output.take(cut))
    list(output.close())
    told = {"x": "ab", "raw_arguments": '{"x": "ab'}
    assert output.blocks[0]["input"] == told
    message = client_reads(streamed([cut], "max_tokens"))
    assert message.content[0].input == told


_WRONG = st.one_of(
    st.sampled_from(
        [
            '{"a": ',
            '"b": ',
            '{"c": [',
            "1e999",
            "1e99",
            "-",
            "tru",
            "null",
            "nope",
            "]",
            "}",
            ", ",
            '"\\ud83d',
            "\\ude00",
            "\\ud8",
            '\\"',
            "\\u00e9",
            '"',
            "\\",
            "x",
            '{"raw_arguments": 2',
            "[" * 150,
        ]
    ),
    st.text('{}[]":,\\\\ ue01\n\x01', max_size=12),
    st.dictionaries(st.text('ab"', max_size=3), st.text("c\\\\", max_size=3), max_size=3).map(
        json.dumps
    ),
)


@given(st.lists(_WRONG, max_size=9))
def test_arguments_that_are_no_json_do_not_end_the_clients_stream(pieces: list[str]) -> None:
    """The client reads what it has after each delta, and raises for what is no JSON."""
    text = "".join(pieces)
    deltas = [ArgumentsDelta(0, piece) for piece in pieces if piece]
    steps = [[CallBegin(0, "c", "f")], *([delta] for delta in deltas), [CallEnd(0, False, "bad")]]
    given_input = client_reads(streamed(steps)).content[0].input
    assert isinstance(given_input, dict)
    whole = Output()
    for step in steps:
        list(whole.take(step))
    assert given_input == whole.blocks[0]["input"]
    at_once = [CallBegin(0, "c", "f"), ArgumentsDelta(0, text), CallEnd(0, False, "bad")]
    assert client_reads(streamed([at_once])).content[0].input == given_input
    try:
        found, _ = json.JSONDecoder(parse_constant=pytest.fail).raw_decode(text.lstrip(" \t\r\n"))
    except ValueError:
        found = None
    if isinstance(found, dict) and not _beyond(found):
        assert given_input == found
    else:
        assert given_input.get("raw_arguments", "") == text


def _beyond(value: Any) -> bool:
    """Whether a client could not read it: half a surrogate pair, no finite number, too deep."""
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return "Infinity" in text or "[" * 100 in text


def test_arguments_that_are_no_object_are_sent_at_the_end() -> None:
    steps = [[CallBegin(0, "c", "f"), ArgumentsDelta(0, " "), ArgumentsDelta(0, "x = 1")],
             [CallEnd(0, False, "bad")]]  # fmt: skip
    message = client_reads(streamed(steps))
    assert message.content[0].input == {"raw_arguments": " x = 1"}


def test_arguments_that_no_answer_can_hold_are_a_text() -> None:
    for text, held in (
        (r'{"a": "\ud800"}', False), ('{"a": 1e999}', False), (f'{{"a": {2**80}}}', True),
    ):  # fmt: skip
        output = Output()
        steps = [CallBegin(0, "call_1", "f"), ArgumentsDelta(0, text), CallEnd(0, True)]
        list(output.take(steps))
        (block,) = output.blocks
        told = {"a": None if "e" in text else "", "raw_arguments": text}
        assert block["input"] == (json.loads(text) if held else told)
        assert client_reads(streamed([steps])).content[0].input == block["input"]
        assert json.dumps(output.blocks, ensure_ascii=False, allow_nan=False).encode()
