"""Every field of the pinned openai client is served, harmless, or refused by name; a value that
asks for nothing passes everywhere."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Union, get_args, get_origin

import pytest
from openai.types import chat
from openai.types import completion_create_params as completion
from openai.types.chat import completion_create_params as chat_completion
from pydantic import BaseModel

from ds_cp.api.chat.request import Turn
from ds_cp.api.errors import ApiError
from ds_cp.api.requests.bodies import _to_model
from ds_cp.api.requests.chat_body import ChatCompletionRequest as ChatRequest
from ds_cp.api.requests.chat_body import TokenizeRequest
from ds_cp.api.requests.foreign_fields import (
    BOTH,
    CHAT_ONLY,
    COMPLETION_ONLY,
    FRONT_ENDS,
    HARMLESS,
    MESSAGE,
    STREAM_OPTIONS,
)
from ds_cp.api.requests.messages import ChatMessage
from ds_cp.api.requests.protocol import CompletionRequest, DetokenizeRequest, StreamOptions
from ds_cp.api.requests.strict_model import Notes
from ds_cp.parsing.definitions import ToolChoice
from ds_cp.parsing.history import EarlierCall

NOTHING: list[Any] = [None, "", [], {}, False]
WISHES: list[Any] = [{"wish": 1}, ["wish"], "wish"]
HELLO = {"role": "user", "content": "hi"}


def members(union: Any) -> Iterator[Any]:
    if get_origin(union) is Union:
        for member in get_args(union):
            yield from members(member)
    else:
        yield union


def fields(*kinds: Any) -> set[str]:
    return {name for kind in kinds for name in kind.__annotations__}


MESSAGES = list(members(chat.ChatCompletionMessageParam))
PARTS = list(members(chat.ChatCompletionContentPartParam))
# Where -> the client's fields, ours, the harmless, the refused, and a body with one more field.
PLACES: dict[str, tuple[set[str], Any, frozenset[str], dict[str, Any], Any]] = {
    "completion": (
        fields(
            completion.CompletionCreateParamsNonStreaming,
            completion.CompletionCreateParamsStreaming,
        ),
        CompletionRequest,
        HARMLESS["body"],
        BOTH | COMPLETION_ONLY,
        lambda field: {"prompt": "x"} | field,
    ),
    "chat": (
        fields(
            chat_completion.CompletionCreateParamsNonStreaming,
            chat_completion.CompletionCreateParamsStreaming,
        ),
        ChatRequest,
        HARMLESS["body"],
        BOTH | CHAT_ONLY,
        lambda field: {"messages": [HELLO]} | field,
    ),
    "message": (
        fields(*MESSAGES),
        ChatMessage,
        HARMLESS["message"],
        MESSAGE,
        lambda field: {"messages": [HELLO | field]},
    ),
    "stream options": (
        fields(chat.ChatCompletionStreamOptionsParam),
        StreamOptions,
        HARMLESS["stream_options"],
        STREAM_OPTIONS,
        lambda field: {"messages": [HELLO], "stream": True, "stream_options": field},
    ),
}


def read(model: type[BaseModel], body: Any, refuse: bool = False) -> tuple[Any, list[str]]:
    """The model of a body, or its error, and the unknown fields that were ignored."""
    notes = Notes(refuse)
    text = json.dumps(body).replace("Infinity", "1e999")  # which JSON can spell
    return _to_model(text.encode(), model, notes, None), notes.ignored


def error(model: type[BaseModel], body: Any, refuse: bool = False) -> ApiError:
    result, _ = read(model, body, refuse)
    assert isinstance(result, ApiError), body
    assert result.status_code == 400
    return result


@pytest.mark.parametrize("place", PLACES)
def test_every_field_of_the_client_is_known(place: str) -> None:
    theirs, model, harmless, unsupported, _ = PLACES[place]
    assert theirs and theirs - set(model.model_fields) - harmless - set(unsupported) == set()
    assert not set(model.model_fields) & (harmless | set(unsupported))
    assert not harmless & set(unsupported)


@pytest.mark.parametrize("place", PLACES)
def test_what_asks_for_nothing_passes_and_a_wish_is_refused_by_name(place: str) -> None:
    _, model, harmless, unsupported, body = PLACES[place]
    top = CompletionRequest if model is CompletionRequest else ChatRequest
    for name, rule in unsupported.items():
        for value in [*NOTHING, *rule.neutral]:
            if value is False and rule.false_asks:
                assert name in str(error(top, body({name: value})).param)
                continue
            result, ignored = read(top, body({name: value}))
            assert isinstance(result, top) and not ignored, (name, value, result)
        for value in WISHES:
            refused = error(top, body({name: value}))
            assert str(refused.param).endswith(name) and name in refused.detail, name
    for name in harmless:
        for value in [*NOTHING, *WISHES, 5, 1.5, True]:
            result, ignored = read(top, body({name: value}))
            assert isinstance(result, top) and not ignored, (name, value, result)


def test_parts_and_roles_of_the_client() -> None:
    """A part of text with any of the client's fields is served; other kinds are refused by name."""
    (text,) = [part for part in PARTS if "text" in part.__annotations__]
    assert fields(text) - {"type", "text"} <= HARMLESS["part"]
    kinds = {part: get_args(get_args(_hints(part)["type"])[0])[0] for part in PARTS}
    assert set(kinds.values()) == {"text", "image_url", "input_audio", "file"}
    for kind in {*kinds.values(), "refusal", "video_url"} - {"text"}:
        content = [{"type": kind, kind: {"x": 1}}]
        refused = error(ChatRequest, {"messages": [{"role": "user", "content": content}]})
        assert kind in refused.detail and refused.param == "messages[0].content"
    for extra in ["cache_control", "prompt_cache_breakpoint", "annotations"]:
        for value in [*NOTHING, *WISHES, {"type": "ephemeral"}]:
            part = {"type": "text", "text": "a", extra: value}
            body = {"messages": [{"role": "user", "content": [part]}]}
            result, ignored = read(ChatRequest, body)
            assert isinstance(result, ChatRequest) and not ignored
    for value in NOTHING:
        part = {"type": "text", "text": "a", "image_url": value, "anything": value}
        result, ignored = read(ChatRequest, {"messages": [{"role": "user", "content": [part]}]})
        assert isinstance(result, ChatRequest) and not ignored
    roles = {get_args(get_args(_hints(message)["role"])[0])[0] for message in MESSAGES}
    assert roles == {"developer", "system", "user", "assistant", "tool", "function"}
    for role in roles:
        result, _ = read(ChatRequest, {"messages": [{"role": role, "content": "x"}]})
        if role == "function":
            assert isinstance(result, ApiError) and repr(role) in result.detail
        elif role == "tool":  # it answers a call
            assert isinstance(result, ApiError)
            assert result.param == "messages[0].tool_call_id"
        else:
            assert isinstance(result, ChatRequest)


