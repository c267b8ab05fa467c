"""Every field of the anthropic client's own types for a message is served, harmless, or refused by
name; a value that asks for nothing passes everywhere."""

from __future__ import annotations

import json
from typing import Any

import pytest
from anthropic import types
from anthropic.types import beta, message_count_tokens_params, message_create_params
from pydantic import BaseModel

from ds_cp.api.errors import ApiError
from ds_cp.api.messages.fields import BODY, HARMLESS
from ds_cp.api.messages.request import (
    AnthropicChoice,
    CountRequest,
    MessagesRequest,
    OutputConfig,
    ThinkingConfig,
)
from ds_cp.api.requests.bodies import _to_model
from ds_cp.api.requests.strict_model import Notes
from tests.helpers.client_types import fields_of, kinds_of, members

NOTHING: list[Any] = [None, "", [], {}, False]
WISHES: list[Any] = [{"wish": 1}, ["wish"], "wish"]
HELLO = {"max_tokens": 5, "messages": [{"role": "user", "content": "x"}]}
TOOL = {"name": "f", "input_schema": {"type": "object"}}


def read(body: Any, kind: Any = MessagesRequest) -> tuple[Any, Notes]:
    notes = Notes()
    return _to_model(json.dumps(body).encode(), kind, notes, None), notes


def served(body: Any) -> MessagesRequest:
    result, notes = read(HELLO | body)
    assert isinstance(result, MessagesRequest) and not notes.ignored, (body, result)
    return result


def error(body: Any) -> ApiError:
    result, _ = read(HELLO | body)
    assert isinstance(result, ApiError) and result.status_code == 400, body
    return result


def union_fields(union: Any) -> set[str]:
    return set().union(*map(fields_of, members(union)))


def as_object(name: str) -> Any:
    return lambda field: {name: {"type": "enabled" if name == "thinking" else "auto"} | field}


# Where -> the client's fields, ours, the harmless, the refused, and a body with one more field.
PLACES: dict[str, tuple[set[str], type[BaseModel], frozenset[str], dict[str, Any], Any]] = {
    "body": (
        fields_of(
            message_create_params.MessageCreateParamsNonStreaming,
            message_create_params.MessageCreateParamsStreaming,
        ),
        MessagesRequest,
        HARMLESS["body"],
        BODY,
        lambda field: field,
    ),
    "beta body": (  # what agents send with ?beta=true
        fields_of(
            beta.message_create_params.MessageCreateParamsNonStreaming,
            beta.message_create_params.MessageCreateParamsStreaming,
        ),
        MessagesRequest,
        HARMLESS["body"],
        BODY,
        lambda field: field,
    ),
    "count": (
        fields_of(message_count_tokens_params.MessageCountTokensParams),
        CountRequest,
        HARMLESS["body"],
        BODY,
        lambda field: field,
    ),
    "thinking": (
        union_fields(types.ThinkingConfigParam),
        ThinkingConfig,
        HARMLESS["thinking_config"],
        {},
        as_object("thinking"),
    ),
    "tool choice": (
        union_fields(types.ToolChoiceParam),
        AnthropicChoice,
        frozenset(),
        {},
        as_object("tool_choice"),
    ),
    "output config": (
        fields_of(types.OutputConfigParam),
        OutputConfig,
        frozenset(),
        {},
        lambda field: {"output_config": field},
    ),
}


@pytest.mark.parametrize("place", PLACES)
def test_every_field_of_the_client_is_known(place: str) -> None:
    theirs, model, harmless, unsupported, _ = PLACES[place]
    ours = set(model.model_fields)
    assert theirs and theirs - ours - harmless - set(unsupported) == set()
    assert not ours & (harmless | set(unsupported))
    assert not harmless & set(unsupported)


@pytest.mark.parametrize("place", PLACES)
def test_what_asks_for_nothing_passes_and_a_wish_is_refused_by_name(place: str) -> None:
    _, _, harmless, unsupported, body = PLACES[place]
    for name, rule in unsupported.items():
        for value in [*NOTHING, *rule.neutral]:
            served(body({name: value}))
        for value in WISHES:
            refused = error(body({name: value}))
            assert str(refused.param).endswith(name) and name in refused.detail, name
    for name in harmless:
        for value in [*NOTHING, *WISHES, 5, 1.5, True]:
            served(body({name: value}))


def test_every_kind_of_block_is_served_or_refused_by_name() -> None:
    kinds = kinds_of(types.ContentBlockParam)
    assert len(kinds) > 10
    blocks: dict[str, dict[str, Any]] = {
        "text": {"text": "a"},
        "tool_result": {"tool_use_id": "t"},
        "tool_use": {"id": "t", "name": "f", "input": {}},
        "thinking": {"thinking": "hm", "signature": ""},
        "redacted_thinking": {"data": "xx"},
    }
    allowed = {
        "user": {"text", "tool_result"},
        "assistant": {"text", "tool_use", "thinking", "redacted_thinking"},
        "system": {"text"},
    }
    for role, these in allowed.items():
        for kind in kinds:
            block = {"type": kind} | blocks.get(kind, {})
            body = {"messages": [{"role": role, "content": [block]}]}
            if kind in these:
                served(body)
            else:
                refused = error(body)
                assert repr(kind) in refused.detail
                assert refused.param == "messages[0].content[0].type"
    result = kinds_of(types.tool_result_block_param.Content)
    for kind in result - {"text"}:
        block = {"type": "tool_result", "tool_use_id": "t", "content": [{"type": kind}]}
        refused = error({"messages": [{"role": "user", "content": [block]}]})
        assert refused.param == "messages[0].content[0].content[0].type"


