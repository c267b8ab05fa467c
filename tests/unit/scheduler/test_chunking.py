"""Prompts of one step dealt out together: attention is level over the ranks, query by query."""

from __future__ import annotations

import math
import random

import pytest

from ds_cp.kv.table import SequenceTable
from ds_cp.layout import causal_pairs, causal_work, positions
from ds_cp.sampling_params import SamplingParams
from ds_cp.scheduler.chunking import cut_chunk
from ds_cp.scheduler.draft import Draft
from ds_cp.scheduler.mode_policy import ModePolicy
from ds_cp.scheduler.request import Request

SIZE = 16


def busiest(ranks: int, prompts: int, seed: int) -> float:
    """Largest over mean of the pairs that the ranks attend in a step of ``prompts`` whole prompts
    of log-uniform lengths, counted query by query."""
    rng = random.Random(seed)
    draft, policy = Draft(1, [10**9] * ranks, None), ModePolicy("ring", "kv", None, 1, 4, 2)
    attended = [0] * ranks
    for number in range(prompts):
        length = int(math.exp(rng.uniform(math.log(32), math.log(8192))))
        request = Request(number, f"r{number}", (1,) * length, SamplingParams(), 1, 0)
        request.table, request.workers = SequenceTable(SIZE), tuple(range(ranks))
        blocks = -(-length // SIZE)
        request.reserved = {
            rank: list(range(blocks // ranks + (rank < blocks % ranks))) for rank in range(ranks)
        }
        request.reserved = {rank: some for rank, some in request.reserved.items() if some}
        cut = cut_chunk(request, draft.left, "zigzag", policy, None, draft.pairs)
        assert cut is not None and sum(cut.owned) == length
        draft.chunk(cut, 0)
        for rank, runs in cut.chunk.owners:
            attended[rank] += sum(p + 1 for p in positions(runs))
    assert draft.pairs == attended
    return max(attended) * ranks / sum(attended)


@pytest.mark.parametrize(("ranks", "prompts"), [(2, 8), (2, 24), (4, 24), (8, 24)])
def test_the_busiest_rank_of_a_step_has_little_more_than_the_mean(ranks: int, prompts: int) -> None:
    """Each prompt by itself is off by some percent; together they are level."""
    assert max(busiest(ranks, prompts, seed) for seed in range(24)) <= 1.02


def test_pairs_of_a_chunk_behind_a_prefix() -> None:
    """Against the pairs with every key there is."""
    for runs in (((0, 7),), ((5, 3), (20, 4)), ()):
        end = max((s + n for s, n in runs), default=0)
        assert causal_pairs(runs) == causal_work(runs, ((0, end),))
