"""Places in the bodies of requests: every field of every model, and what is read by hand in them.

A test fills each of them, so that a field that is added is attacked too.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from ds_cp.api.messages.request import CountRequest, MessagesRequest
from ds_cp.api.requests import chat_body, protocol
from ds_cp.api.responses.request import ResponseInput, ResponseRequest

ROUTES: dict[type[BaseModel], str] = {
    protocol.CompletionRequest: "/v1/completions",
    chat_body.ChatCompletionRequest: "/v1/chat/completions",
    chat_body.TokenizeRequest: "/tokenize",
    protocol.DetokenizeRequest: "/detokenize",
    MessagesRequest: "/v1/messages",
    CountRequest: "/v1/messages/count_tokens",
    ResponseRequest: "/v1/responses",
    ResponseInput: "/v1/responses/input_tokens",
}

# Places in fields that are read by hand, which the models do not tell of: @ is filled.
_USER, _ASSISTANT = '"messages": [{"role": "user", ', '"messages": [{"role": "assistant", '
_FUNCTION = '"input": "x", "tools": [{"type": "function", "name": "f", '
_OFFER = _USER + '"content": "a"}], "tools": [{"type": "function", "function": '
_CALLED = _ASSISTANT + '"content": "", "tool_calls": [{"type": "function", '
INSIDE: dict[type[BaseModel], tuple[str, ...]] = {
    chat_body.ChatCompletionRequest: (
        _USER + '"content": [@]}]',
        _USER + '"content": [{"type": @}]}]',
        _USER + '"content": [{"type": "text", "text": @}]}]',
        _ASSISTANT + '"content": "", "tool_calls": [@]}]',
        _CALLED + '"id": "c", "function": @}]}]',
        _CALLED + '"id": @, "function": {"name": "f", "arguments": "{}"}}]}]',
        _CALLED + '"id": "c", "function": {"name": @, "arguments": "{}"}}]}]',
        _CALLED + '"id": "c", "function": {"name": "f", "arguments": @}}]}]',
        _USER + '"content": "a"}], "tools": [@]',
        _OFFER + "@}]",
        _OFFER + '{"name": @}}]',
        _OFFER + '{"name": "f", "description": @}}]',
        _OFFER + '{"name": "f", "parameters": @}}]',
        _OFFER + '{"name": "f", "parameters": {"type": "object", "properties": @}}}]',
        _OFFER + '{"name": "f", "strict": @}}]',
        _OFFER + '{"name": "f"}}], "tool_choice": {"type": "function", "function": @}',
        _OFFER + '{"name": "f"}}], "tool_choice": {"type": "allowed_tools", "allowed_tools": @}',
        _USER + '"content": "a"}], "response_format": {"type": @}',
        _USER + '"content": "a"}], "response_format": {"type": "json_schema", "json_schema": @}',
        _USER
        + '"content": "a"}], "response_format": {"type": "json_schema", "json_schema": '
        + '{"name": "n", "strict": true, "schema": @}}',
        _USER + '"content": "a"}], "response_format": {"type": "structural_tag", "structures": @}',
        _USER + '"content": "a"}], "structured_outputs": {"json": @}',
        _USER + '"content": "a"}], "structured_outputs": {"regex": @}',
        _USER + '"content": "a"}], "structured_outputs": {"choice": @}',
        _USER + '"content": "a"}], "structured_outputs": {"grammar": @}',
        _USER + '"content": "a"}], "chat_template_kwargs": {"x": @}',
        _USER + '"content": "a"}], "logit_bias": {"5": @}',
    ),
    MessagesRequest: (
        '"messages": [@]',
        '"messages": [{"role": @, "content": "a"}]',
        _USER + '"content": [@]}]',
        _USER + '"content": [{"type": @}]}]',
        _USER + '"content": [{"type": "text", "text": @}]}]',
        _USER + '"content": [{"type": "tool_result", "tool_use_id": "t", "content": @}]}]',
        _USER + '"content": [{"type": "tool_result", "tool_use_id": @}]}]',
        _ASSISTANT + '"content": [{"type": "tool_use", "id": "t", "name": "f", "input": @}]}]',
        _ASSISTANT + '"content": [{"type": "tool_use", "id": @, "name": "f", "input": {}}]}]',
        _ASSISTANT + '"content": [{"type": "thinking", "thinking": @}]}]',
        _USER + '"content": "a"}], "tools": [@]',
        _USER + '"content": "a"}], "tools": [{"type": @}]',
        _USER + '"content": "a"}], "tools": [{"name": "f", "input_schema": @}]',
        _USER + '"content": "a"}], "tools": [{"name": "f", "input_examples": @}]',
        _USER
        + '"content": "a"}], "output_config": {"format": {"type": "json_schema", "schema": @}}',
    ),
    ResponseRequest: (
        '"input": [@]',
        '"input": [{"type": @}]',
        '"input": [{"id": @}]',
        '"input": [{"role": @, "content": "a"}]',
        '"input": [{"role": "user", "content": [@]}]',
        '"input": [{"role": "user", "content": [{"type": "input_text", "text": @}]}]',
        '"input": [{"type": "function_call", "call_id": "c", "name": @, "arguments": "{}"}]',
        '"input": [{"type": "function_call", "call_id": "c", "name": "f", "arguments": @}]',
        '"input": [{"type": "function_call_output", "call_id": "c", "output": @}]',
        '"input": [{"type": "reasoning", "content": @}]',
        '"input": [{"type": "reasoning", "encrypted_content": @}]',
        '"input": "x", "tools": [@]',
        _FUNCTION + '"parameters": @}]',
        _FUNCTION + '"description": @}]',
        _FUNCTION + '"strict": true}], "tool_choice": {"type": "allowed_tools", "tools": @}',
        '"input": "x", "text": {"format": {"type": "json_schema", "name": "n", "schema": @}}',
    ),
}


def kinds(annotation: Any) -> Iterator[Any]:
    """The members of a union."""
    if get_origin(annotation) in (Union, UnionType):
        for member in get_args(annotation):
            yield from kinds(member)
    else:
        yield annotation


def valid(model: type[BaseModel]) -> dict[str, Any]:
    """The required fields of a model, as small as they may be."""
    body: dict[str, Any] = {}
    for name, info in model.model_fields.items():
        if info.is_required():
            kind = next(kinds(info.annotation))
            if get_origin(kind) is Literal:
                body[name] = "user"
            elif get_origin(kind) is list:
                item = next(kinds(get_args(kind)[0]))
                inner = issubclass(item, BaseModel) if isinstance(item, type) else False
                body[name] = [valid(item)] if inner else [1]
            else:
                body[name] = "x"
    return body


def places(model: type[BaseModel], around: Any = lambda inner: inner) -> Iterator[tuple[str, Any]]:
    """Every field of a model and of the models in it: its name, and a function from a text of JSON
    for the field to the text of the whole body."""
    base = valid(model)
    for name, info in model.model_fields.items():

        def put(text: str, name: str = name) -> str:
            rest = json.dumps({key: value for key, value in base.items() if key != name})
            return str(
                around(rest[:-1] + (", " if len(rest) > 2 else "") + f'"{name}": {text}' + "}")
            )

        yield f"{model.__name__}.{name}", put
        for kind in kinds(info.annotation):
            item = next(kinds(get_args(kind)[0])) if get_origin(kind) is list else kind
            if isinstance(item, type) and issubclass(item, BaseModel):
                shape = "[%s]" if get_origin(kind) is list else "%s"
                yield from places(item, lambda text, put=put, shape=shape: put(shape % text))