def _hints(kind: Any) -> dict[str, Any]:
    import typing

    return typing.get_type_hints(kind, include_extras=True)


@pytest.mark.parametrize("value", NOTHING)
@pytest.mark.parametrize("field", ["anything", "temprature"])
def test_an_unknown_field_that_asks_for_nothing_passes(field: str, value: Any) -> None:
    for model, body in (
        (CompletionRequest, {"prompt": "x"}),
        (ChatRequest, {"messages": [HELLO]}),
        (TokenizeRequest, {"prompt": "x"}),
        (DetokenizeRequest, {"tokens": [5]}),
        (ChatRequest, {"messages": [HELLO | {field: value}]}),
        (ChatRequest, {"messages": [HELLO], "stream_options": {field: value}}),
        (ChatRequest, {"messages": [HELLO], "chat_template_kwargs": {field: value}}),
    ):
        for refuse in (False, True):
            result, ignored = read(model, body | {field: value}, refuse)
            assert isinstance(result, model) and not ignored, result


@pytest.mark.parametrize(
    ("model", "body", "param"),
    [
        (CompletionRequest, {"prompt": "x"}, "own_field"),
        (ChatRequest, {"messages": [HELLO]}, "own_field"),
        (TokenizeRequest, {"prompt": "x"}, "own_field"),
        (DetokenizeRequest, {"tokens": [5]}, "own_field"),
        (ChatRequest, {"messages": [HELLO | {"own_field": 1}]}, "messages[0].own_field"),
        (
            ChatRequest,
            {"messages": [{"role": "user", "content": [
                {"type": "text", "text": "a", "own_field": 1}]}]},
            "messages[0].content.own_field",
        ),
        (
            ChatRequest,
            {"messages": [HELLO], "stream_options": {"own_field": 1}},
            "stream_options.own_field",
        ),
    ],
)  # fmt: skip
def test_another_unknown_field_is_ignored_or_refused(
    model: type[BaseModel], body: dict[str, Any], param: str
) -> None:
    if param == "own_field":
        body = body | {"own_field": 1}
    result, ignored = read(model, body)
    assert isinstance(result, model) and ignored == ["own_field"]
    refused = error(model, body, refuse=True)
    assert refused.param == param and "unknown field 'own_field'" in refused.detail


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("temprature", "temperature"), ("maxtokens", "max_tokens"), ("max-tokens", "max_tokens"),
        ("maxTokens", "max_tokens"), ("top-p", "top_p"), ("topP", "top_p"), ("Top_K", "top_k"),
        ("sede", "seed"), ("steam", "stream"), ("stops", "stop"), ("logit_bais", "logit_bias"),
        ("tool", "tools"), ("mesages", "messages"), ("response_fromat", "response_format"),
    ],
)  # fmt: skip
def test_a_near_name_is_refused_with_what_it_means(name: str, meant: str) -> None:
    refused = error(ChatRequest, {"messages": [HELLO], name: 5})
    assert refused.param == name and f"did you mean {meant}?" in refused.detail


