"""The items of a response's input: checked, and in one spelling. An item is an object as the
protocol has it, with an id, so that it can be given back as it is kept."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ds_cp.api.answers.named_events import new_id
from ds_cp.api.errors import FieldError, shown
from ds_cp.api.requests.messages import MAX_MESSAGES, MAX_PARTS, plain_text
from ds_cp.api.requests.strict_model import Notes, sift
from ds_cp.api.responses.fields import HARMLESS
from ds_cp.errors import RequestError
from ds_cp.parsing.calls import is_name
from ds_cp.parsing.history import read_id

Item = dict[str, Any]

MAX_ID_CHARS = 128  # characters of an item's id
_ROLES = ("user", "assistant", "system", "developer")
_SEALED = "ds_cp:"  # before the base64 of reasoning that a client keeps for us
_TEXT_PARTS = ("input_text", "output_text", "text")
_NO_MEDIA = "this server reads text only"


def text_item(role: str, text: str) -> Item:
    """A message of one text."""
    return _message_item(role, [text])


def read_input(value: Any, notes: Notes) -> list[Item]:
    """The items of ``input``. Those of type ``item_reference`` have an id alone, of an item that is
    kept. Raises ``FieldError``, its field below ``input``."""
    if isinstance(value, str):
        return [text_item("user", plain_text(value, "input"))]
    if not isinstance(value, list) or not value:
        raise FieldError("input must be text or a list of items, one at least")
    if len(value) > MAX_MESSAGES:
        raise FieldError(f"input has {len(value)} items; at most {MAX_MESSAGES}")
    return [_read_item(item, f"[{i}]", notes) for i, item in enumerate(value)]


def _read_item(item: Any, place: str, notes: Notes) -> Item:
    if not isinstance(item, dict):
        raise FieldError(f"input{place} must be an object", place)
    kind = item.get("type")
    if kind is None:  # both have short spellings without one
        kind = "message" if "role" in item else "item_reference"
    reader = _READERS.get(kind) if isinstance(kind, str) else None
    if reader is None:
        known = ", ".join(_READERS)
        raise FieldError(
            f"input{place}.type {shown(kind)} is not supported: {_NO_MEDIA}, and has no hosted "
            f"tools; items are of type {known}",
            f"{place}.type",
        )
    try:
        return reader(item, notes)
    except FieldError as err:
        raise FieldError(f"input{place}: {err}", _below(place, err.param)) from None
    except RequestError as err:
        raise FieldError(f"input{place}: {err}", _below(place, err.param)) from None


def _below(place: str, param: str | None) -> str:
    return place + (f".{param}" if param and not param.startswith("[") else param or "")


def _known(
    item: Mapping[str, Any], kind: str, fields: Iterable[str], notes: Notes
) -> dict[str, Any]:
    return sift(f"input {kind}", item, ("type", *fields), {}, HARMLESS[kind], notes)


def _read_message(item: Item, notes: Notes) -> Item:
    kept = _known(item, "message", ("role", "content"), notes)
    role, content = kept.get("role"), kept.get("content")
    if role not in _ROLES:
        raise FieldError(f"role must be one of {', '.join(_ROLES)}, not {shown(role)}", "role")
    if isinstance(content, str):
        return _message_item(role, [plain_text(content, "content")])
    return _message_item(role, _read_parts(content, "content", notes))


def _message_item(role: str, texts: list[str]) -> Item:
    if role == "assistant":
        parts: list[Any] = [output_text(text) for text in texts]
    else:
        parts = [{"type": "input_text", "text": text} for text in texts]
    return {
        "id": new_id("msg"),
        "type": "message",
        "role": role,
        "status": "completed",
        "content": parts,
    }


def output_text(text: str, logprobs: list[Any] | None = None) -> dict[str, Any]:
    """A part of an assistant's message."""
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs or []}


def _read_parts(content: Any, name: str, notes: Notes) -> list[str]:
    if not isinstance(content, list):
        raise FieldError(f"{name} must be text or a list of parts", name)
    if len(content) > MAX_PARTS:
        raise FieldError(f"{name} has {len(content)} parts; at most {MAX_PARTS}", name)
    return [_read_part(part, f"{name}[{i}]", notes) for i, part in enumerate(content)]


