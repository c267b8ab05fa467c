"""The items of a conversation as the turns of a chat."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from ds_cp.api.chat.request import Part, Role, Turn
from ds_cp.api.responses.items import Item
from ds_cp.parsing.history import EarlierCall


def turns_of(instructions: str | None, items: Iterable[Item]) -> list[Turn]:
    """The turns that items make: what a model thought, said and called in a row is one.

    ``instructions`` and the system's messages at the beginning are one turn, since most templates
    take one only. Items are as ``items.read_input`` makes them, without references.
    """
    turns: list[Turn] = []
    run = [Turn(role="system", content=instructions)] if instructions else []  # will be one turn
    for item in items:
        turn = _turn_of(item)
        if turn.role == "assistant" and not (turn.content or turn.reasoning or turn.calls):
            continue
        if run and not _goes_on(run[-1], turn, first=not turns):
            turns.append(_joined(run))
            run = []
        run.append(turn)
    return [*turns, _joined(run)] if run else turns


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


def _goes_on(last: Turn, turn: Turn, *, first: bool) -> bool:
    """Whether both are of one turn. ``first``: there is none before them."""
    if last.role != turn.role:
        return False
    if turn.role != "assistant":
        return first and turn.role == "system"
    # A model thinks, then speaks, then calls: what goes back in this order begins anew.
    return bool(turn.calls) or _stage(last) < _stage(turn)


def _stage(turn: Turn) -> int:
    return 2 if turn.calls else 1 if turn.content else 0


def _joined(run: Sequence[Turn]) -> Turn:
    """A run as one turn; in one go, because thousands may be in a row."""
    if len(run) == 1:
        return run[0]
    if run[0].role == "system":
        return Turn(role="system", content="\n\n".join(map(_text, run)))
    return Turn(
        role="assistant",
        reasoning="".join(turn.reasoning for turn in run),
        content=next((turn.content for turn in run if turn.content), ""),
        calls=tuple(call for turn in run for call in turn.calls),
    )


def _text(turn: Turn) -> str:
    if isinstance(turn.content, str):
        return turn.content
    return "\n".join(part["text"] for part in turn.content)