@pytest.mark.parametrize(
    "name",
    ["mode", "models", "top_a", "stream_id", "streamId", "prompt_id", "messages_id", "message_id",
     "mirostat", "typical_p", "tfs", "chat_id", "session_id", "title", "id", "features", "files",
     "background_tasks", "provider", "transforms", "x", "", "options", "num_ctx", "keep_alive"],
)  # fmt: skip
def test_a_front_ends_own_field_is_ignored(name: str) -> None:
    result, ignored = read(ChatRequest, {"messages": [HELLO], name: 5})
    assert isinstance(result, ChatRequest) and ignored == [name]


def test_a_front_ends_neutral_values_pass() -> None:
    for name, values in FRONT_ENDS.items():
        for value in values:
            for refuse in (False, True):
                result, ignored = read(ChatRequest, {"messages": [HELLO], name: value}, refuse)
                assert isinstance(result, ChatRequest) and not ignored, name
    assert not set(FRONT_ENDS) & {*ChatRequest.model_fields, *BOTH, *CHAT_ONLY}


@pytest.mark.parametrize(
    ("fields", "refused"),
    [
        ({"max_new_tokens": 2, "max_tokens": 2}, None),
        ({"max_new_tokens": 2, "max_completion_tokens": 2}, None),
        ({"n_predict": 2, "max_tokens": 3}, "n_predict"),
        ({"n_predict": True, "max_tokens": 1}, "n_predict"),
        ({"max_new_tokens": 2}, "max_new_tokens"),
        ({"min_new_tokens": 0}, None),
        ({"min_new_tokens": 2}, "min_new_tokens"),
        ({"min_length": 2, "min_tokens": 2}, None),
        ({"stop_sequences": ["a"], "stop": "a"}, None),
        ({"stop_sequence": ["a", "b"], "stop": ["a", "b"]}, None),
        ({"stop_sequences": ["a", "b"], "stop": ["a"]}, "stop_sequences"),
        ({"repeat_penalty": 1.1, "repetition_penalty": 1.1}, None),
    ],
)
def test_another_name_passes_beside_the_served_one(
    fields: dict[str, Any], refused: str | None
) -> None:
    body = {"messages": [HELLO]} | fields
    if refused is None:
        result, ignored = read(ChatRequest, body)
        assert isinstance(result, ChatRequest) and not ignored
    else:
        assert error(ChatRequest, body).param == refused


def test_unknown_names_are_looked_up_once_and_are_few() -> None:
    many = {"messages": [HELLO | {"own": 1, "other": 2} for _ in range(9_000)]}
    result, ignored = read(ChatRequest, many)
    assert isinstance(result, ChatRequest) and ignored == ["own", "other"]
    result, ignored = read(ChatRequest, {"messages": [HELLO]} | {f"_own {i}": 1 for i in range(32)})
    assert isinstance(result, ChatRequest) and len(ignored) == 32
    refused = error(ChatRequest, {"messages": [HELLO]} | {f"_own {i}": 1 for i in range(33)})
    assert refused.param == "_own 32" and "after 32 others" in refused.detail


