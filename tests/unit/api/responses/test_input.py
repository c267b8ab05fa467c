"""The input of a response: every kind of item of the client, and the turns that items make."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai.types.responses import ResponseItem
from openai.types.responses import response_input_item_param as theirs
from pydantic import TypeAdapter

from ds_cp.api.chat.request import Turn
from ds_cp.api.errors import ApiError
from ds_cp.api.requests.bodies import _to_model
from ds_cp.api.requests.strict_model import Notes
from ds_cp.api.responses.items import sealed
from ds_cp.api.responses.request import ResponseRequest
from ds_cp.api.responses.turns import turns_of
from ds_cp.parsing.history import EarlierCall
from tests.helpers.client_types import kinds_of

SERVED = {"message", "function_call", "function_call_output", "reasoning", "item_reference"}
ITEM: Any = TypeAdapter(ResponseItem)


def read(body: dict[str, Any]) -> Any:
    return _to_model(json.dumps(body).encode(), ResponseRequest, Notes(), None)


def turns(value: Any, instructions: str | None = None) -> list[Turn]:
    body = read({"input": value})
    assert isinstance(body, ResponseRequest), body
    assert body.input is not None
    return turns_of(instructions, body.input)


def refused(value: Any) -> ApiError:
    error = read({"input": value})
    assert isinstance(error, ApiError) and error.status_code == 400, value
    return error


def test_every_kind_of_item_is_served_or_refused_by_name() -> None:
    kinds = kinds_of(theirs.ResponseInputItemParam)
    assert SERVED < kinds and len(kinds) > 20
    for kind in kinds - SERVED:
        error = refused(["x", {"type": kind}][1:])
        assert kind in error.detail and error.param == "input[0].type"


def test_what_is_kept_is_of_the_protocol() -> None:
    """The items as they are given back (``input_items``) are the client's."""
    body = read({"input": CONVERSATION})
    for item in body.input:
        ITEM.validate_python(json.loads(json.dumps(item)), strict=True)


CONVERSATION: list[dict[str, Any]] = [
    {"role": "developer", "content": "be brief"},
    {"role": "user", "content": [{"type": "input_text", "text": "a"},
                                 {"type": "input_text", "text": "b"}]},
    {"type": "reasoning", "id": "rs_1", "summary": [],
     "content": [{"type": "reasoning_text", "text": "hm"}]},
    {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed",
     "content": [{"type": "output_text", "text": "I look", "annotations": [], "logprobs": []}]},
    {"type": "function_call", "id": "fc_1", "call_id": "c1", "name": "f", "arguments": "{}",
     "status": "completed"},
    {"type": "function_call", "call_id": "c2", "name": "g", "arguments": "{\"x\": 1}"},
    {"type": "function_call_output", "call_id": "c2", "output": "2"},
    {"type": "function_call_output", "call_id": "c1",
     "output": [{"type": "input_text", "text": "1"}, {"type": "input_text", "text": "one"}]},
    {"type": "message", "role": "assistant", "content": "done"},
    {"type": "message", "role": "user", "content": "thanks"},
]  # fmt: skip


def test_items_in_a_row_are_one_turn() -> None:
    calls = (EarlierCall("c1", "f", "{}"), EarlierCall("c2", "g", '{"x": 1}'))
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert turns(CONVERSATION, "you are X") == [
        Turn(role="system", content="you are X\n\nbe brief"),
        Turn(role="user", content=parts),
        Turn(role="assistant", reasoning="hm", content="I look", calls=calls),
        Turn(role="tool", content="2", answers="c2"),
        Turn(role="tool", content="1\none", answers="c1"),
        Turn(role="assistant", content="done"),
        Turn(role="user", content="thanks"),
    ]


def test_texts_and_reasoning_alone() -> None:
    assert turns("hi") == [Turn(role="user", content="hi")]
    thought = {"type": "reasoning", "id": "r", "summary": []}
    said = {"role": "assistant", "content": "x"}
    assert turns([thought, said]) == [Turn(role="assistant", content="x")]
    kept = thought | {"encrypted_content": sealed("hm")}
    assert turns([kept, said]) == [Turn(role="assistant", content="x", reasoning="hm")]
    foreign = thought | {"encrypted_content": "gAAAA"}
    assert turns([foreign, said]) == [Turn(role="assistant", content="x")]
    late = [said, thought | {"content": [{"type": "reasoning_text", "text": "y"}]}]
    assert [turn.reasoning for turn in turns(late)] == ["", "y"]
    system = [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]
    assert [turn.role for turn in turns(system)] == ["user", "system"]
    nothing = {"role": "assistant", "content": []}
    assert turns([nothing, {"role": "user", "content": "a"}, nothing]) == [
        Turn(role="user", content="a")
    ]


@pytest.mark.parametrize(
    ("value", "param"),
    [
        ([], "input"),
        (5, "input"),
        ([5], "input[0]"),
        ([{"role": "user"}], "input[0].content"),
        ([{"role": "tool", "content": "x"}], "input[0].role"),
        ([{"role": "user", "content": [{"type": "input_image"}]}], "input[0].content[0].type"),
        ([{"role": "user", "content": [{"type": "input_text"}]}], "input[0].content[0].text"),
        ([{"role": "user", "content": "a", "contents": 1}], "input[0].contents"),
        ([{"role": "user", "content": "\ud800"}], "input[0]"),
        ([{"type": "function_call", "call_id": "a", "name": "a b"}], "input[0].name"),
        ([{"type": "function_call", "call_id": "a", "name": "\ud800"}], "input[0].name"),
        ([{"type": "function_call", "call_id": "a", "name": "f"}], "input[0].arguments"),
        ([{"type": "function_call", "call_id": "\ud800", "name": "f", "arguments": ""}],
         "input[0].call_id"),
        ([{"type": "function_call", "name": "f", "arguments": ""}], "input[0].call_id"),
        ([{"type": "function_call_output", "call_id": "a"}], "input[0].output"),
        ([{"type": "reasoning", "content": [5]}], "input[0].content[0]"),
        ([{"type": "reasoning", "encrypted_content": 5}], "input[0].encrypted_content"),
        ([{"type": "item_reference"}], "input[0].id"),
        ([{"type": ["x"]}], "input[0].type"),
        ([{"role": "user", "content": "a"}] * 10_001, "input"),
        ([{"role": "user", "content": [{}] * 1001}], "input[0].content"),
        ([{"role": "user", "content": "a"} | dict.fromkeys(map(str, range(255)))], "input[0]"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(value: Any, param: str) -> None:
    assert refused(value).param == param
