"""The messages of Anthropic's protocol as the turns of a chat. A message is a list of blocks; its
text is a short spelling of one."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from itertools import takewhile
from typing import Any

from ds_cp.api.chat.request import Part, Role, Turn
from ds_cp.api.errors import FieldError, shown
from ds_cp.api.messages.fields import HARMLESS
from ds_cp.api.requests.client_tools import check_depth
from ds_cp.api.requests.messages import MAX_MESSAGES, plain_text
from ds_cp.api.requests.strict_model import Notes, sift
from ds_cp.errors import RequestError
from ds_cp.parsing.calls import is_name
from ds_cp.parsing.history import RAW, EarlierCall, read_id

MAX_BLOCKS = 1_000  # blocks of one message
_ROLES: dict[str, tuple[str, ...]] = {  # the blocks that each may have
    "user": ("text", "tool_result"),
    "assistant": ("text", "thinking", "redacted_thinking", "tool_use"),
    "system": ("text",),
}
Block = Mapping[str, Any]


def read_system(value: Any, notes: Notes) -> list[Part]:
    """The texts of ``system``. Raises ``FieldError``."""
    if isinstance(value, str):
        return [_part(plain_text(value, "system"))] if value else []
    return [_part(block["text"]) for block in _read_blocks(value, "system", ("text",), notes, "")]


def read_messages(value: Any, notes: Notes) -> list[Turn]:
    """The turns of ``messages``. Raises ``FieldError``, its field below ``messages``."""
    if not isinstance(value, list) or not value:
        raise FieldError("messages must be a list of messages, one at least")
    if len(value) > MAX_MESSAGES:
        raise FieldError(f"messages has {len(value)} messages; at most {MAX_MESSAGES}")
    turns: list[Turn] = []
    for i, message in enumerate(value):
        try:
            turns += _read_message(message, f"[{i}]", notes)
        except RequestError as err:
            raise FieldError(str(err), (err.param or "").removeprefix("messages")) from None
    return turns


def with_system(system: list[Part], turns: list[Turn]) -> list[Turn]:
    """The turns with the system's text before them, in one turn with those of the system that they
    begin with: most templates take one only."""
    texts = [part["text"] for part in system]
    begun = list(takewhile(lambda turn: turn.role == "system", turns))
    for turn in begun:
        content = turn.content
        texts += [content] if isinstance(content, str) else [part["text"] for part in content]
    rest = turns[len(begun) :]
    return [Turn(role="system", content="\n\n".join(texts)), *rest] if texts else rest


def _part(text: str) -> Part:
    return {"type": "text", "text": text}


def _read_message(message: Any, place: str, notes: Notes) -> list[Turn]:
    if not isinstance(message, dict):
        raise FieldError(f"messages{place} must be an object", place)
    try:
        kept = sift("message", message, ("role", "content"), {}, frozenset(), notes)
    except FieldError as err:
        below = f".{err.param}" if err.param else ""
        raise FieldError(f"messages{place}: {err}", place + below) from None
    role, content = kept.get("role"), kept.get("content")
    if not isinstance(role, str) or role not in _ROLES:
        known = ", ".join(_ROLES)
        raise FieldError(
            f"messages{place}.role must be one of {known}, not {shown(role)}", f"{place}.role"
        )
    if isinstance(content, str):
        text = plain_text(content, f"messages{place}.content", f"{place}.content")
        return [Turn(role=_role(role), content=text)]
    where = f"{place}.content"
    blocks = _read_blocks(content, f"messages{where}", _ROLES[role], notes, where)
    return [_assistant(blocks)] if role == "assistant" else _others(_role(role), blocks)


def _role(role: str) -> Role:
    return role  # type: ignore[return-value]  # it is one of _ROLES


def _assistant(blocks: list[Block]) -> Turn:
    texts = [block["text"] for block in blocks if block["type"] == "text"]
    thoughts = [block["thinking"] for block in blocks if block["type"] == "thinking"]
    calls = tuple(block["call"] for block in blocks if block["type"] == "tool_use")
    content: Any = texts[0] if len(texts) == 1 else [_part(text) for text in texts]
    return Turn(role="assistant", content=content or "", reasoning="\n".join(thoughts), calls=calls)


def _others(role: Role, blocks: list[Block]) -> list[Turn]:
    """Results are turns of their own, between what the user says before and behind them."""
    turns: list[Turn] = []
    parts: list[Part] = []

    def say() -> None:
        if parts:
            said = parts[0]["text"] if len(parts) == 1 else list(parts)
            turns.append(Turn(role=role, content=said))
            parts.clear()

    for block in blocks:
        if block["type"] == "tool_result":
            say()
            turns.append(Turn(role="tool", content=block["content"], answers=block["tool_use_id"]))
        else:
            parts.append(_part(block["text"]))
    say()
    return turns


def _read_blocks(
    value: Any, name: str, kinds: tuple[str, ...], notes: Notes, place: str
) -> list[Block]:
    """The blocks of ``name``, which are of these kinds; ``place``: the same as errors' field."""
    if not isinstance(value, list):
        raise FieldError(f"{name} must be text or a list of blocks", place or None)
    if len(value) > MAX_BLOCKS:
        raise FieldError(f"{name} has {len(value)} blocks; at most {MAX_BLOCKS}", place or None)
    found = []
    for i, block in enumerate(value):
        kind = block.get("type") if isinstance(block, dict) else None
        if kind not in kinds:
            raise FieldError(
                f"{name}[{i}] is of type {shown(kind)}, which is not supported here: "
                f"this server reads text only; blocks are of type {', '.join(kinds)}",
                f"{place}[{i}].type",
            )
        try:
            read = _READERS[kind](block, f"{name}[{i}]", notes)
        except FieldError as err:
            below = f".{err.param}" if err.param else ""
            raise FieldError(str(err), f"{place}[{i}]{below}") from None
        if read is not None:
            found.append(read)
    return found


