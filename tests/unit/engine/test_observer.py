"""The live picture: what it says of a simulated cluster, and that its size is bounded."""

from __future__ import annotations

import random
import threading
from contextlib import nullcontext

import msgspec
import pytest

from ds_cp.engine.kv_map import MAX_RUNS, cell_count, draw_pool, owners_of
from ds_cp.engine.observer import Observer
from ds_cp.engine.picture import (
    CACHED,
    CELLS,
    FREE,
    MAX_CELLS,
    MAX_RANKS,
    MAX_RECENT,
    MAX_RUNNING,
    MAX_WAITING,
    OTHER,
    RESERVED,
    SHARED,
    Picture,
)
from tests.helpers.cluster import Cluster, greedy, prompt


def observed(cluster: Cluster) -> Picture:
    ranks = len(cluster.scheduler.allocator.blocks_per_rank)
    hosts = [f"host{rank // 2}" for rank in range(ranks)]
    return Observer(cluster.core, hosts, nullcontext()).picture(1.5, {"tree": (700, 3)})


def cells_of(picture: Picture, rank: int) -> list[int]:
    return [what for what, count in picture.ranks[rank].cells for _ in range(count)]


def test_every_block_of_a_small_pool_is_a_cell_of_its_own() -> None:
    cluster = Cluster([10, 6], 4)
    long = cluster.add(prompt(44), greedy(4))  # no rank holds its 11 blocks
    cluster.step()
    cluster.step()
    picture = observed(cluster)
    assert [(r.rank, r.host, r.state, r.total) for r in picture.ranks] == [
        (0, "host0", "open", 10), (1, "host0", "open", 6),
    ]  # fmt: skip
    assert long.table is not None
    for rank, shown in enumerate(picture.ranks):
        cells = cells_of(picture, rank)
        assert len(cells) == shown.total and shown.blocks_per_cell == 1.0
        mine = {block for home, block in long.table.homes if home == rank}
        assert {at for at, what in enumerate(cells) if what == 0} == mine
        assert cells.count(FREE) == shown.total - shown.used - shown.cached
    (request,) = picture.requests
    assert request.ranks == (0, 1) and request.blocks == len(long.table.homes)
    assert request.span_reason == "no_room" and "no single rank has room" in request.why
    assert picture.counters.comm_bytes == {"tree": 700}
    assert picture.counters.comm_exchanges == {"tree": 3}
    assert picture.ring_order == (0, 1) and picture.num_ranks == 2 and picture.block_size == 4


def test_a_request_from_the_queue_to_its_end() -> None:
    cluster = Cluster([40], 4, budget=8, max_num_seqs=1)
    first, second = (cluster.add(prompt(30, i), greedy(3)) for i in (1, 2))
    waiting = observed(cluster)
    assert [r.phase for r in waiting.requests] == ["waiting", "waiting"]
    assert waiting.num_waiting == 2 and waiting.requests[0].why == ""
    assert waiting.requests[0].mode is None and not waiting.requests[0].working
    cluster.step()
    started = observed(cluster).requests[0]
    assert (started.phase, started.mode, started.computed) == ("prefill", "local", 8)
    assert (started.to_compute, started.prompt_tokens) == (30, 30)
    assert started.owner is None and started.ttft_s is None and started.mode_reason == "one_rank"
    assert observed(cluster).counters.prefill_tokens == 8
    kinds = set(cells_of(observed(cluster), 0))
    assert kinds == {0, RESERVED, FREE}, "computed, held for the rest of the prompt, free"
    while len(first.output) < 2:
        cluster.step()
    now = observed(cluster).requests[0]
    assert (now.phase, now.new_tokens) == ("decode", 2)
    assert now.ttft_s is not None and now.tpot_s is not None and now.owner == 0
    cluster.settle()
    ended = observed(cluster)
    assert ended.requests == () and [e.prompt_tokens for e in ended.recent] == [30, 30]
    assert all(e.finish_reason == "length" and e.new_tokens == 3 for e in ended.recent)
    assert ended.counters.prefill_tokens == 60 and second.finish_reason == "length"
    assert set(cells_of(ended, 0)) == {CACHED, FREE}
    assert cells_of(ended, 0).count(CACHED) == ended.ranks[0].cached > 0


def test_a_step_in_flight_is_at_work() -> None:
    cluster = Cluster([40], 4)
    request = cluster.add(prompt(6), greedy(3))
    assert cluster.core.plan() is not None
    assert [r.working for r in observed(cluster).requests] == [True]
    assert request.num_computed == 6


def test_answers_that_share_their_prompt() -> None:
    cluster = Cluster([40], 4)
    cluster.add(prompt(16), greedy(6, n=3))
    cluster.step()
    cluster.step()
    picture = observed(cluster)
    assert [(r.index, r.id) for r in picture.requests] == [
        (i, picture.requests[0].id) for i in range(3)
    ]
    assert cells_of(picture, 0).count(SHARED) == 3, "all full blocks of the prompt but the last"


