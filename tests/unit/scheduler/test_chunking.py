"""Prompts of one step dealt out together: attention is level over the ranks, query by query."""

from __future__ import annotations

import math
import random

import pytest

from ds_cp.cost import LayerWindows
from ds_cp.kv.table import SequenceTable
from ds_cp.layout import Runs, positions
from ds_cp.sampling_params import SamplingParams
from ds_cp.scheduler.chunking import cut_chunk
from ds_cp.scheduler.draft import Draft
from ds_cp.scheduler.mode_policy import ModePolicy
from ds_cp.scheduler.request import Request

SIZE = 16


LAYERS = LayerWindows(6, ((64, 3), (512, 2)))


def seen(q_runs: Runs, layers: LayerWindows) -> float:
    """Pairs of a query and a key, query by query: the mean over the layers."""
    found = [window for window, count in layers.windows for _ in range(count)]
    found += [10**9] * (layers.num_layers - len(found))
    each = [sum(min(p + 1, window) for p in positions(q_runs)) for window in found]
    return sum(each) / len(each)


def busiest(
    ranks: int, prompts: int, seed: int, layers: LayerWindows, known: LayerWindows | None = None
) -> float:
    """Largest over mean of the pairs that the ranks attend in a step of ``prompts`` whole prompts
    of log-uniform lengths, counted query by query. ``known``: the layers as the scheduler has
    them."""
    rng = random.Random(seed)
    known = known or layers
    policy = ModePolicy("ring", "kv", None, 1, 4, 2, windows=known)
    draft = Draft(1, [10**9] * ranks, None)
    attended = [0.0] * ranks
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
            attended[rank] += seen(runs, layers)
    if known == layers:
        assert draft.pairs == pytest.approx(attended, rel=1e-12)
    return max(attended) * ranks / sum(attended)


@pytest.mark.parametrize(("ranks", "prompts"), [(2, 8), (2, 24), (4, 24), (8, 24)])
def test_the_busiest_rank_of_a_step_has_little_more_than_the_mean(ranks: int, prompts: int) -> None:
    """Each prompt by itself is off by some percent; together they are level."""
    assert max(busiest(ranks, prompts, seed, LayerWindows()) for seed in range(24)) <= 1.02


def test_a_step_is_level_by_what_windowed_layers_see_too() -> None:
    """By causal pairs alone the busiest rank would be further from the mean."""
    both = [
        (busiest(2, 12, seed, LAYERS), busiest(2, 12, seed, LAYERS, LayerWindows()))
        for seed in range(6)
    ]
    assert max(mine for mine, _ in both) <= 1.01 < max(blind for _, blind in both)


@pytest.mark.parametrize("layers", [LayerWindows(), LayerWindows(4), LAYERS])
def test_pairs_of_a_chunk_behind_a_prefix(layers: LayerWindows) -> None:
    """Against the pairs with every key there is, counted one by one."""
    for runs in (((0, 7),), ((5, 3), (20, 4)), ((60, 10), (500, 30), (900, 3)), ()):
        assert layers.pairs(runs) == pytest.approx(seen(runs, layers))
    for tokens in (0, 1, 63, 64, 65, 2000):
        assert layers.seen(tokens) == pytest.approx(seen(((tokens - 1, 1),), layers) * (tokens > 0))
