"""Events of a response: the order of the protocol, and what the openai client makes of them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai import omit
from openai.lib.streaming.responses._responses import ResponseStreamState
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from ds_cp.api.chat.events import (
    ArgumentsDelta,
    CallBegin,
    CallEnd,
    Content,
    Reasoning,
    Usage,
)
from ds_cp.api.errors import ApiError
from ds_cp.api.responses import resource
from ds_cp.api.responses.answer import _LARGE
from ds_cp.api.responses.items import unsealed
from ds_cp.api.responses.output import Output
from ds_cp.api.responses.request import ResponseRequest
from ds_cp.api.responses.resource import failed, finished, in_pieces, new_response

EVENT: Any = TypeAdapter(ResponseStreamEvent)
BODY = ResponseRequest.model_validate({"input": "hi"})


def streamed(steps: Iterable[list[Any]], reason: Any = "stop", **settings: Any) -> list[Any]:
    """The events of a whole stream, checked strictly against the client's types."""
    output = Output(**settings)
    response = new_response(BODY, "resp_1", "m")
    found: list[Any] = [{"type": "response.created", "response": response}]
    for step in steps:
        found += output.take(step)
    found += output.finish(reason)
    whole = finished(response, output.items, reason, Usage(3, 5, 1, 2))
    found.append({"type": f"response.{whole['status']}", "response": whole})
    found = json.loads(json.dumps([e | {"sequence_number": i} for i, e in enumerate(found)]))
    return [EVENT.validate_python(event) for event in found]


def client_reads(events: list[Any]) -> Any:
    """What the client's own accumulator makes of a stream that is completed."""
    state: Any = ResponseStreamState(input_tools=omit, text_format=omit)
    seen = [out for event in events for out in state.handle_event(event)]
    return seen[-1].response


THINK_SAY_CALL = [
    [Reasoning("a"), Reasoning("b")],
    [Content("hel")],
    [Content("lo"), CallBegin(0, "call_1", "f"), ArgumentsDelta(0, '{"x"')],
    [ArgumentsDelta(0, ": 1}"), CallEnd(0, True)],
    [CallBegin(1, "call_2", "g"), ArgumentsDelta(1, "{}"), CallEnd(1, True)],
]


def test_the_order_of_the_protocol() -> None:
    events = streamed(THINK_SAY_CALL, "tool_calls")
    assert [
        (e.type.removeprefix("response."), getattr(e, "output_index", None)) for e in events
    ] == [
        ("created", None),
        ("output_item.added", 0),
        ("content_part.added", 0),
        ("reasoning_text.delta", 0),
        ("reasoning_text.delta", 0),
        ("reasoning_text.done", 0),
        ("content_part.done", 0),
        ("output_item.done", 0),
        ("output_item.added", 1),
        ("content_part.added", 1),
        ("output_text.delta", 1),
        ("output_text.delta", 1),
        ("output_text.done", 1),
        ("content_part.done", 1),
        ("output_item.done", 1),
        ("output_item.added", 2),
        ("function_call_arguments.delta", 2),
        ("function_call_arguments.delta", 2),
        ("function_call_arguments.done", 2),
        ("output_item.done", 2),
        ("output_item.added", 3),
        ("function_call_arguments.delta", 3),
        ("function_call_arguments.done", 3),
        ("output_item.done", 3),
        ("completed", None),
    ]
    assert [e.sequence_number for e in events] == list(range(len(events)))
    whole = client_reads(events)
    assert [item.type for item in whole.output] == ["reasoning", "message", "function_call"] + [
        "function_call"
    ]
    assert whole.output[0].content[0].text == "ab" and whole.output_text == "hello"
    assert [(c.call_id, c.name, c.arguments) for c in whole.output[2:]] == [
        ("call_1", "f", '{"x": 1}'),
        ("call_2", "g", "{}"),
    ]
    assert whole.usage.output_tokens_details.reasoning_tokens == 2
    assert whole.usage.total_tokens == 8 and whole.usage.input_tokens_details.cached_tokens == 1


def test_an_item_has_one_id_in_all_of_its_events() -> None:
    ids: dict[int, set[str]] = {}
    for event in streamed(THINK_SAY_CALL):
        if (index := getattr(event, "output_index", None)) is not None:
            item = getattr(event, "item", None)
            ids.setdefault(index, set()).add(event.item_id if item is None else item.id)
    assert all(len(found) == 1 for found in ids.values())
    assert len(set.union(*ids.values())) == 4


_STEPS = st.lists(
    st.lists(
        st.one_of(
            st.text("ab€😀\n", min_size=1).map(Content),
            st.text("ab€😀\n", min_size=1).map(Reasoning),
            st.text("ab", max_size=9).map(lambda text: ("call", text)),
        ),
        max_size=4,
    ),
    max_size=8,
)