@pytest.mark.parametrize(
    ("theirs", "known", "place"),
    [
        (types.TextBlockParam, {"type", "text"}, "text"),
        (types.ThinkingBlockParam, {"type", "thinking"}, "thinking"),
        (types.RedactedThinkingBlockParam, {"type"}, "redacted_thinking"),
        (types.ToolUseBlockParam, {"type", "id", "name", "input"}, "tool_use"),
        (types.ToolResultBlockParam,
         {"type", "tool_use_id", "content", "is_error"}, "tool_result"),
        (types.ToolParam, {"type", "name", "description", "input_schema", "strict",
                           "input_examples"}, "tool"),
    ],
)  # fmt: skip
def test_every_field_of_an_object_is_known(theirs: Any, known: set[str], place: str) -> None:
    assert fields_of(theirs) - known - HARMLESS[place] == set()


def test_hosted_tools_are_skipped_and_told() -> None:
    hosted = [{"type": kind, "name": "x"} for kind in sorted(kinds_of(types.ToolUnionParam))]
    hosted = [tool for tool in hosted if tool["type"] != "custom"]
    assert len(hosted) > 10
    custom = {"type": "custom", "name": "g", "input_schema": {}}
    result, notes = read(HELLO | {"tools": [*hosted, TOOL, custom]})
    assert [tool.name for tool in result.tools] == ["f", "g"] and not notes.ignored
    assert notes.skipped == [f"tools.{tool['type']}" for tool in hosted]


@pytest.mark.parametrize(
    ("choice", "mode", "names", "single"),
    [
        (None, "auto", ("f", "g"), False),
        ({"type": "auto"}, "auto", ("f", "g"), False),
        ({"type": "auto", "disable_parallel_tool_use": True}, "auto", ("f", "g"), True),
        ({"type": "any"}, "required", ("f", "g"), False),
        ({"type": "any", "disable_parallel_tool_use": True}, "required", ("f", "g"), True),
        ({"type": "tool", "name": "g"}, "required", ("g",), True),
        ({"type": "none"}, "none", (), False),
    ],
)
def test_tool_choice(choice: Any, mode: str, names: tuple[str, ...], single: bool) -> None:
    found = served({"tools": [TOOL, TOOL | {"name": "g"}], "tool_choice": choice}).choice
    assert (found.mode, found.names, found.single) == (mode, names, single)


def test_examples_and_thinking() -> None:
    tool = TOOL | {"description": "does f", "input_examples": [{"x": 1}, {"x": 2}]}
    (read_tool,) = served({"tools": [tool]}).tools or []
    assert read_tool.description == 'does f\nExamples of its input:\n{"x": 1}\n{"x": 2}'
    assert served({}).effort is None
    assert served({"thinking": {"type": "disabled"}}).effort == "none"
    adaptive = {"thinking": {"type": "adaptive", "display": "omitted"}}
    assert served(adaptive).hides_thinking and served(adaptive).effort is None
    high = served({"thinking": {"type": "enabled", "budget_tokens": 2000},
                   "output_config": {"effort": "high"}})  # fmt: skip
    assert high.effort == "high" and not high.hides_thinking
    assert served({"thinking": {"type": "enabled", "budget_tokens": 2000}}).effort == "medium"


def test_format() -> None:
    schema = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}
    wish = {"type": "json_schema", "schema": schema}
    constraint = served({"output_config": {"format": wish}}).constraint
    assert constraint is not None and constraint.json == schema and not constraint.lenient
    assert constraint.asked_as == "output_config.format"
    assert error({"output_config": {"format": {"type": "xml"}}}).param == "output_config.format"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [5]}, "messages[0]"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [5]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]},
         "messages[0].content[0].text"),
        ({"messages": [{"role": "assistant", "content": [
            {"type": "tool_use", "id": "t", "name": "f", "input": []}]}]},
         "messages[0].content[0].input"),
        ({"messages": [{"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": ""}]}]},
         "messages[0].content[0].tool_use_id"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "txet": 1}]}]},
         "messages[0].content[0].txet"),
        ({"messages": [{"role": "assistant", "content": [
            {"type": "tool_use", "id": "\ud800", "name": "f", "input": {}}]}]},
         "messages[0].content[0].id"),
        ({"messages": [{"role": "user", "content": "a"}
                       | dict.fromkeys(map(str, range(255)))]}, "messages[0]"),
        ({"messages": [{"role": "user", "content": "a", "contents": 1}]}, "messages[0].contents"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages[0].content"),
        ({"system": 5}, "system"),
        ({"system": [{"type": "image"}]}, "system[0].type"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_tokens": None}, "max_tokens"),
        ({"stop_sequences": ["a"] * 17}, "stop_sequences"),
        ({"tools": [TOOL | {"name": "a b"}]}, "tools[0].name"),
        ({"tools": [TOOL | {"input_schema": 5}]}, "tools[0].input_schema"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "h"}}, "tool_choice.name"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tool_choice": {"type": "all"}}, "tool_choice.type"),
        ({"thinking": {"type": "between_tools"}}, "thinking.type"),
        ({"max_token": 5}, "max_token"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(body: dict[str, Any], param: str) -> None:
    assert error(body).param == param


def test_what_is_deep_is_refused() -> None:
    deep: Any = {}
    for _ in range(500):
        deep = {"x": deep}
    block = {"type": "tool_use", "id": "t", "name": "f", "input": deep}
    refused = error({"messages": [{"role": "assistant", "content": [block]}]})
    assert refused.param == "messages[0].content[0].input" and "64 deep" in refused.detail
    refused = error({"tools": [TOOL | {"input_examples": [deep]}]})
    assert str(refused.param).startswith("tools")