def _read_part(part: Any, place: str, notes: Notes) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind not in _TEXT_PARTS:
        hint = f"is of type {shown(kind)}, which is not supported: {_NO_MEDIA}"
        raise FieldError(f"{place} {hint}", f"{place}.type")
    kept = sift("input part", part, ("type", "text"), {}, HARMLESS["part"], notes)
    if not isinstance(kept.get("text"), str):
        raise FieldError(f"{place}.text must be text", f"{place}.text")
    return plain_text(kept["text"], f"{place}.text")


def _read_call(item: Item, notes: Notes) -> Item:
    kept = _known(item, "function_call", ("id", "call_id", "name", "arguments"), notes)
    name, arguments = kept.get("name"), kept.get("arguments")
    if not isinstance(name, str) or not is_name(name):
        raise FieldError("name must be a tool's name", "name")
    if not isinstance(arguments, str):
        raise FieldError("arguments must be JSON text", "arguments")
    call_id = read_id(kept.get("call_id"), "call_id")
    return call_item(call_id, name, plain_text(arguments, "arguments"))


def call_item(call_id: str, name: str, arguments: str, status: str = "completed") -> Item:
    """A call of a function."""
    return {
        "id": new_id("fc"),
        "type": "function_call",
        "status": status,
        "call_id": call_id,
        "name": name,
        "arguments": arguments,
    }


def _read_result(item: Item, notes: Notes) -> Item:
    kept = _known(item, "function_call_output", ("id", "call_id", "output"), notes)
    output = kept.get("output")
    if not isinstance(output, str):
        output = "\n".join(_read_parts(output, "output", notes))
    return {
        "id": new_id("fco"),
        "type": "function_call_output",
        "status": "completed",
        "call_id": read_id(kept.get("call_id"), "call_id"),
        "output": plain_text(output, "output"),
    }


def _read_reasoning(item: Item, notes: Notes) -> Item:
    kept = _known(item, "reasoning_item", ("id", "content", "encrypted_content"), notes)
    parts, sealed = kept.get("content"), kept.get("encrypted_content")
    if sealed is not None and not isinstance(sealed, str):
        raise FieldError("encrypted_content must be text", "encrypted_content")
    if parts is not None and not isinstance(parts, list):
        raise FieldError("content must be a list of parts", "content")
    if len(parts or []) > MAX_PARTS:
        raise FieldError(f"content has {len(parts or [])} parts; at most {MAX_PARTS}", "content")
    texts = []
    for i, part in enumerate(parts or []):
        text = part.get("text") if isinstance(part, dict) else None
        if not isinstance(text, str):
            raise FieldError(f"content[{i}] must be a part of text", f"content[{i}]")
        texts.append(plain_text(text, f"content[{i}].text"))
    return reasoning_item("".join(texts) or unsealed(sealed or ""))


def reasoning_item(text: str) -> Item:
    """What a model thought before it answered."""
    content = [{"type": "reasoning_text", "text": text}] if text else []
    return {
        "id": new_id("rs"),
        "type": "reasoning",
        "status": "completed",
        "summary": [],
        "content": content,
    }


def sealed(text: str) -> str:
    """Reasoning as a client keeps it who may not read it (``encrypted_content``). It can be read by
    whoever wants to: what it holds is in ``content`` as well."""
    return _SEALED + base64.b64encode(text.encode()).decode()


def unsealed(text: str) -> str:
    """The opposite; "" for what another server has sealed, which nobody here can read."""
    if not text.startswith(_SEALED):
        return ""
    try:
        return base64.b64decode(text.removeprefix(_SEALED).encode(), validate=True).decode()
    except (binascii.Error, UnicodeError):
        return ""


def _read_reference(item: Item, notes: Notes) -> Item:
    kept = sift("input reference", item, ("type", "id"), {}, frozenset(), notes)
    name = kept.get("id")
    if not isinstance(name, str) or not 1 <= len(name) <= MAX_ID_CHARS:
        raise FieldError(f"id must be that of an item, 1 to {MAX_ID_CHARS} characters", "id")
    return {"type": "item_reference", "id": name}


_READERS: dict[str, Callable[[Item, Notes], Item]] = {
    "message": _read_message,
    "function_call": _read_call,
    "function_call_output": _read_result,
    "reasoning": _read_reasoning,
    "item_reference": _read_reference,
}