@given(_STEPS, st.sampled_from(["stop", "length", "tool_calls"]))
def test_any_answer_is_read_as_it_was_said(steps: list[list[Any]], reason: str) -> None:
    """The deltas that the client joined, and the items of the last event, are what was said."""
    calls = 0
    plain: list[list[Any]] = []
    for step in steps:
        events: list[Any] = []
        for event in step:
            if isinstance(event, tuple):
                text = json.dumps({"x": event[1]})
                events += [CallBegin(calls, f"c{calls}", "f"), ArgumentsDelta(calls, text)]
                events.append(CallEnd(calls, True))
                calls += 1
            else:
                events.append(event)
        plain.append(events)
    events = streamed(plain, reason)
    said = [event for step in plain for event in step]
    for kind, name in ((Content, "output_text"), (Reasoning, "reasoning_text")):
        spoken = "".join(e.text for e in said if isinstance(e, kind))
        for end in ("delta", "done"):
            found = [e for e in events if e.type == f"response.{name}.{end}"]
            assert "".join(e.delta if end == "delta" else e.text for e in found) == spoken
    last = events[-1].response
    joined: list[Any] = []
    for event in said:
        if isinstance(event, CallBegin):
            joined.append(("function_call", ""))
        elif isinstance(event, ArgumentsDelta):
            joined[-1] = ("function_call", event.text)
        elif not isinstance(event, CallEnd):
            kind = "message" if isinstance(event, Content) else "reasoning"
            if joined and joined[-1][0] == kind:
                joined[-1] = (kind, joined[-1][1] + event.text)
            else:
                joined.append((kind, event.text))
    assert joined == [
        (i.type, i.arguments if i.type == "function_call" else i.content[0].text)
        for i in last.output
    ]
    if reason == "length":
        assert last.status == "incomplete"
        assert last.incomplete_details.reason == "max_output_tokens"
        assert events[-1].type == "response.incomplete"
    else:
        assert client_reads(events).output_text == last.output_text


def test_what_is_cut_is_incomplete() -> None:
    cut = [
        [Content("a"), CallBegin(0, "c", "f"), ArgumentsDelta(0, '{"x'), CallEnd(0, False, "cut")]
    ]
    last = streamed(cut, "length")[-1].response
    assert [item.status for item in last.output] == ["completed", "incomplete"]
    assert last.output[1].arguments == '{"x'
    assert streamed([[Content("a")]], "length")[-1].response.output[0].status == "incomplete"
    assert streamed([])[-1].response.output == []


def test_log_probabilities_come_with_their_text() -> None:
    """Those of text that is held back come with it, those of what is no text do not come."""
    output = Output()
    entry = [{"token": str(i), "bytes": [], "logprob": -i, "top_logprobs": []} for i in range(5)]
    found = [*output.take([Reasoning("x")], entry[:1]), *output.take([], entry[1:2])]
    found += output.take([Content("ab")], entry[2:3])
    found += output.take([], entry[3:4])
    found += output.finish("stop")
    delta = next(e for e in found if e["type"] == "response.output_text.delta")
    done = next(e for e in found if e["type"] == "response.output_text.done")
    assert delta["logprobs"] == entry[1:3] and done["logprobs"] == entry[1:4]
    assert output.items[-1]["content"][0]["logprobs"] == entry[1:4]


def test_reasoning_can_be_sent_back_by_a_client_without_a_store() -> None:
    item = streamed([[Reasoning("deep\n€")]], seal=True)[-1].response.output[0]
    assert unsealed(item.encrypted_content) == "deep\n€"
    assert unsealed("gAAAAB-of-another-server") == "" and unsealed("ds_cp:%") == ""


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (400, "invalid_prompt"),
        (429, "rate_limit_exceeded"),
        (500, "server_error"),
        (503, "server_error"),
    ],
)
def test_a_failed_response_is_of_the_protocol(status: int, code: str) -> None:
    response = new_response(BODY, "resp_1", "m")
    whole = failed(response, [], ApiError(status, "no"))
    read = Response.model_validate(json.loads(json.dumps(whole)), strict=True)
    assert read.status == "failed" and read.error is not None
    assert (read.error.code, read.error.message) == (code, "no")


def test_a_response_is_written_in_pieces() -> None:
    """No piece holds up the event loop, whatever a long answer has most of."""
    output = Output()
    entry = {"token": "a", "logprob": -1.0, "bytes": [97]}
    entries = [entry | {"top_logprobs": [entry] * 20}] * 500
    list(output.take([Reasoning("é\n")]))
    list(output.take([Content("x€\n" * 20_000)], entries))
    list(output.take([CallBegin(0, "c", "f"), ArgumentsDelta(0, "{}"), CallEnd(0, True)]))
    list(output.take([Content("y")]))
    list(output.finish("stop"))
    response = finished(new_response(BODY, "resp_1", "m"), output.items, "stop", Usage(3, 5, 1, 2))
    pieces = list(in_pieces(response))
    assert json.loads(b"".join(pieces)) == response
    assert len(response["output"][1]["content"][0]["logprobs"]) == 500
    assert max(map(len, pieces)) < 100_000


def test_closing_events_encode_log_probabilities_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """And are what they are in one piece."""
    entries = [{"token": f"t{i}", "logprob": -0.5, "bytes": [i % 256], "top_logprobs": []}
               for i in range(1000)]  # fmt: skip
    output = Output()
    events = [*output.take([Content("x" * 20_000)], entries), *output.finish("stop")]
    response = new_response(BODY, "resp_1", "m")
    whole = finished(response, output.items, "stop", Usage(3, 5, 1, 2))
    events.append({"type": "response.completed", "response": whole})
    encoded: list[int] = []
    inner = resource.items_of

    def counting(values: Any) -> bytes:
        encoded.append(len(values))
        return inner(values)

    monkeypatch.setattr(resource, "items_of", counting)
    kept: list[int] = []
    pieces = resource.Pieces(kept.append)
    large = [event for event in events if event["type"] in _LARGE]
    assert len(large) == 4
    for event in large:
        found = list(pieces.of_event(event))
        assert json.loads(b"".join(found)) == event
        assert max(map(len, found)) < 20_000
    assert sum(encoded) == 1000 and sum(kept) > 1000 * 40
    for event in events:
        assert json.loads(b"".join(resource.Pieces().of_event(event))) == event