def test_a_rank_that_is_drained() -> None:
    cluster = Cluster([20, 20], 4)
    cluster.scheduler.drain(1)
    assert [r.state for r in observed(cluster).ranks] == ["open", "drained"]


def test_no_text_and_no_token_is_in_it() -> None:
    cluster = Cluster([40], 4, budget=1000)
    tokens = [991, 992, 993, 994, 995, 996, 997, 998] * 2
    cluster.add(tokens, greedy(8))
    for _ in range(4):
        cluster.step()
    encoded = msgspec.json.encode(observed(cluster))
    assert not any(str(token).encode() in encoded for token in tokens)


@pytest.mark.parametrize(("ranks", "blocks"), [(1, 100_000), (8, 20_000), (300, 500)])
def test_its_size_is_bounded(ranks: int, blocks: int) -> None:
    cluster = Cluster([blocks] * ranks, 4, budget=10**6, max_num_seqs=100)
    seen = random.Random(5)
    for i in range(140):
        cluster.add(prompt(seen.randrange(40, 400), i), greedy(2))
    assert cluster.core.plan() is not None
    picture = observed(cluster)
    assert len(picture.ranks) == min(ranks, MAX_RANKS) and picture.num_ranks == ranks
    listed = [r.phase for r in picture.requests]
    assert listed.count("waiting") == MAX_WAITING and picture.num_waiting == 40
    assert len(listed) == MAX_RUNNING + MAX_WAITING and picture.num_running == 100
    cells = [sum(count for _, count in rank.cells) for rank in picture.ranks]
    assert set(cells) == {cell_count(blocks, ranks)} and sum(cells) <= MAX_CELLS
    assert len(msgspec.json.encode(picture)) < 300_000
    if blocks == 500:  # each request on a rank of its own, in order
        assert any(OTHER in cells_of(picture, rank) for rank in range(MAX_RANKS))


def test_recent_ones_are_few() -> None:
    cluster = Cluster([40], 4)
    for i in range(MAX_RECENT + 5):
        cluster.add(prompt(4, i), greedy(1))
    cluster.settle()
    assert len(observed(cluster).recent) == MAX_RECENT


def test_the_lock_is_held_for_the_look_alone() -> None:
    cluster = Cluster([40], 4)
    lock = threading.Lock()
    Observer(cluster.core, ["here"], lock).picture()
    assert not lock.locked()


# --- the map of one pool


def test_cells_cover_the_pool() -> None:
    for total in (0, 1, 7, 255, 256, 257, 1000, 99_991):
        count = cell_count(total, 1)
        cells = draw_pool(total, count, [(0, total)] if total else [], {}, 1)
        assert cells == (((FREE, count),) if total else ())
    assert cell_count(10**6, 1) == CELLS[-1] and cell_count(10**6, 10**4) == CELLS[0]
    assert cell_count(3, 10**4) == 3


def test_the_most_frequent_wins_a_cell() -> None:
    owners = {block: 4 for block in range(100, 300)} | {block: 5 for block in range(300, 900)}
    cells = draw_pool(1000, 10, [(950, 50)], owners, 1)
    assert cells == ((CACHED, 1), (4, 2), (5, 6), (FREE, 1))


def test_a_sample_of_the_blocks_draws_the_same_map() -> None:
    """A long request is drawn from each 13th of its blocks."""
    whole = dict.fromkeys(range(20_000, 70_000), 0)
    free = [(0, 20_000), (90_000, 10_000)]
    exact = draw_pool(100_000, 256, free, whole, 1)
    sample = draw_pool(100_000, 256, free, {b: 0 for b in list(whole)[::13]}, 13)
    assert [what for what, _ in exact] == [FREE, 0, CACHED, FREE] == [what for what, _ in sample]
    assert all(abs(a - b) <= 1 for (_, a), (_, b) in zip(exact, sample, strict=True))


def test_very_many_free_runs() -> None:
    """Each other block is cached: a tenth of the runs tells as much."""
    runs = [(block, 1) for block in range(0, 100_000, 2)]
    assert len(runs) > 10 * MAX_RUNS
    cells = draw_pool(100_000, 256, runs, {}, 1)
    assert sum(count for _, count in cells) == 256 and {what for what, _ in cells} <= {FREE, CACHED}


def test_a_block_of_two_is_shared() -> None:
    assert owners_of([(0, [(0, 1), (0, 2)]), (1, [(0, 2), (1, 2)])]) == {
        (0, 1): 0, (0, 2): SHARED, (1, 2): 1,
    }  # fmt: skip
