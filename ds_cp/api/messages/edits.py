"""``context_management``: the edits of an input that are served, and why the others are not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ds_cp.api.chat.request import Turn
from ds_cp.api.errors import FieldError, shown
from ds_cp.api.requests.strict_model import Notes, sift

CLEAR_THINKING = "clear_thinking_20251015"
KEEP = 1  # assistant's turns whose thinking stays where an edit does not say how many
MAX_EDITS = 16
_NAME = "context_management"


def read_edits(value: Any, notes: Notes) -> int | None:
    """The assistant's turns, from the end, whose thinking stays; None for all. Raises
    ``FieldError``, its field below ``context_management``."""
    if value is None:
        return None
    if not isinstance(value, dict):
        raise FieldError(f"{_NAME} must be an object with edits")
    edits = sift(_NAME, value, ("edits",), {}, frozenset(), notes).get("edits")
    if edits is None:
        return None
    if not isinstance(edits, list) or len(edits) > MAX_EDITS:
        raise FieldError(f"{_NAME}.edits must be a list of at most {MAX_EDITS} edits", "edits")
    kept = [_read_edit(edit, f"edits[{i}]", notes) for i, edit in enumerate(edits)]
    return min((turns for turns in kept if turns is not None), default=None)


def _read_edit(edit: Any, place: str, notes: Notes) -> int | None:
    where = f"{_NAME}.{place}"
    kind = edit.get("type") if isinstance(edit, dict) else None
    if kind != CLEAR_THINKING:
        raise FieldError(
            f"{where} is of type {shown(kind)}, which is not supported: the client removes from "
            f"its messages what is no longer to be read; the only edit here is {CLEAR_THINKING}",
            f"{place}.type",
        )
    keep = sift("edit", edit, ("type", "keep"), {}, frozenset(), notes).get("keep")
    if keep is None:
        return KEEP
    if keep == "all" or (isinstance(keep, dict) and keep == {"type": "all"}):
        return None
    turns = keep.get("value") if isinstance(keep, dict) else None
    if isinstance(keep, dict) and keep.get("type") == "thinking_turns" and len(keep) == 2:
        if isinstance(turns, int) and not isinstance(turns, bool) and turns > 0:
            return turns
    raise FieldError(
        f'{where}.keep must be "all", {{"type": "all"}} or {{"type": "thinking_turns", '
        f'"value": turns}} with one turn at least, not {shown(keep)}',
        f"{place}.keep",
    )


def without_thinking(turns: Sequence[Turn], keep: int | None) -> list[Turn]:
    """The turns, thinking in the last ``keep`` only of those that have some."""
    if keep is None:
        return list(turns)
    thought = [i for i, turn in enumerate(turns) if turn.reasoning]
    cleared = set(thought[:-keep])
    return [replace(turn, reasoning="") if i in cleared else turn for i, turn in enumerate(turns)]