def test_messages_for_templates() -> None:
    parts = [{"type": "text", "text": "a", "cache_control": {"x": 1}}, {"type": "text", "text": ""}]
    body = {
        "messages": [
            {"role": "developer", "content": "be brief", "name": ""},
            {"role": "user", "content": parts, "name": "ann"},
            {"role": "assistant", "content": None, "tool_calls": [], "refusal": None},
            {"role": "assistant", "content": [], "name": None},
        ]
    }
    for model in (ChatRequest, TokenizeRequest):
        result, _ = read(model, body)
        texts = [{"type": "text", "text": "a"}, {"type": "text", "text": ""}]
        assert result.turns == [
            Turn(role="system", content="be brief"),
            Turn(role="user", content=texts, name="ann"),
            Turn(role="assistant"),
            Turn(role="assistant"),
        ]
    for role in ("user", "system"):
        for content in (None, []):
            refused = error(ChatRequest, {"messages": [{"role": role, "content": content}]})
            assert refused.param == "messages[0].content"


CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
TOOL = {"type": "function", "function": {"name": "f"}}
ASKED = [HELLO, {"role": "assistant", "content": None, "tool_calls": [CALL]}]
RESULT = {"role": "tool", "content": "x", "tool_call_id": "c"}


def nested(depth: int) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = [value]
    return value


def calling(**function: Any) -> list[Any]:
    call = CALL | {"function": {"name": "f"} | function}
    return [HELLO, {"role": "assistant", "tool_calls": [call]}]


