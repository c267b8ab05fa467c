"""The items of a conversation as the turns of a chat."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from ds_cp.api.chat.request import Part, Role, Turn
from ds_cp.api.responses.items import Item
from ds_cp.parsing.history import EarlierCall


def turns_of(instructions: str | None, items: Iterable[Item]) -> list[Turn]:
    """The turns that items make: what a model thought, said and called in a row is one.

    ``instructions`` and the system's messages at the beginning are one turn, since most templates
    take one only. Items are as ``items.read_input`` makes them, without references.
    """
    turns = [Turn(role="system", content=instructions)] if instructions else []
    for item in items:
        turn = _turn_of(item)
        last = turns[-1] if turns else None
        if last is not None and (joined := _joined(last, turn, first=len(turns) == 1)) is not None:
            turns[-1] = joined
        elif turn != _NOTHING:
            turns.append(turn)
    return turns


_NOTHING = Turn(role="assistant")


def _turn_of(item: Item) -> Turn:
    match item["type"]:
        case "reasoning":
            return Turn(role="assistant", reasoning="".join(p["text"] for p in item["content"]))
        case "function_call":
            call = EarlierCall(item["call_id"], item["name"], item["arguments"])
            return Turn(role="assistant", calls=(call,))
        case "function_call_output":
            return Turn(role="tool", content=item["output"], answers=item["call_id"])
        case _:
            return Turn(role=_role(item["role"]), content=_content(item["content"]))


def _role(role: str) -> Role:
    return "system" if role == "developer" else role  # type: ignore[return-value]


def _content(parts: Sequence[dict[str, Any]]) -> str | list[Part]:
    if len(parts) == 1:
        text: str = parts[0]["text"]
        return text
    return [{"type": "text", "text": part["text"]} for part in parts]


def _joined(last: Turn, turn: Turn, *, first: bool) -> Turn | None:
    """Both as one turn; None where they are two."""
    if first and last.role == turn.role == "system":
        return replace(last, content=f"{_text(last)}\n\n{_text(turn)}")
    if not last.role == turn.role == "assistant":
        return None
    # A model thinks, then speaks, then calls: what goes back in this order begins anew.
    if turn.reasoning and (last.reasoning or last.content or last.calls):
        return None
    if turn.content and (last.content or last.calls):
        return None
    return replace(
        last,
        reasoning=last.reasoning or turn.reasoning,
        content=last.content or turn.content,
        calls=(*last.calls, *turn.calls),
    )


def _text(turn: Turn) -> str:
    if isinstance(turn.content, str):
        return turn.content
    return "\n".join(part["text"] for part in turn.content)
