"""The messages of a chat."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Literal

from pydantic import Field, PrivateAttr, ValidationInfo, field_validator, model_validator

from ds_cp.api.chat.request import Role, Turn, first_unasked
from ds_cp.api.errors import FieldError, shown
from ds_cp.api.requests.foreign_fields import HARMLESS, MESSAGE, Unsupported, is_nothing
from ds_cp.api.requests.strict_model import Notes, StrictModel, notes_of, sift, too_long
from ds_cp.errors import RequestError
from ds_cp.parsing.calls import MAX_CALLS
from ds_cp.parsing.history import EarlierCall, read_calls, read_id
from ds_cp.text import show

MAX_MESSAGES = 10_000  # messages of one request
MAX_PARTS = 1_000  # parts of one message
MAX_PARTICIPANT_CHARS = 256  # characters of a message's name
_PART = '{"type": "text", "text": "..."}'
_OF_ASSISTANT = ("tool_calls", "reasoning_content", "reasoning")

Part = dict[str, str]  # {"type": "text", "text": ...}


class ChatMessage(StrictModel):
    """One turn. ``developer`` is read as ``system``. ``content`` stays as the client sent it: text,
    or parts of text; an assistant's may be null or empty. ``name`` is for templates that use it.

    ``tool_calls`` and the reasoning, under either name, are an assistant's; ``tool_call_id`` is of
    a tool's result.
    """

    unsupported: ClassVar[dict[str, Unsupported]] = MESSAGE
    harmless: ClassVar[frozenset[str]] = HARMLESS["message"]

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part]
    name: str | None = Field(None, max_length=MAX_PARTICIPANT_CHARS)
    tool_calls: list[Any] | None = Field(
        None, max_length=MAX_CALLS, description="calls of functions: id, and function with its name"
    )
    tool_call_id: str | None = Field(None, description="the id of the call that this answers")
    reasoning_content: str | None = None
    reasoning: str | None = Field(None, description="the same as reasoning_content")

    _calls: list[EarlierCall] = PrivateAttr(default_factory=list)

    @model_validator(mode="before")
    @classmethod
    def _of_its_role(cls, data: Any) -> Any:
        """Some clients leave out an assistant's content where others send null."""
        if not isinstance(data, dict):
            return data
        role = data.get("role")
        if role == "function":
            raise FieldError(
                "role 'function' is not supported: send role 'tool' with a tool_call_id", "role"
            )
        if role == "assistant" and "content" not in data:
            data = data | {"content": None}
        if role != "assistant":
            for name in _OF_ASSISTANT:
                if not is_nothing(data.get(name)):
                    raise FieldError(f"{name} is only for role assistant, not {shown(role)}", name)
        if role != "tool" and not is_nothing(data.get("tool_call_id")):
            raise FieldError(
                f"tool_call_id is only for role tool, not {shown(role)}", "tool_call_id"
            )
        return {
            name: None if name in (*_OF_ASSISTANT, "tool_call_id") and is_nothing(value) else value
            for name, value in data.items()
        }

    @field_validator(
        "content",
        mode="plain",
        json_schema_input_type=str | list[dict[Literal["type", "text"], str]] | None,
    )
    @classmethod
    def _content(cls, value: Any, info: ValidationInfo) -> str | list[Part]:
        if isinstance(value, str):
            return plain_text(value, "content")
        if not value and (value is None or value == []) and info.data.get("role") == "assistant":
            return ""
        if not isinstance(value, list) or not value:
            raise FieldError("content must be text or a list of text parts")
        if len(value) > MAX_PARTS:
            raise FieldError(str(too_long("content", value, MAX_PARTS)))
        notes = notes_of(info)
        return [_text_part(part, notes) for part in value]

    @field_validator("name", "tool_call_id", "reasoning_content", "reasoning")
    @classmethod
    def _text(cls, value: str | None, info: ValidationInfo) -> str | None:
        return value if value is None else plain_text(value, info.field_name or "text")

    @model_validator(mode="after")
    def _read_calls(self) -> ChatMessage:
        with in_fields():
            self._calls = read_calls(self.tool_calls, "tool_calls")
            for call in self._calls:
                plain_text(f"{call.id}{call.name}{call.arguments}", "tool_calls", "tool_calls")
            if self.role == "tool":
                read_id(self.tool_call_id, "tool_call_id")
        return self

    def turn(self) -> Turn:
        """The message without what is OpenAI's alone."""
        role: Role = "system" if self.role == "developer" else self.role
        return Turn(
            role=role,
            content=self.content,
            name=self.name or None,
            reasoning=self.reasoning_content or self.reasoning or "",
            calls=tuple(self._calls),
            answers=self.tool_call_id or "",
        )


def turns_of(messages: Sequence[ChatMessage]) -> list[Turn]:
    """The turns of a conversation. Raises ``FieldError`` for a result that answers no call."""
    turns = [message.turn() for message in messages]
    if (index := first_unasked(turns)) is not None:
        raise FieldError(
            f"messages[{index}].tool_call_id: no earlier message calls a tool with the id "
            f"{show(turns[index].answers)}",
            f"messages[{index}].tool_call_id",
        )
    return turns


@contextmanager
def in_fields() -> Iterator[None]:
    """Make a ``RequestError`` of this block a ``FieldError``, as validators raise them."""
    try:
        yield
    except RequestError as err:
        raise FieldError(str(err), err.param) from None


def plain_text(text: str, name: str, param: str | None = None) -> str:
    """The text itself. ``FieldError`` for half a surrogate pair, which JSON can spell but is not
    text. ``param``: the field below the place where a validator sits."""
    try:
        text.encode()
    except UnicodeEncodeError as err:
        raise FieldError(
            f"{name} is not text: half a surrogate pair at character {err.start}", param
        ) from None
    return text


def _text_part(part: Any, notes: Notes) -> Part:
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        raise FieldError(f"a part of content must be {_PART}")
    if part["type"] != "text":
        kind = shown(part["type"])
        raise FieldError(f"content of type {kind} is not supported: this server reads text only")
    kept = sift("part", part, ("type", "text"), {}, HARMLESS["part"], notes)
    if not isinstance(kept.get("text"), str):
        raise FieldError(f"a text part must be {_PART}")
    return {"type": "text", "text": plain_text(kept["text"], "content")}