def with_schema(**schema: Any) -> dict[str, Any]:
    return {"tools": [{"type": "function", "function": {"name": "f", "parameters": schema}}]}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"tools": "x"}, "tools"), ({"tools": {}}, None), ({"tools": [5]}, "tools[0]"),
        ({"tools": [TOOL] * 129}, "tools"), ({"tools": [TOOL, TOOL]}, "tools[1]"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        (with_schema(x=nested(70)), "tools[0].function.parameters"),
        (with_schema(x=list(range(30_000))), "tools"),
        (with_schema(type="string"), "tools[0].function.parameters.type"),
        (with_schema(x="\ud800"), "tools"), (with_schema(maximum=1 << 70), "tools"),
        (with_schema(maximum=float("inf")), "tools"),
        ({"chat_template_kwargs": {"a": [float("-inf")]}}, "chat_template_kwargs.a"),
        ({"tools": [TOOL], "tool_choice": 5}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": "some"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "custom"}}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}},
         "tool_choice.function.name"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": "required", "guided_regex": "a"}, "guided_regex"),
        ({"tools": [TOOL], "parallel_tool_calls": 1}, "parallel_tool_calls"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"function_call": {"name": "f"}}, "function_call"),
        ({"messages": [*ASKED, RESULT | {"tool_call_id": "d"}]}, "messages[2].tool_call_id"),
        ({"messages": [*ASKED, RESULT | {"tool_call_id": 5}]}, "messages[2].tool_call_id"),
        ({"messages": [*ASKED, RESULT | {"tool_call_id": "c" * 600}]}, "messages[2].tool_call_id"),
        ({"messages": [*ASKED, RESULT | {"tool_call_id": "\ud800"}]}, "messages[2].tool_call_id"),
        ({"messages": [*ASKED, {"role": "tool", "content": "x"}]}, "messages[2].tool_call_id"),
        ({"messages": [*ASKED, RESULT | {"content": None}]}, "messages[2].content"),
        ({"messages": [HELLO | {"tool_call_id": "c"}]}, "messages[0].tool_call_id"),
        ({"messages": [HELLO | {"tool_calls": [CALL]}]}, "messages[0].tool_calls"),
        ({"messages": [HELLO | {"reasoning": "hm"}]}, "messages[0].reasoning"),
        ({"messages": [HELLO, {"role": "assistant", "tool_calls": "x"}]}, "messages[1].tool_calls"),
        ({"messages": [HELLO, {"role": "assistant", "tool_calls": [5]}]},
         "messages[1].tool_calls[0]"),
        ({"messages": [HELLO, {"role": "assistant", "tool_calls": [CALL] * 200}]},
         "messages[1].tool_calls"),
        ({"messages": calling(arguments=5)}, "messages[1].tool_calls[0].function.arguments"),
        ({"messages": calling(arguments={"a": nested(70)})},
         "messages[1].tool_calls[0].function.arguments"),
        ({"messages": calling(name="a b")}, "messages[1].tool_calls[0].function.name"),
        ({"messages": calling(arguments="\ud800")}, "messages[1].tool_calls"),
        ({"messages": [{"role": "assistant", "content": "", "reasoning_content": 5}]},
         "messages[0].reasoning_content"),
        ({"chat_template_kwargs": 5}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"a": "x" * 5000}}, "chat_template_kwargs.a"),
        ({"chat_template_kwargs": {"a": nested(70)}}, "chat_template_kwargs.a"),
        ({"chat_template_kwargs": {"a": 1 << 70}}, "chat_template_kwargs.a"),
        ({"chat_template_kwargs": {"a": list(range(300))}}, "chat_template_kwargs.a"),
        ({"chat_template_kwargs": {str(i): 1 for i in range(65)}}, "chat_template_kwargs"),
        ({"reasoning_effort": "hard"}, "reasoning_effort"), ({"reasoning_effort": 5},
                                                             "reasoning_effort"),
        ({"include_reasoning": "x"}, "include_reasoning"),
        ({"return_token_ids": 1}, "return_token_ids"),
        ({"add_generation_prompt": "x"}, "add_generation_prompt"),
        ({"continue_final_message": True}, "continue_final_message"),
        ({"continue_final_message": True, "messages": ASKED}, "continue_final_message"),
        ({"continue_final_message": True, "add_generation_prompt": True,
          "messages": [{"role": "assistant", "content": "a"}]}, "add_generation_prompt"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_tools_and_templates_is_named(
    body: dict[str, Any], param: str | None
) -> None:
    if param is None:
        assert isinstance(read(ChatRequest, {"messages": [HELLO]} | body)[0], ChatRequest)
        return
    refused = error(ChatRequest, {"messages": [HELLO]} | body)
    assert refused.param == param and len(refused.detail) <= 1000, refused.detail
    if not {"tool_choice", "functions", "function_call"} & set(body) and not {
        "reasoning_effort", "include_reasoning", "return_token_ids", "parallel_tool_calls",
    } & set(body):  # fmt: skip
        assert error(TokenizeRequest, {"messages": [HELLO]} | body).param == param


def test_a_prompt_has_no_last_message_to_go_on() -> None:
    refused = error(TokenizeRequest, {"prompt": "a", "continue_final_message": True})
    assert refused.param == "continue_final_message"


def test_a_conversation_with_tools_is_read() -> None:
    body = {
        "messages": [*ASKED, RESULT, {"role": "assistant", "content": "ok", "reasoning": "hm"}],
        "tools": [TOOL],
        "tool_choice": {"type": "function", "function": {"name": "f"}},
        "parallel_tool_calls": True,
    }
    found, ignored = read(ChatRequest, body, refuse=True)
    assert not ignored and found.choice == ToolChoice("required", ("f",), True)
    assert [turn.role for turn in found.turns] == ["user", "assistant", "tool", "assistant"]
    assert found.turns[1].calls == (EarlierCall("c", "f", "{}"),)
    assert (found.turns[2].answers, found.turns[3].reasoning) == ("c", "hm")
    assert found.begins_answer
    found, _ = read(ChatRequest, {"messages": ASKED[:1] + [
        {"role": "assistant", "content": "a"}], "continue_final_message": True})  # fmt: skip
    assert not found.begins_answer and found.choice == ToolChoice("none")


def test_sizes_are_looked_at_first() -> None:
    for model, body, part in (
        (ChatRequest, {"messages": [5] * 10_001}, "messages has 10001 items; at most 10000"),
        (ChatRequest, {"messages": [HELLO | {"content": [5] * 1001}]}, "content has 1001 items"),
        (ChatRequest, {"messages": [HELLO | {"name": "n" * 257}]}, "name has 257 characters"),
        (ChatRequest, {"messages": [HELLO], "stop": [5] * 17}, "stop has 17 strings; at most 16"),
        (CompletionRequest, {"prompt": ["a"] * 65}, "prompt has 65 prompts"),
        (CompletionRequest, {"prompt": "x", "stop_token_ids": ["a"] * 301}, "has 301 items"),
        (CompletionRequest, {"prompt": "x", "logit_bias": {str(i): "x" for i in range(301)}},
         "logit_bias has 301 entries"),
        (DetokenizeRequest, {"model": "m" * 1025, "tokens": [5]}, "model has 1025 characters"),
    ):  # fmt: skip
        assert part in error(model, body).detail
    # A list ends at its first fault.
    refused = error(ChatRequest, {"messages": [HELLO, 5, 6, 7]})
    assert refused.param == "messages[1]"
