"""What ranks send to rank 0 after a step: drawn tokens and scored prompts, as rows of fp64.

A row is ``[token, logprob, ids of the best .., their logprobs ..]``. All rows of a step have the
width of the one that wants the most alternatives, which every rank knows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ds_cp.plan import Sampled, Scored
from ds_cp.worker.state import StepWork

Top = tuple[tuple[int, float], ...]


def width_of(work: StepWork) -> int:
    """The number of alternatives that a row of this step has room for."""
    wishes = [draw.sequence.sampling.logprobs for draw in work.draws]
    wishes += [stretch[0].sampling.prompt_logprobs for stretch in work.scored]
    return max(0, *wishes) if wishes else 0


def rows_of(work: StepWork, rank: int) -> int:
    """The number of rows that ``rank`` sends."""
    return sum(draw.rank == rank for draw in work.draws) + sum(
        count for _, _, count, owner in work.scored if owner == rank
    )


def pack(drawn: Sequence[Sampled], scored: Sequence[tuple[float, Top]], width: int) -> torch.Tensor:
    """My rows, ``[rows, 2 + 2 width]``: of the draws, then of the scored tokens."""
    rows = [_row(s.token, s.logprob, s.top, width) for s in drawn]
    rows += [_row(0, logprob, top, width) for logprob, top in scored]
    return torch.tensor(rows, dtype=torch.float64).view(len(rows), 2 + 2 * width)


def unpack(
    work: StepWork, width: int, rows_by_rank: dict[int, list[list[float]]]
) -> tuple[tuple[Sampled, ...], tuple[Scored, ...]]:
    """The rows of all ranks in the order of the plan."""
    ahead = {rank: iter(rows) for rank, rows in rows_by_rank.items()}
    sampled = []
    for draw in work.draws:
        row = next(ahead[draw.rank])
        top = _top(row, width, draw.sequence.sampling.logprobs)
        sampled.append(Sampled(draw.sequence.number, int(row[0]), row[1], top))
    scored = []
    for sequence, first, count, rank in work.scored:
        rows = [next(ahead[rank]) for _ in range(count)]
        wish = sequence.sampling.prompt_logprobs
        lines = tuple((row[1], _top(row, width, wish)) for row in rows)
        scored.append(Scored(sequence.number, first + 1, lines))
    return tuple(sampled), tuple(scored)


def _row(token: int, logprob: float, top: Top, width: int) -> list[float]:
    pad = [0.0] * (width - len(top))
    ids = [float(t) for t, _ in top]
    return [float(token), logprob, *ids, *pad, *[value for _, value in top], *pad]


def _top(row: list[float], width: int, wish: int) -> Top:
    count = max(wish, 0)
    ids, values = row[2 : 2 + width], row[2 + width :]
    return tuple((int(t), value) for t, value in zip(ids[:count], values[:count], strict=True))
