"""What openapi.json says of the answers to generating routes: whole as JSON, streamed as events."""

from __future__ import annotations

from typing import Any

_Schema = dict[str, Any]
_INTEGER: _Schema = {"type": "integer", "minimum": 0}
_TEXT: _Schema = {"type": "string"}


def _object(**properties: _Schema) -> _Schema:
    """An object that has all of these properties; it may have more."""
    return {"type": "object", "required": list(properties), "properties": properties}


def _or_null(schema: _Schema) -> _Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def _choice(reasons: tuple[str, ...] = ("stop", "length"), **content: _Schema) -> _Schema:
    return _object(
        index=_INTEGER,
        **content,
        logprobs=_or_null({"type": "object"}),
        finish_reason={"type": "string", "enum": list(reasons)},
        stop_reason=_or_null({"type": ["string", "integer"]}),
    )


def _whole(kind: str, choice: _Schema, **usage: _Schema) -> _Schema:
    return _object(
        id=_TEXT,
        object={"const": kind},
        created=_INTEGER,
        model=_TEXT,
        choices={"type": "array", "minItems": 1, "items": choice},
        usage=_object(
            prompt_tokens=_INTEGER,
            completion_tokens=_INTEGER,
            total_tokens=_INTEGER,
            prompt_tokens_details=_object(cached_tokens=_INTEGER),
            **usage,
        ),
    )


def _answers(schema: _Schema) -> dict[int | str, dict[str, Any]]:
    content = {"application/json": {"schema": schema}, "text/event-stream": {}}
    return {200: {"description": "The answer, whole or (stream) as events.", "content": content}}


_CALL = _object(id=_TEXT, type={"const": "function"}, function=_object(name=_TEXT, arguments=_TEXT))
_MESSAGE = _object(role={"const": "assistant"}, content=_or_null(_TEXT))
_MESSAGE["properties"] |= {
    "reasoning_content": _TEXT,
    "tool_calls": {"type": "array", "minItems": 1, "items": _CALL},
}
CHAT_ANSWERS = _answers(
    _whole(
        "chat.completion",
        _choice(("stop", "length", "tool_calls"), message=_MESSAGE),
        completion_tokens_details=_object(reasoning_tokens=_INTEGER),
    )
)
TEXT_ANSWERS = _answers(_whole("text_completion", _choice(text=_TEXT)))
_USAGE = {"input_tokens": _INTEGER, "output_tokens": _INTEGER}
_ITEMS: _Schema = {"type": "array", "items": {"type": "object", "required": ["type"]}}
_ERROR = _object(type=_TEXT, message=_TEXT)
RESPONSE_ANSWERS = _answers(
    _object(
        id=_TEXT,
        object={"const": "response"},
        created_at=_INTEGER,
        status={
            "type": "string",
            "enum": ["completed", "incomplete", "in_progress", "failed", "cancelled"],
        },
        model=_TEXT,
        output=_ITEMS,
        error=_or_null({"type": "object"}),
        incomplete_details=_or_null({"type": "object"}),
        usage=_or_null(_object(**_USAGE, total_tokens=_INTEGER)),
    )
)
# Anthropic's shape of an error as well.
MESSAGE_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {
        "description": description,
        "content": {"application/json": {"schema": _object(type={"const": "error"}, error=_ERROR)}},
    }
    for status, description in (
        ("4XX", "The request is at fault."),
        ("5XX", "The server is at fault or not ready."),
    )
}
MESSAGE_ANSWERS = MESSAGE_ERRORS | _answers(
    _object(
        id=_TEXT,
        type={"const": "message"},
        role={"const": "assistant"},
        model=_TEXT,
        content=_ITEMS,
        stop_reason=_TEXT,
        stop_sequence=_or_null(_TEXT),
        usage=_object(**_USAGE),
    )
)
