"""``context_management``: thinking of earlier turns is cleared as it is asked, nothing else is."""

from __future__ import annotations

import json
from typing import Any

import pytest
from anthropic.types.beta import (
    BetaAllThinkingTurnsParam,
    BetaClearThinking20251015EditParam,
    BetaThinkingTurnsParam,
)
from hypothesis import given
from hypothesis import strategies as st

from ds_cp.api.chat.request import Turn
from ds_cp.api.errors import ApiError
from ds_cp.api.messages.edits import CLEAR_THINKING, without_thinking
from ds_cp.api.messages.request import CountRequest, MessagesRequest
from ds_cp.api.requests.bodies import _to_model
from ds_cp.api.requests.strict_model import Notes


def thought(i: int) -> dict[str, Any]:
    blocks = [{"type": "thinking", "thinking": f"t{i}", "signature": "s"},
              {"type": "text", "text": f"a{i}"}]  # fmt: skip
    return {"role": "assistant", "content": blocks}


MESSAGES = [
    {"role": "user", "content": "x"}, thought(0), {"role": "user", "content": "y"}, thought(1),
    {"role": "user", "content": "z"}, {"role": "assistant", "content": "plain"},
    {"role": "user", "content": "w"},
]  # fmt: skip


def read(management: Any, kind: Any = MessagesRequest) -> Any:
    body = {"max_tokens": 5, "messages": MESSAGES, "context_management": management}
    if kind is CountRequest:
        del body["max_tokens"]
    return _to_model(json.dumps(body).encode(), kind, Notes(), None)


def thinking(management: Any) -> list[str]:
    request = read(management)
    assert isinstance(request, MessagesRequest), request
    assert [turn.content for turn in request.turns if turn.role == "assistant"] == [
        "a0", "a1", "plain",
    ]  # fmt: skip
    return [turn.reasoning for turn in request.turns if turn.reasoning]


def edit(keep: Any = None) -> dict[str, Any]:
    """As the client's own types spell it."""
    if keep is None:
        return dict(BetaClearThinking20251015EditParam(type=CLEAR_THINKING))
    return dict(BetaClearThinking20251015EditParam(type=CLEAR_THINKING, keep=keep))


@pytest.mark.parametrize(
    ("management", "left"),
    [
        (None, ["t0", "t1"]),
        ({}, ["t0", "t1"]),
        ({"edits": []}, ["t0", "t1"]),
        ({"edits": None}, ["t0", "t1"]),
        ({"edits": [edit("all")]}, ["t0", "t1"]),  # what Claude Code sends
        ({"edits": [edit(BetaAllThinkingTurnsParam(type="all"))]}, ["t0", "t1"]),
        ({"edits": [edit()]}, ["t1"]),
        ({"edits": [edit(BetaThinkingTurnsParam(type="thinking_turns", value=1))]}, ["t1"]),
        ({"edits": [edit(BetaThinkingTurnsParam(type="thinking_turns", value=2))]}, ["t0", "t1"]),
        ({"edits": [edit("all"), edit()]}, ["t1"]),
    ],
)
def test_thinking_is_cleared_as_it_is_asked(management: Any, left: list[str]) -> None:
    assert thinking(management) == left
    assert isinstance(read(management, CountRequest), CountRequest)


@pytest.mark.parametrize(
    ("management", "param"),
    [
        (5, ""),
        ([], ""),
        ({"edits": 5}, ".edits"),
        ({"edits": {}}, ".edits"),
        ({"edits": [edit("all")] * 17}, ".edits"),
        ({"edits": [5]}, ".edits[0].type"),
        ({"edits": [edit("all"), {"type": "compact_20260112"}]}, ".edits[1].type"),
        ({"edits": [{"type": "clear_tool_uses_20250919"}]}, ".edits[0].type"),
        ({"edits": [edit("none")]}, ".edits[0].keep"),
        ({"edits": [edit({"type": "thinking_turns", "value": 0})]}, ".edits[0].keep"),
        ({"edits": [edit({"type": "thinking_turns", "value": True})]}, ".edits[0].keep"),
        ({"edits": [edit({"type": "thinking_turns", "value": 1, "x": 1})]}, ".edits[0].keep"),
    ],
)
def test_other_edits_are_refused_by_name(management: Any, param: str) -> None:
    for kind in (MessagesRequest, CountRequest):
        error = read(management, kind)
        assert isinstance(error, ApiError) and error.status_code == 400, error
        assert error.param == ("context_management" + param)


TURNS = st.builds(
    Turn, role=st.just("assistant"), content=st.just("a"), reasoning=st.sampled_from(["", "t"])
)


@given(st.lists(TURNS, max_size=6), st.none() | st.integers(1, 4))
def test_the_last_turns_with_thinking_keep_it(turns: list[Turn], keep: int | None) -> None:
    found = without_thinking(turns, keep)
    had = [i for i, turn in enumerate(turns) if turn.reasoning]
    expected = had if keep is None else had[max(0, len(had) - keep) :]
    assert [i for i, turn in enumerate(found) if turn.reasoning] == expected
    assert [turn.content for turn in found] == [turn.content for turn in turns]
