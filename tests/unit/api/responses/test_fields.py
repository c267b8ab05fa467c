"""Every field of the openai client's own types for a response is served, harmless, or refused by
name; a value that asks for nothing passes everywhere."""

from __future__ import annotations

import json
import math
from typing import Any, get_args

import pytest
from openai.types.responses import (
    function_tool_param,
    input_token_count_params,
    response_create_params,
    response_format_text_json_schema_config_param,
    response_function_tool_call_param,
    response_includable,
    response_input_item_param,
    response_input_text_param,
    response_output_message_param,
    response_output_text_param,
    response_reasoning_item_param,
    response_text_config_param,
    tool_param,
)
from openai.types.shared_params import reasoning as reasoning_params
from pydantic import BaseModel

from ds_cp.api.errors import ApiError
from ds_cp.api.requests.bodies import _to_model
from ds_cp.api.requests.json_route import told
from ds_cp.api.requests.strict_model import Notes
from ds_cp.api.responses.fields import BODY, HARMLESS, INCLUDE_NOTHING, LOGPROBS, REASONING
from ds_cp.api.responses.request import (
    ReasoningConfig,
    ResponseRequest,
    ResponseStreamOptions,
    TextConfig,
)
from tests.helpers.client_types import fields_of, kinds_of

NOTHING: list[Any] = [None, "", [], {}, False]
WISHES: list[Any] = [{"wish": 1}, ["wish"], "wish"]
FUNCTION = {"type": "function", "name": "f", "parameters": {"type": "object"}, "strict": None}


def read(body: Any, refuse: bool = False) -> tuple[Any, Notes]:
    notes = Notes(refuse)
    text = json.dumps(body).replace("Infinity", "1e999")  # which JSON can spell
    return _to_model(text.encode(), ResponseRequest, notes, None), notes


def served(body: Any) -> ResponseRequest:
    result, notes = read({"input": "x"} | body)
    assert isinstance(result, ResponseRequest) and not notes.ignored, (body, result)
    return result


def error(body: Any) -> ApiError:
    result, _ = read({"input": "x"} | body)
    assert isinstance(result, ApiError) and result.status_code == 400, body
    return result


# Where -> the client's fields, ours, the harmless, the refused, and a body with one more field.
PLACES: dict[str, tuple[set[str], type[BaseModel], str, dict[str, Any], Any]] = {
    "body": (
        fields_of(
            response_create_params.ResponseCreateParamsNonStreaming,
            response_create_params.ResponseCreateParamsStreaming,
            input_token_count_params.InputTokenCountParams,
        ),
        ResponseRequest,
        "body",
        BODY,
        lambda field: field,
    ),
    "text": (
        fields_of(response_text_config_param.ResponseTextConfigParam),
        TextConfig,
        "text",
        {},
        lambda field: {"text": field},
    ),
    "reasoning": (
        fields_of(reasoning_params.Reasoning),
        ReasoningConfig,
        "reasoning",
        REASONING,
        lambda field: {"reasoning": field},
    ),
    "stream options": (
        fields_of(response_create_params.StreamOptions),
        ResponseStreamOptions,
        "stream_options",
        {},
        lambda field: {"stream_options": field},
    ),
}


@pytest.mark.parametrize("place", PLACES)
def test_every_field_of_the_client_is_known(place: str) -> None:
    theirs, model, harmless, unsupported, _ = PLACES[place]
    ours = set(model.model_fields)
    assert theirs and theirs - ours - HARMLESS[harmless] - set(unsupported) == set()
    assert not ours & (HARMLESS[harmless] | set(unsupported))
    assert not HARMLESS[harmless] & set(unsupported)


@pytest.mark.parametrize("place", PLACES)
def test_what_asks_for_nothing_passes_and_a_wish_is_refused_by_name(place: str) -> None:
    _, _, harmless, unsupported, body = PLACES[place]
    for name, rule in unsupported.items():
        for value in [*NOTHING, *rule.neutral]:
            served(body({name: value}))
        for value in WISHES:
            refused = error(body({name: value}))
            assert str(refused.param).endswith(name) and name in refused.detail, name
    for name in HARMLESS[harmless]:
        for value in [*NOTHING, *WISHES, 5, 1.5, True]:
            served(body({name: value}))


