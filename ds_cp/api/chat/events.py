"""What a chat's answer is made of as it comes, whatever the protocol: steps of events."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ds_cp.outputs import TokenLogprob
from ds_cp.parsing.events import ArgumentsDelta, CallBegin, CallEnd, Content, Event, Reasoning

__all__ = [
    "ArgumentsDelta",
    "CallBegin",
    "CallEnd",
    "Content",
    "Event",
    "FinishReason",
    "Finished",
    "Reasoning",
    "Step",
    "Usage",
]

FinishReason = Literal["stop", "length", "tool_calls", "abort"]


@dataclass(frozen=True, slots=True)
class Finished:
    """The end of an answer. ``reason`` "tool_calls": it stopped and calls tools; "stop" where a
    stop of the client came within the last call. ``stop_reason``: the stop token or string of the
    client that ended it, or None."""

    reason: FinishReason
    stop_reason: int | str | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """What one delta of the engine adds to one answer.

    ``choice``: which of the ``n`` answers. ``events``: in their order; none while the parser holds
    text back. The events of a tool call never interleave with those of another one, and every
    ``CallBegin`` has its ``CallEnd``, in the last step at the latest. ``token_ids`` and
    ``logprobs`` are of the tokens of the step, whatever became of them: text may come later.
    ``finished``: in the last step of the answer.
    """

    choice: int
    events: Sequence[Event] = ()
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] | None = None
    finished: Finished | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of a request, of all its answers together. ``cached``: of the prompt, found in the
    prefix cache; ``reasoning``: of ``completion``, those that are reasoning."""

    prompt: int
    completion: int
    cached: int = 0
    reasoning: int = 0
