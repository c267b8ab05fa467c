"""What the engine core keeps of a caller's request, and of each of its answers."""

from __future__ import annotations

from dataclasses import dataclass, field

from ds_cp.engine.detokenize import IncrementalDetokenizer
from ds_cp.scheduler.request import Request


@dataclass(eq=False)
class Call:
    """One caller's request: ``params.n`` answers to one prompt."""

    request_id: str
    http_id: str
    answers: list[Answer] = field(default_factory=list)
    sent_prompt: bool = False  # the delta that describes the prompt went out
    scores: dict[int, bytes] = field(default_factory=dict)  # by prompt position, packed


@dataclass(eq=False)
class Answer:
    """One answer; ``text``: None without a tokenizer."""

    call: Call
    request: Request
    text: IncrementalDetokenizer | None