@pytest.mark.parametrize(
    ("theirs", "known", "place"),
    [
        (function_tool_param.FunctionToolParam,
         {"type", "name", "description", "parameters", "strict"}, "tool"),
        (response_input_item_param.Message, {"type", "role", "content"}, "message"),
        (response_output_message_param.ResponseOutputMessageParam,
         {"type", "role", "content"}, "message"),
        (response_input_text_param.ResponseInputTextParam, {"type", "text"}, "part"),
        (response_output_text_param.ResponseOutputTextParam, {"type", "text"}, "part"),
        (response_function_tool_call_param.ResponseFunctionToolCallParam,
         {"type", "id", "call_id", "name", "arguments"}, "function_call"),
        (response_input_item_param.FunctionCallOutput,
         {"type", "id", "call_id", "output"}, "function_call_output"),
        (response_reasoning_item_param.ResponseReasoningItemParam,
         {"type", "id", "content", "encrypted_content"}, "reasoning_item"),
    ],
)  # fmt: skip
def test_every_field_of_an_object_is_known(theirs: Any, known: set[str], place: str) -> None:
    assert fields_of(theirs) - known - HARMLESS[place] == set()


def test_what_include_may_name() -> None:
    for name in get_args(response_includable.ResponseIncludable):
        assert served({"include": [name]}).wants_logprobs == (name == LOGPROBS)
    assert set(INCLUDE_NOTHING) < set(get_args(response_includable.ResponseIncludable))
    assert error({"include": ["other"]}).param == "include"
    assert served({"include": [LOGPROBS], "top_logprobs": 5}).top_logprobs == 5
    assert error({"top_logprobs": 5}).param == "top_logprobs"


def test_hosted_tools_are_skipped_and_told() -> None:
    kinds = kinds_of(tool_param.ToolParam)
    assert "function" in kinds and len(kinds) > 10
    hosted = [{"type": kind, "anything": {"x": 1}} for kind in sorted(kinds - {"function"})]
    result, notes = read({"input": "x", "tools": [*hosted[:5], FUNCTION, *hosted[5:]]}, True)
    assert [tool.name for tool in result.tools] == ["f"] and not notes.ignored
    assert notes.skipped == [f"tools.{tool['type']}" for tool in hosted]
    assert told(notes).startswith(f"skipped, not served here: tools.{hosted[0]['type']}, ")
    result, notes = read({"input": "x", "tools": hosted})
    assert result.choice.mode == "none" and notes.skipped


