"""The messages of a chat."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from ds_cp.api.errors import FieldError, shown
from ds_cp.api.requests.foreign_fields import HARMLESS, MESSAGE, Unsupported
from ds_cp.api.requests.strict_model import Notes, StrictModel, notes_of, sift, too_long

MAX_MESSAGES = 10_000  # messages of one request
MAX_PARTS = 1_000  # parts of one message
MAX_PARTICIPANT_CHARS = 256  # characters of a message's name
_PART = '{"type": "text", "text": "..."}'

Part = dict[str, str]  # {"type": "text", "text": ...}


class ChatMessage(StrictModel):
    """One turn. ``developer`` is read as ``system``. ``content`` stays as the client sent it: text,
    or parts of text; an assistant's may be null or empty. ``name`` is for templates that use it.
    """

    unsupported: ClassVar[dict[str, Unsupported]] = MESSAGE
    harmless: ClassVar[frozenset[str]] = HARMLESS["message"]

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]
    name: str | None = Field(None, max_length=MAX_PARTICIPANT_CHARS)

    @model_validator(mode="before")
    @classmethod
    def _without_text(cls, data: Any) -> Any:
        """Some clients leave out an assistant's content where others send null."""
        if isinstance(data, dict) and data.get("role") == "assistant" and "content" not in data:
            return data | {"content": None}
        return data

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

    @field_validator("name")
    @classmethod
    def _name(cls, value: str | None) -> str | None:
        return value if value is None else plain_text(value, "name")

    def for_template(self) -> dict[str, Any]:
        """The message as chat templates expect it: ``role``, ``content`` (text, or the list of
        parts that the client sent) and, where there is one, ``name``."""
        role = "system" if self.role == "developer" else self.role
        message: dict[str, Any] = {"role": role, "content": self.content}
        return message | {"name": self.name} if self.name else message


def plain_text(text: str, name: str) -> str:
    """The text itself. ``FieldError`` for half a surrogate pair, which JSON can spell but is not
    text."""
    try:
        text.encode()
    except UnicodeEncodeError as err:
        raise FieldError(
            f"{name} is not text: half a surrogate pair at character {err.start}"
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
