"""What ranks send to rank 0 after a step: drawn tokens and scored prompts, as rows of fp64.

The first ``HEAD`` rows are ``Times``, two numbers a row. The others are ``[token, logprob, ids of
the best .., their logprobs ..]``; token -1 says that the row could not be drawn or scored. All rows
of a step have the width of the one that wants the most alternatives, which every rank knows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from ds_cp.plan import ATTENTION_SCHEMES, Outcome, RankTimes, Sampled, Scored
from ds_cp.worker.sampler import Score
from ds_cp.worker.state import StepWork

Top = tuple[tuple[int, float], ...]
_NUMBERS = 4 + len(ATTENTION_SCHEMES)  # of ``Times``
HEAD = (_NUMBERS + 1) // 2  # rows of them


class Times(NamedTuple):
    """Seconds that a rank worked on a step, of these in the model's forward call, and of these
    waiting for other ranks; bytes that it sent, and what its host memory failed, as in
    ``RankTimes``."""

    seconds: float
    model_seconds: float
    waited: float = 0.0
    sent: tuple[int, ...] = (0,) * len(ATTENTION_SCHEMES)
    host_failed: int = 0


def width_of(work: StepWork) -> int:
    """The number of alternatives that a row of this step has room for."""
    wishes = [draw.sequence.sampling.logprobs for draw in work.draws]
    wishes += [stretch[0].sampling.prompt_logprobs for stretch in work.scored]
    return max(0, *wishes) if wishes else 0


def rows_of(work: StepWork, rank: int) -> int:
    """The number of rows that ``rank`` sends: 0, or ``HEAD`` more than it draws and scores."""
    if rank not in work.ranks:
        return 0
    return (
        HEAD
        + sum(draw.rank == rank for draw in work.draws)
        + sum(count for _, _, count, owner in work.scored if owner == rank)
    )


def pack(
    times: Times, drawn: Sequence[Sampled], scored: Sequence[Score | None], width: int
) -> torch.Tensor:
    """My rows, fp64 ``[rows, 2 + 2 width]``: the times, the draws, then the scored tokens (None:
    one that could not be scored)."""
    head = [times.seconds, times.model_seconds, times.waited, *map(float, times.sent)]
    head.append(float(times.host_failed))
    head += [0.0] * (2 * HEAD - len(head))
    rows = [head[at : at + 2] + [0.0] * (2 * width) for at in range(0, 2 * HEAD, 2)]
    rows += [_row(s.token, s.logprob, s.top, width) for s in drawn]
    rows += [_row(0, *s, width) if s else _row(-1, math.nan, (), width) for s in scored]
    return torch.tensor(rows, dtype=torch.float64)


def unpack(
    step: int, work: StepWork, width: int, rows_by_rank: dict[int, list[list[float]]]
) -> Outcome:
    """The rows of all ranks in the order of the plan; the times are those of the slowest rank."""
    ahead = {rank: iter(rows) for rank, rows in rows_by_rank.items()}
    heads = {
        rank: [number for _ in range(HEAD) for number in next(rows)[:2]]
        for rank, rows in ahead.items()
    }
    numbers = {rank: head[:_NUMBERS] for rank, head in heads.items()}
    ranks = tuple(
        RankTimes(rank, seconds, waited, tuple(map(int, counts[:-1])), int(counts[-1]))
        for rank, (seconds, _, waited, *counts) in sorted(numbers.items())
        if rank in work.ranks
    )
    sampled, failed = [], []
    for draw in work.draws:
        row = next(ahead[draw.rank])
        top = _top(row, width, draw.sequence.sampling.logprobs)
        sampled.append(Sampled(draw.sequence.number, int(row[0]), row[1], top))
    scored = []
    for sequence, first, count, rank in work.scored:
        rows = [next(ahead[rank]) for _ in range(count)]
        wish = sequence.sampling.prompt_logprobs
        lines = tuple((row[1], _top(row, width, wish)) for row in rows)
        if any(row[0] < 0 for row in rows):
            failed.append(sequence.number)
        else:
            scored.append(Scored(sequence.number, first + 1, lines))
    return Outcome(
        step, tuple(sampled), tuple(scored),
        max(head[0] for head in heads.values()), max(head[1] for head in heads.values()),
        tuple(failed), ranks,
    )  # fmt: skip


def _row(token: int, logprob: float, top: Top, width: int) -> list[float]:
    pad = [0.0] * (width - len(top))
    ids = [float(t) for t, _ in top]
    return [float(token), logprob, *ids, *pad, *[value for _, value in top], *pad]


def _top(row: list[float], width: int, wish: int) -> Top:
    """The most likely tokens; under a grammar, those that it allows."""
    count = max(wish, 0)
    pairs = zip(row[2 : 2 + count], row[2 + width : 2 + width + count], strict=True)
    return tuple((int(t), value) for t, value in pairs if value != -math.inf)
