"""What the engine core keeps of a caller's request, and of each of its answers."""

from __future__ import annotations

from dataclasses import dataclass, field

from ds_cp.engine.detokenize import IncrementalDetokenizer
from ds_cp.outputs import prompt_digest
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


def given_up(request: Request, cause: str) -> str:
    """What the log has of a request whose steps stop the ranks; ``cause``: of the last time."""
    return (
        f"request {request.request_id} is ended: its steps have failed or ended workers time and "
        f"again{f', the last time: {cause}' if cause else ''} ({len(request.prompt)} prompt "
        f"tokens, their sha256 begins with {prompt_digest(request.prompt)}, "
        f"{len(request.output)} tokens given)"
    )
