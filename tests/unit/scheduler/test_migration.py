"""Ranks that are emptied and made level while requests run, on a simulated cluster.

``tests.helpers.cluster`` checks in every step that nothing is lost or read in the wrong place, and
that no block is allocated on a closed rank.
"""

from __future__ import annotations

import random

import pytest

from ds_cp.errors import CapacityError, RequestError
from ds_cp.plan import StepPlan
from ds_cp.scheduler.migration import LOPSIDED, MOVES_PER_STEP
from ds_cp.scheduler.request import Request
from tests.helpers.cluster import MODES, PLACEMENTS, Cluster, greedy, prompt, sampled

LOCAL = ("local", "auto")


def decoding(plan: StepPlan | None) -> set[int]:
    assert plan is not None
    return {number for decodes in plan.decodes for number in decodes.requests}


def ranks_of(request: Request) -> set[int]:
    assert request.table is not None
    return {rank for rank, _ in request.table.homes}


def busy(cluster: Cluster, count: int, length: int = 20, answer: int = 60) -> list[Request]:
    """Requests that decode."""
    asked = [cluster.add(prompt(length, i), sampled(answer)) for i in range(count)]
    while any(r.prefilling for r in asked):
        cluster.step()
    return asked


# --- a rank is drained


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("mode", MODES)
def test_a_drained_rank_ends_empty_and_no_decode_misses_a_token(
    mode: tuple[str, str], placement: str, depth: int
) -> None:
    cluster = Cluster([40, 40, 40], 4, mode=mode, placement=placement, depth=depth)
    decodes = busy(cluster, 5, answer=30)
    rank = max(range(3), key=lambda r: cluster.used()[r])
    had = cluster.used()[rank]
    assert had >= 5
    numbers = {r.number for r in decodes}
    cluster.scheduler.drain(rank)
    assert not cluster.scheduler.is_drained(rank)
    moved, steps = 0, 0
    while not cluster.scheduler.is_drained(rank):
        plan = cluster.step()
        assert decoding(plan) == numbers
        assert plan is not None and plan.transfers
        moved += len(plan.transfers)
        steps += 1
        if mode != LOCAL:
            assert len(plan.transfers) <= MOVES_PER_STEP
    assert had <= moved <= had + 5 and steps <= -(-moved // MOVES_PER_STEP) + 1
    assert cluster.scheduler.migration.num_moved == moved
    assert cluster.core.stats().ranks_drained == (rank,)
    # nothing comes back, and the rank has nothing left to compute for newcomers
    late = [cluster.add(prompt(9, 50 + i), sampled(9)) for i in range(4)]
    before = len(cluster.owned)
    cluster.settle()
    assert all(owned[rank] == 0 for owned in cluster.owned[before:])
    assert all(r.num_preemptions == 0 for r in (*decodes, *late))
    cluster.check_outputs()
    assert cluster.cached()[rank] == 0


def test_a_local_request_stays_local_if_one_rank_can_hold_it() -> None:
    """Twelve blocks: eight in the first step, the rest in the second; whole again then."""
    cluster = Cluster([20, 30, 13], 4)
    filler = cluster.add(prompt(70, 5), greedy(30))
    cluster.step()
    request = cluster.add(prompt(44), greedy(40))
    cluster.step()
    (source,) = ranks_of(request)
    cluster.scheduler.drain(source)
    cluster.step()
    cluster.step()
    assert len(ranks_of(request)) == 1 and ranks_of(request) != {source}
    table = request.table
    assert table is not None
    assert len(table.blocks_on(table.last_rank).extents(table.block_size)) <= 3, (
        "few extents to read"
    )
    assert request.modes == ["local", "tree"], "it spanned for the step between"
    cluster.settle()
    cluster.check_output(filler)
    cluster.check_output(request)


def test_a_request_that_no_rank_can_hold_spans_the_others() -> None:
    cluster = Cluster([12, 7, 7], 4)
    request = cluster.add(prompt(41), greedy(12))
    cluster.step()
    assert ranks_of(request) == {0}
    cluster.scheduler.drain(0)
    while not cluster.scheduler.is_drained(0):
        assert decoding(cluster.step()) == {request.number}
    assert ranks_of(request) == {1, 2}
    cluster.settle()
    cluster.check_outputs()


@pytest.mark.parametrize("depth", [1, 2])
def test_under_mode_local_a_request_moves_whole_in_one_step(depth: int) -> None:
    cluster = Cluster([40, 40], 4, mode=LOCAL, depth=depth)
    decodes = busy(cluster, 2, length=60)
    assert [ranks_of(r) for r in decodes] in ([{0}, {1}], [{1}, {0}])
    cluster.scheduler.drain(0)
    plan = cluster.step()
    assert plan is not None and len(plan.transfers) >= 15 > MOVES_PER_STEP
    assert [ranks_of(r) for r in decodes] == [{1}, {1}]
    assert decoding(plan) == {1, 2}
    cluster.settle()
    assert decodes[0].modes == decodes[1].modes == ["local"]
    cluster.check_outputs()


@pytest.mark.parametrize("mode", MODES[:3])
@pytest.mark.parametrize("depth", [1, 2])
def test_a_prompt_on_its_way_moves_and_goes_on_elsewhere(mode: tuple[str, str], depth: int) -> None:
    cluster = Cluster([40, 40], 4, mode=mode, budget=10, depth=depth)
    request = cluster.add(prompt(75), greedy(3))
    cluster.step()
    cluster.step()
    assert request.prefilling
    rank = max(range(2), key=lambda r: cluster.used()[r])
    cluster.scheduler.drain(rank)
    before = len(cluster.owned)
    cluster.settle()
    assert all(owned[rank] == 0 for owned in cluster.owned[before + 1 :])
    assert request.num_preemptions == 0
    cluster.check_outputs()


@pytest.mark.parametrize("mode", MODES[:3])
def test_shared_blocks_move_and_stay_shared(mode: tuple[str, str]) -> None:
    """Three answers to one prompt: its blocks move once, unless each must be local."""
    cluster = Cluster([40, 40], 4, mode=mode)
    asked = cluster.ask(prompt(33), sampled(30, n=3))
    for _ in range(3):
        cluster.step()
    rank = max(range(2), key=lambda r: cluster.used()[r])
    here = [home for home in asked[0].table.homes[:8] if home[0] == rank]
    assert here and all(cluster.scheduler.allocator.references(home) == 3 for home in here)
    before = sum(cluster.used())
    cluster.scheduler.drain(rank)
    while not cluster.scheduler.is_drained(rank):
        assert decoding(cluster.step()) == {1, 2, 3}
    if mode != LOCAL:
        assert asked[0].table.homes[:8] == asked[1].table.homes[:8] == asked[2].table.homes[:8]
        references = [cluster.scheduler.allocator.references(h) for h in asked[0].table.homes[:8]]
        assert references == [3] * 8
        assert sum(cluster.used()) <= before + 3
    cluster.settle()
    cluster.check_outputs()


def test_what_moved_is_found_and_what_was_only_cached_there_is_forgotten() -> None:
    cluster = Cluster([40, 40], 4, mode=("tree", "auto"))
    cluster.add(prompt(17, 5), greedy(1))
    cluster.settle()
    running = cluster.add(prompt(17, 6), greedy(40))
    cluster.step()
    rank = running.table.last_rank
    assert cluster.cached()[rank] == 4
    cluster.scheduler.drain(rank)
    assert cluster.cached()[rank] == 0
    cluster.step()
    assert cluster.scheduler.is_drained(rank)
    again = [cluster.add(prompt(17, first), greedy(1)) for first in (6, 5)]
    cluster.step()
    assert [r.cached_tokens for r in again] == [16, 0]
    cluster.settle()
    cluster.check_outputs()


@pytest.mark.parametrize("mode", MODES[:3])
@pytest.mark.parametrize("steps", [0, 1, 2])
def test_a_newcomer_finds_what_is_just_leaving(mode: tuple[str, str], steps: int) -> None:
    """The prefix is on a rank that is being emptied, wholly or in part: it is used all the same,
    and no block is allocated there."""
    cluster = Cluster([60, 60], 4, mode=mode)
    running = cluster.add(prompt(97), greedy(20))
    cluster.step()
    rank = max(range(2), key=lambda r: cluster.used()[r])
    cluster.scheduler.drain(rank)
    for _ in range(steps):
        cluster.step()
    late = cluster.add(prompt(97), greedy(9))
    cluster.step()
    assert late.cached_tokens == 96
    if mode[0] != "ring":
        assert ranks_of(late) == {1 - rank}
    cluster.settle()
    assert running.num_preemptions == late.num_preemptions == 0
    cluster.check_outputs()


def test_a_drained_rank_can_be_reopened() -> None:
    cluster = Cluster([20, 20], 4)
    busy(cluster, 2)
    cluster.scheduler.drain(0)
    cluster.step()
    cluster.step()
    assert cluster.scheduler.is_drained(0)
    cluster.scheduler.reopen(0)
    assert not cluster.scheduler.is_drained(0) and cluster.core.stats().ranks_drained == ()
    late = cluster.add(prompt(9, 9), greedy(4))
    cluster.step()
    assert ranks_of(late) == {0}
    cluster.settle()
    cluster.check_outputs()


def test_reopened_halfway() -> None:
    cluster = Cluster([40, 40], 4, mode=("tree", "auto"))
    decodes = busy(cluster, 3, length=50, answer=30)
    had = cluster.used()
    cluster.scheduler.drain(0)
    cluster.step()
    cluster.scheduler.reopen(0)
    plan = cluster.step()
    assert plan is not None and not plan.transfers
    assert had[0] > cluster.used()[0] > 0
    cluster.settle()
    assert all(r.num_preemptions == 0 for r in decodes)
    cluster.check_outputs()


def test_one_rank_after_another() -> None:
    """Each is emptied into the others, round and round, while all requests decode."""
    cluster = Cluster([30, 30, 30], 4, depth=2)
    decodes = busy(cluster, 4, answer=90)
    numbers = {r.number for r in decodes}
    for turn in range(9):
        rank = turn % 3
        cluster.scheduler.drain(rank)
        while not cluster.scheduler.is_drained(rank):
            assert decoding(cluster.step()) == numbers
        cluster.scheduler.reopen(rank)
    assert cluster.scheduler.migration.num_moved > 30
    cluster.settle()
    cluster.check_outputs()


def test_what_could_not_finish_on_the_others_refuses_the_drain() -> None:
    """With the numbers, and nothing is changed; it counts what may come, and waiting requests."""
    cluster = Cluster([6, 6], 4, max_num_seqs=1)
    cluster.add(prompt(5, 9), greedy(3))
    cluster.step()
    waiting = cluster.add(prompt(20), greedy(6))  # 25 tokens
    with pytest.raises(CapacityError, match=waiting.request_id) as caught:
        cluster.scheduler.drain(1)
    assert (caught.value.need, caught.value.largest) == (25, 24)
    assert "25" in str(caught.value) and "24" in str(caught.value)
    assert not cluster.scheduler.block_manager.closed and cluster.scheduler.largest_tokens == 48
    cluster.abort(waiting)
    cluster.scheduler.drain(1)
    assert cluster.scheduler.largest_tokens == 24
    cluster.settle()
    cluster.check_outputs()


def test_under_mode_local_the_largest_other_rank_decides() -> None:
    cluster = Cluster([9, 6, 7], 4, mode=LOCAL)
    cluster.add(prompt(20), greedy(10))  # 29 tokens need 8 blocks
    cluster.step()
    with pytest.raises(CapacityError) as caught:
        cluster.scheduler.drain(0)
    assert (caught.value.need, caught.value.largest) == (29, 28)
    cluster.settle()
    cluster.check_outputs()


def test_newcomers_are_measured_by_what_is_open() -> None:
    cluster = Cluster([6, 6], 4)
    cluster.scheduler.drain(0)
    cluster.scheduler.drain(0)  # again: nothing
    with pytest.raises(CapacityError) as caught:
        cluster.add(prompt(20), greedy(6))
    assert (caught.value.need, caught.value.have, caught.value.largest) == (25, 24, 24)
    assert cluster.add(prompt(20), greedy(None)).max_tokens == 5
    cluster.settle()
    cluster.check_outputs()


@pytest.mark.parametrize("blocks", [[6], [6, 6], [6, 6, 6]])
def test_the_last_open_rank_stays_open(blocks: list[int]) -> None:
    """Also when nothing runs or waits: every request to come would be refused."""
    cluster = Cluster(blocks, 4)
    last = len(blocks) - 1
    for rank in range(last):
        cluster.scheduler.drain(rank)
    with pytest.raises(CapacityError, match="the last open one") as caught:
        cluster.scheduler.drain(last)
    assert (caught.value.need, caught.value.have, caught.value.largest) == (1, 0, 0)
    assert ("reopen another" in str(caught.value)) == (last > 0)
    assert cluster.scheduler.block_manager.closed == set(range(last))
    cluster.add(prompt(9), greedy(3))
    cluster.settle()
    if last:
        cluster.scheduler.reopen(0)
        cluster.scheduler.drain(last)
        cluster.add(prompt(9), greedy(3))
        cluster.settle()
    cluster.check_outputs()


@pytest.mark.parametrize("depth", [1, 2])
def test_a_rank_is_draining_until_the_last_step_that_uses_it_has_ended(depth: int) -> None:
    """The ledger is ahead of the ranks: a move is entered when its step is planned."""
    cluster = Cluster([40, 40], 4, depth=depth)
    busy(cluster, 4, answer=40)
    rank = max(range(2), key=lambda r: cluster.used()[r])
    scheduler = cluster.scheduler

    def state() -> str:
        return cluster.core.stats().rank_state(rank)

    assert state() == "open"
    scheduler.drain(rank)
    assert state() == "draining"
    while not scheduler.is_drained(rank):
        assert state() == "draining"
        cluster.step()
    assert bool(cluster.flying) == (depth == 2)
    if depth == 2:  # the step with the last move is under way
        assert cluster.used()[rank] == 0 and state() == "draining"
        cluster.step()
    assert state() == "drained" and cluster.core.stats().ranks_draining == ()
    scheduler.reopen(rank)
    assert state() == "open"
    cluster.settle()
    scheduler.drain(rank)
    assert state() == "drained"  # at once: nothing is there and nothing runs
    cluster.check_outputs()


@pytest.mark.parametrize("rank", [-1, 2, 99])
def test_there_is_no_such_rank(rank: int) -> None:
    scheduler = Cluster([6, 6], 4).scheduler
    for call in (scheduler.drain, scheduler.reopen):
        with pytest.raises(RequestError, match=f"no context-parallel rank {rank}") as caught:
            call(rank)
        assert caught.value.param == "rank"
    assert not scheduler.block_manager.closed


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("mode", MODES)
def test_when_it_gets_tight_the_youngest_are_preempted(mode: tuple[str, str], depth: int) -> None:
    """Two full ranks become one: all finish, and the oldest is never disturbed."""
    cluster = Cluster([12, 12], 4, mode=mode, depth=depth)
    asked = busy(cluster, 6, length=10, answer=20)
    cluster.scheduler.drain(0)
    cluster.settle()
    assert asked[0].num_preemptions == 0 and cluster.scheduler.num_preemptions > 0
    assert cluster.check_outputs() == 6


@pytest.mark.parametrize("mode", MODES[:3])
def test_a_request_aborted_on_the_way_leaves_nothing(mode: tuple[str, str]) -> None:
    rng = random.Random(4)
    for _ in range(20):
        cluster = Cluster([30, 30], 4, mode=mode, depth=rng.randint(1, 2))
        asked = busy(cluster, 4, length=rng.randint(5, 40), answer=20)
        cluster.scheduler.drain(rng.randint(0, 1))
        for request in rng.sample(asked, 2):
            cluster.step()
            cluster.abort(request)
        cluster.settle()
        assert cluster.check_outputs() >= 2


# --- ranks are made level


def lopsided(cluster: Cluster, count: int = 8, length: int = 20, answer: int = 60) -> list[Request]:
    """Requests on rank 0 alone: those on the others are gone."""
    asked = busy(cluster, count, length, answer)
    staying = []
    for request in asked:
        if ranks_of(request) == {0}:
            staying.append(request)
        else:
            cluster.abort(request)
    assert staying
    return staying


def shares(cluster: Cluster) -> list[float]:
    return [used / blocks for used, blocks in zip(cluster.used(), cluster.blocks, strict=True)]


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("mode", [("auto", "auto"), LOCAL])
def test_levelling_moves_local_requests_whole(mode: tuple[str, str], depth: int) -> None:
    cluster = Cluster([80, 80], 4, mode=mode, depth=depth, prefix_caching=False)
    staying = lopsided(cluster)
    assert len(staying) == 4 and cluster.used()[1] == 0
    used = cluster.used()[0]
    count = cluster.scheduler.rebalance()
    assert 0 < count <= used // 2
    numbers = {r.number for r in staying}
    moved = 0
    for _ in range(count):
        plan = cluster.step()
        assert decoding(plan) == numbers
        moved += len(plan.transfers) if plan else 0
    assert count <= moved <= count + 4, "what grew on the way comes along"
    assert sorted(map(len, map(ranks_of, staying))) == [1, 1, 1, 1]
    assert sum(ranks_of(r) == {0} for r in staying) == 2
    assert abs(shares(cluster)[0] - shares(cluster)[1]) <= LOPSIDED
    assert cluster.scheduler.rebalance() == 0, "level is level"
    cluster.settle()
    assert all(r.num_preemptions == 0 for r in staying)
    cluster.check_outputs()


def test_levelling_takes_a_part_of_what_spans() -> None:
    """A request over both ranks, most of it on one: blocks move until the shares are level."""
    cluster = Cluster([20, 40], 4, mode=("tree", "auto"))
    request = cluster.add(prompt(170), greedy(30))
    cluster.step()
    assert cluster.used() == [3, 40]
    count = cluster.scheduler.rebalance()
    assert count == 11, "14 / 20 and 29 / 40"
    for moved in (MOVES_PER_STEP, count - MOVES_PER_STEP, 0):
        plan = cluster.step()
        assert plan is not None and len(plan.transfers) == moved
        assert decoding(plan) == {request.number}
    assert cluster.scheduler.rebalance() == 0
    cluster.settle()
    cluster.check_outputs()
    assert cluster.scheduler.rebalance() == 0, "nothing runs"


def test_levelling_goes_by_share_of_the_ranks_blocks() -> None:
    cluster = Cluster([30, 90], 4, mode=("tree", "auto"), placement="round_robin")
    request = cluster.add(prompt(120), greedy(50))
    cluster.step()
    assert shares(cluster)[0] > shares(cluster)[1] + LOPSIDED
    before = max(shares(cluster))
    count = cluster.scheduler.rebalance()
    for _ in range(-(-count // MOVES_PER_STEP)):
        cluster.step()
    assert max(shares(cluster)) < before
    assert abs(shares(cluster)[0] - shares(cluster)[1]) <= LOPSIDED
    cluster.settle()
    cluster.check_output(request)


def test_a_small_difference_is_left_alone() -> None:
    cluster = Cluster([100, 100], 4)
    cluster.add(prompt(36), greedy(4))
    cluster.step()
    assert max(shares(cluster)) <= LOPSIDED
    assert cluster.scheduler.rebalance() == 0
    cluster.settle()


def test_a_request_too_big_to_help_stays() -> None:
    """Moved whole it would only make the other rank the full one."""
    cluster = Cluster([40, 40], 4)
    request = cluster.add(prompt(100), greedy(4))
    cluster.step()
    assert cluster.scheduler.rebalance() == 0
    assert len(ranks_of(request)) == 1
    cluster.settle()


@pytest.mark.parametrize("mode", [("auto", "auto"), LOCAL])
def test_a_local_prompt_on_its_way_stays_where_its_work_is(mode: tuple[str, str]) -> None:
    """Its blocks, the rest reserved for it and the rank that computes belong together."""
    cluster = Cluster([40, 40], 4, mode=mode, budget=20, prefix_caching=False)
    request = cluster.add(prompt(60), sampled(20))
    cluster.step()
    assert request.prefilling and cluster.scheduler.rebalance() == 0
    other = cluster.add(prompt(20, 2), sampled(20))
    while request.prefilling or other.prefilling:
        cluster.step()
    before = ranks_of(request) | ranks_of(other)
    cluster.abort(other)
    cluster.scheduler._preempt(request)
    cluster.settle()
    assert before == {0, 1} and request.modes == ["local"]
    cluster.check_output(request)


@pytest.mark.parametrize("mode", MODES[:3])
@pytest.mark.parametrize("what", ["abort", "preempt", "drain"])
def test_a_move_that_became_impossible_is_dropped(mode: tuple[str, str], what: str) -> None:
    cluster = Cluster([80, 80], 4, mode=mode, prefix_caching=False)
    asked = busy(cluster, 8)
    for request in asked[::2]:
        cluster.abort(request)
    cluster.scheduler.rebalance()
    for request in asked[1::2]:
        if what == "abort":
            cluster.abort(request)
        elif what == "preempt":
            cluster.scheduler._preempt(request)
    if what == "drain":
        cluster.scheduler.drain(1)
    cluster.settle()
    cluster.add(prompt(3, 99), greedy(1))
    cluster.settle()
    assert cluster.scheduler.migration.is_moving == (what == "drain")
    cluster.check_outputs()


def test_levelling_never_loses_anything_whatever_else_happens() -> None:
    for seed in range(30):
        rng = random.Random(seed)
        cluster = Cluster(
            [rng.randint(10, 40) for _ in range(3)], 4, mode=rng.choice(MODES),
            placement=rng.choice(PLACEMENTS), depth=rng.randint(1, 2),
        )  # fmt: skip
        for i in range(12):
            cluster.ask(prompt(rng.randint(1, 30), i % 4), sampled(20, n=rng.randint(1, 2)))
            for _ in range(rng.randint(0, 3)):
                cluster.step()
            if rng.random() < 0.6:
                assert cluster.scheduler.rebalance() >= 0
        cluster.settle()
        cluster.check_outputs()


# --- spans that are needed no more


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_span_that_is_needed_no_more_ends(placement: str, depth: int) -> None:
    """Two prompts that only rank 1 can hold grow until it is full; then one of them ends."""
    cluster = Cluster([12, 32], 4, placement=placement, depth=depth, prefix_caching=False)
    leaving, staying = (
        cluster.add(prompt(52, 1), sampled(18)),
        cluster.add(prompt(52, 2), sampled(60)),
    )
    for _ in range(30):
        cluster.step()
        if leaving.finish_reason:
            break
    assert staying.table is not None and staying.table.span == (0, 1)
    count = cluster.scheduler.rebalance()
    assert 0 < count <= 4
    for _ in range(2 + depth):
        assert staying.number in decoding(cluster.step())
    assert staying.table.span == (1,) and staying.decode_key == ("local", "kv")
    cluster.settle()
    assert staying.num_preemptions == 0
    cluster.check_outputs()


@pytest.mark.parametrize(
    ("mode", "threshold"),
    [(("tree", "auto"), None), (("ring", "auto"), None), (("auto", "auto"), 20)],
)
def test_a_span_that_is_wanted_stays(mode: tuple[str, str], threshold: int | None) -> None:
    """A mode that is forced, or a request longer than what may be local."""
    cluster = Cluster([40, 40], 4, mode=mode, local_threshold=threshold, placement="round_robin")
    request = cluster.add(prompt(60), sampled(20))
    cluster.step()
    assert request.table is not None and request.table.width == 2
    assert cluster.scheduler.rebalance() == 0
    cluster.settle()
    cluster.check_outputs()


# --- what moves stays adjacent


def perforated(blocks: list[int], **more: object) -> Cluster:
    """Ranks with 20 short free runs each before a long one, as after hours of short requests.
    What runs there opens no block in the next 14 steps."""
    cluster = Cluster(blocks, 16, prefix_caching=False, max_num_seqs=200, **more)  # type: ignore[arg-type]
    short = [cluster.add(prompt(17, i), greedy(400)) for i in range(40 * len(blocks))]
    cluster.step()
    for request in short:
        assert request.table is not None and not request.prefilling
        if request.table.homes[0][1] % 4 == 0:
            cluster.abort(request)
    return cluster


def free_runs(cluster: Cluster, rank: int) -> list[int]:
    """Lengths of the runs of blocks that no request holds."""
    allocator = cluster.scheduler.allocator
    free = [not allocator.references((rank, b)) for b in range(cluster.blocks[rank])]
    return [len(run) for run in "".join("x" if f else "." for f in free).split(".") if run]


def fewest(runs: list[int], count: int) -> int:
    """How many of these free runs it takes at least to hold ``count`` blocks."""
    taken = 0
    for length in sorted(runs, reverse=True):
        if count > 0:
            count, taken = count - length, taken + 1
    assert count <= 0
    return taken


def extents(request: Request, rank: int) -> int:
    assert request.table is not None
    return len(request.table.blocks_on(rank).extents(request.table.block_size))


def abort_all(cluster: Cluster) -> None:
    for life in cluster.lives.values():
        if life.reason is None and not life.aborted:
            cluster.abort(life.request)
    cluster.settle()


def spanning(cluster: Cluster) -> tuple[Request, int]:
    """A request of 70 blocks on one rank and 30 on the other, and the rank of the 70, on which
    everything else has ended but a few short requests."""
    blockers = [cluster.add(prompt(16 * 50, 97 + i), greedy(1000)) for i in range(2)]
    request = cluster.add(prompt(16 * 100 - 4, 99), greedy(1000))
    cluster.step()
    table = request.table
    assert table is not None and not request.prefilling
    assert sorted(map(ranks_of, blockers), key=min) == [{0}, {1}]
    target = max((0, 1), key=table.num_blocks)
    assert [table.num_blocks(target), table.num_blocks(1 - target)] == [70, 30]
    for life in cluster.lives.values():
        other = life.request
        if other is not request and not life.aborted and target in ranks_of(other):
            if other in blockers or other.table.homes[0][1] % 8:
                cluster.abort(other)
    return request, target


@pytest.mark.parametrize("depth", [1, 2])
def test_a_gathered_request_has_few_extents(depth: int) -> None:
    """Each block went alone to the shortest free run, which made fifty extents of two."""
    cluster = perforated([160, 160], depth=depth)
    request, target = spanning(cluster)
    table = request.table
    assert table is not None
    before, runs = extents(request, target), free_runs(cluster, target)
    assert len(runs) >= 10
    assert cluster.scheduler.rebalance() >= 30
    steps = 0
    while table.width == 2:
        cluster.step()
        steps += 1
    assert table.span == (target,) and steps <= 5
    # one more where the gathered blocks come between two of the request's own
    assert extents(request, target) <= before + fewest(runs, 30) + 1
    abort_all(cluster)


def test_a_part_that_is_levelled_stays_adjacent() -> None:
    cluster = perforated([160, 160], mode=("tree", "auto"))
    request, roomy = spanning(cluster)
    table = request.table
    assert table is not None
    before, runs, had = extents(request, roomy), free_runs(cluster, roomy), table.num_blocks(roomy)
    assert cluster.scheduler.rebalance() >= 16
    while cluster.scheduler.migration.is_moving:
        cluster.step()
    count = table.num_blocks(roomy) - had
    assert count >= 16 and len(runs) >= 10
    assert extents(request, roomy) <= before + fewest(runs, count) + 1
    abort_all(cluster)


def leave_alone(cluster: Cluster, request: Request) -> None:
    """End all others on the request's rank."""
    for life in cluster.lives.values():
        if life.request is not request and not life.aborted:
            if ranks_of(life.request) & ranks_of(request):
                cluster.abort(life.request)


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("mode", MODES)
def test_a_drained_request_has_few_extents(mode: tuple[str, str], depth: int) -> None:
    cluster = perforated([160, 160], mode=mode, depth=depth)
    request = cluster.add(prompt(16 * 30, 99), greedy(100))
    cluster.step()
    assert ranks_of(request) == {0} and not request.prefilling
    leave_alone(cluster, request)
    assert len(free_runs(cluster, 1)) == 21
    cluster.scheduler.drain(0)
    while not cluster.scheduler.is_drained(0):
        cluster.step()
    assert (ranks_of(request), extents(request, 1)) == ({1}, 1)
    abort_all(cluster)


@pytest.mark.parametrize("depth", [1, 2])
def test_a_drained_prompt_has_few_extents(depth: int) -> None:
    """The blocks that it has, and those reserved for the rest of it, are one run elsewhere."""
    cluster = perforated([160, 160], depth=depth, budget=900)
    request = cluster.add(prompt(16 * 78, 99), greedy(100))
    cluster.step()
    assert ranks_of(request) == {0} and 800 < request.num_computed < 1200
    leave_alone(cluster, request)
    cluster.scheduler.drain(0)
    while request.prefilling or 0 in ranks_of(request):
        cluster.step()
    assert (ranks_of(request), extents(request, 1)) == ({1}, 1)
    abort_all(cluster)


@pytest.mark.parametrize("how", ["abort", "preempt", "reopen", "drain the target"])
def test_reserved_homes_are_given_back(how: str) -> None:
    """Twenty blocks are to move, eight have: then something else happens. ``Cluster`` checks after
    each step that every reference has a holder."""
    cluster = Cluster([60, 60, 60], 4, mode=("tree", "auto"))
    request = cluster.add(prompt(80), greedy(30))
    cluster.step()
    (source,) = ranks_of(request)
    cluster.scheduler.drain(source)
    cluster.step()
    assert len(request.moving) == 12 and sum(cluster.used()) == 21 + 12
    if how == "abort":
        cluster.abort(request)
    elif how == "preempt":
        cluster.scheduler._preempt(request)
    elif how == "reopen":
        cluster.scheduler.reopen(source)
    else:
        cluster.scheduler.reopen(source)
        (target,) = ranks_of(request) - {source}
        cluster.scheduler.drain(target)
    cluster.step()
    assert not [i for i, (home, _) in request.moving.items() if how != "drain the target"]
    cluster.settle()
    cluster.check_outputs()
    assert cluster.used() == [0, 0, 0]