def _known(block: Block, fields: tuple[str, ...], notes: Notes) -> dict[str, Any]:
    kind = block["type"]
    return sift(f"block {kind}", block, ("type", *fields), {}, HARMLESS[kind], notes)


def _read_text(block: Block, name: str, notes: Notes) -> Block:
    text = _known(block, ("text",), notes).get("text")
    if not isinstance(text, str):
        raise FieldError(f"{name}.text must be text", "text")
    return {"type": "text", "text": plain_text(text, f"{name}.text")}


def _read_thinking(block: Block, name: str, notes: Notes) -> Block:
    text = _known(block, ("thinking",), notes).get("thinking")
    if not isinstance(text, str):
        raise FieldError(f"{name}.thinking must be text", "thinking")
    return {"type": "thinking", "thinking": plain_text(text, f"{name}.thinking")}


def _read_redacted(block: Block, name: str, notes: Notes) -> None:
    """What another server has encrypted; nobody here can read it."""
    _known(block, (), notes)
    notes.skip("redacted_thinking")


def _read_call(block: Block, name: str, notes: Notes) -> Block:
    kept = _known(block, ("id", "name", "input"), notes)
    tool, given = kept.get("name"), kept.get("input")
    if not isinstance(tool, str) or not is_name(tool):
        raise FieldError(f"{name}.name must be a tool's name", "name")
    if not isinstance(given, dict):
        raise FieldError(f"{name}.input must be an object", "input")
    check_depth(given, f"{name}.input", "input")
    # What was no JSON when the model wrote it goes back as it was.
    raw = given.get(RAW) if len(given) == 1 else None
    text = raw if isinstance(raw, str) else json.dumps(given, ensure_ascii=False)
    call = EarlierCall(_id(kept.get("id"), f"{name}.id", "id"), tool, plain_text(text, name))
    return {"type": "tool_use", "call": call}


def _read_result(block: Block, name: str, notes: Notes) -> Block:
    kept = _known(block, ("tool_use_id", "content", "is_error"), notes)
    content, is_error = kept.get("content"), kept.get("is_error")
    if not isinstance(is_error, bool | None):
        raise FieldError(f"{name}.is_error must be true or false", "is_error")
    if content is None:
        text = ""
    elif isinstance(content, str):
        text = plain_text(content, f"{name}.content")
    else:
        where = f"{name}.content"
        texts = [part["text"] for part in _read_blocks(content, where, ("text",), notes, "content")]
        text = "\n".join(texts)
    if is_error:  # no template has a place for it
        text = f"Error: {text}"
    answered = _id(kept.get("tool_use_id"), f"{name}.tool_use_id", "tool_use_id")
    return {"type": "tool_result", "content": text, "tool_use_id": answered}


def _id(value: Any, where: str, param: str) -> str:
    try:
        return read_id(value, where)
    except RequestError as err:
        raise FieldError(str(err), param) from None


_READERS: dict[str, Callable[[Block, str, Notes], Block | None]] = {
    "text": _read_text,
    "thinking": _read_thinking,
    "redacted_thinking": _read_redacted,
    "tool_use": _read_call,
    "tool_result": _read_result,
}