@pytest.mark.parametrize(
    ("choice", "mode", "names", "single"),
    [
        (None, "auto", ("f", "g"), False),
        ("auto", "auto", ("f", "g"), False),
        ("none", "none", (), False),
        ("required", "required", ("f", "g"), False),
        ({"type": "function", "name": "g"}, "required", ("g",), True),
        ({"type": "allowed_tools", "mode": "auto",
          "tools": [{"type": "function", "name": "g"}]}, "auto", ("g",), False),
        ({"type": "allowed_tools", "mode": "required",
          "tools": [{"type": "function", "name": "f"}]}, "required", ("f",), False),
    ],
)  # fmt: skip
def test_tool_choice(choice: Any, mode: str, names: tuple[str, ...], single: bool) -> None:
    body = {"tools": [FUNCTION, FUNCTION | {"name": "g"}], "tool_choice": choice}
    found = served(body).choice
    assert (found.mode, found.names, found.single) == (mode, names, single)
    if choice is None:
        assert served(body | {"parallel_tool_calls": False}).choice.single


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [FUNCTION], "tool_choice": "always"}, "tool_choice"),
        ({"tools": [FUNCTION], "tool_choice": {"type": "function", "name": "h"}},
         "tool_choice.name"),
        ({"tools": [FUNCTION], "tool_choice": {"type": "web_search_preview"}}, "tool_choice"),
        ({"tools": [FUNCTION], "tool_choice": {"type": "mcp", "server_label": "x"}},
         "tool_choice"),
        ({"tools": 5}, "tools"),
        ({"tools": [5]}, "tools[0]"),
        ({"tools": [{"type": "web_search"}, FUNCTION | {"name": "a b"}]}, "tools[1].name"),
        ({"tools": [FUNCTION | {"parameters": 5}]}, "tools[0].parameters"),
        ({"tools": [FUNCTION, FUNCTION]}, "tools[1]"),
        ({"tools": [FUNCTION] * 200}, "tools"),
        ({"tools": [FUNCTION | {"parameters": {"title": "\ud800"}}]}, "tools"),
        ({"tools": [FUNCTION | {"parameters": {"maximum": math.inf}}]}, "tools"),
        ({"text": {"format": {"type": "text", "description": "\ud800"}}}, "text.format"),
        ({"text": {"format": {"type": "text", "schema": {"maximum": math.inf}}}}, "text.format"),
        ({"tools": [FUNCTION], "tool_choice": "required",
          "text": {"format": {"type": "json"}}}, "text.format"),
        ({"chat_template_kwargs": {"x": "\ud800"}}, "chat_template_kwargs.x"),
        ({"text": {"format": {"type": "xml"}}}, "text.format"),
        ({"text": {"format": {"type": "json_schema", "name": "n"}}}, "text.format"),
        # The response says these again.
        ({"tools": [FUNCTION | {"parameters": {"maximum": float("inf")}}]}, "tools"),
        ({"text": {"format": {"type": "text", "description": "\ud800"}}}, "text.format"),
        ({"text": {"format": {"type": "text", "schema": {"a": float("-inf")}}}}, "text.format"),
        ({"text": {"format": {"type": "json_schema", "name": "\udfff", "schema": {}}}},
         "text.format"),
        ({"text": {"format": {"type": "json_schema", "name": 5, "schema": {}}}}, "text.format"),
        ({"metadata": {"k" * 65: "v"}}, "metadata"),
        ({"metadata": {f"k{i}": "v" for i in range(17)}}, "metadata"),
        ({"background": True, "store": False}, "background"),
        ({"background": True, "stream": True}, "background"),
        ({"truncation": "middle"}, "truncation"),
        ({"reasoning": {"effort": "huge"}}, "reasoning.effort"),
        ({"temprature": 1}, "temprature"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(body: dict[str, Any], param: str) -> None:
    assert error(body).param == param


def test_what_is_nested_as_deep_as_is_read() -> None:
    """A value that is told of in an error is gone through with more of the stack in use than when
    it was read."""
    for depth in range(940, 1000):
        deep = "[" * depth + "]" * depth
        for place in ('"tools":[{"type":%s}]', '"tools":[{"type":"function","name":%s}]',
                      '"tool_choice":{"type":%s}', '"text":{"format":{"type":%s}}'):  # fmt: skip
            data = '{"input":"x",' + place % deep + "}"
            result = _to_model(data.encode(), ResponseRequest, Notes(), None)
            assert isinstance(result, ApiError) and result.status_code == 400


def test_an_input_or_a_response_to_go_on_from() -> None:
    for body in ({}, {"input": None}):
        result, _ = read(body)
        assert isinstance(result, ApiError) and result.param == "input"
    result, _ = read({"previous_response_id": "resp_1"})
    assert isinstance(result, ResponseRequest)


def test_formats() -> None:
    schema = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}
    wish = {"type": "json_schema", "name": "n", "schema": schema}
    config = response_format_text_json_schema_config_param.ResponseFormatTextJSONSchemaConfigParam
    assert fields_of(config) == {"type", "name", "schema", "strict", "description"}
    for strict in (True, False, None):
        body = served({"text": {"format": wish | {"strict": strict, "description": "d"}}})
        assert body.constraint is not None
        assert body.constraint.json == schema and body.constraint.lenient == (not strict)
        assert body.constraint.asked_as == "text.format"
    plain = served({"text": {"format": {"type": "json_object"}}}).constraint
    assert plain is not None and plain.json_object
    assert served({"text": {"format": {"type": "text"}}}).constraint is None


def test_what_is_deep_is_refused() -> None:
    deep: Any = {}
    for _ in range(300):
        deep = {"x": deep}
    for body, param in (
        ({"tool_choice": {"type": "function", "name": "f", "junk": deep}}, "tool_choice"),
        ({"text": {"format": {"type": "text", "schema": deep}}}, "text.format"),
        ({"tools": [FUNCTION | {"parameters": deep}]}, "tools[0].parameters"),
    ):
        refused = error(body)
        assert refused.param == param and "64 deep" in refused.detail
