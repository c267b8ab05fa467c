"""One request as the scheduler sees it. Integers and words only."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from ds_cp.engine.params import RequestMetrics, SamplingParams
from ds_cp.kv.table import SequenceTable


@dataclass(eq=False)
class Request:
    """``number`` names it in plans; ``request_id`` to the caller. ``max_tokens`` is resolved (never
    None). ``table``: where its KV is, while it runs. ``spare``: blocks held per rank for prompt
    tokens that are not computed yet. ``homes``: tokens of the prompt still to be stored, per rank.
    """

    number: int
    request_id: str
    prompt: tuple[int, ...]
    params: SamplingParams
    max_tokens: int
    seed: int
    output: list[int] = field(default_factory=list)
    table: SequenceTable | None = None
    spare: dict[int, list[int]] = field(default_factory=dict)
    homes: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    arrival_time: float = field(default_factory=time.time)
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    finished_time: float | None = None
    modes: list[str] = field(default_factory=list)
    num_preemptions: int = 0

    def slice(self, start: int, count: int) -> tuple[int, ...]:
        """``count`` tokens from position ``start``: of the prompt, then of the output, which a
        preempted request computes again."""
        end, length = start + count, len(self.prompt)
        return (
            *self.prompt[start:end],
            *self.output[max(start - length, 0) : max(end - length, 0)],
        )

    @property
    def num_tokens(self) -> int:
        return len(self.prompt) + len(self.output)

    @property
    def num_computed(self) -> int:
        """Tokens whose KV is stored."""
        return self.table.num_tokens if self.table else 0

    @property
    def is_prefilling(self) -> bool:
        """Some token that blocks were taken for at the start is still without KV."""
        return any(self.homes)

    def metrics(self) -> RequestMetrics:
        """Times and modes so far."""
        return RequestMetrics(
            self.arrival_time,
            self.first_scheduled_time,
            self.first_token_time,
            self.finished_time,
            tuple(self.modes),
            self.num_preemptions,
        )
