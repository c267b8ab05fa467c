"""What requests keep when ranks go away, where the rest is computed, and who is refused."""

from __future__ import annotations

import pytest

from ds_cp.errors import CapacityError
from ds_cp.sampling_params import SamplingParams
from tests.helpers.cluster import Cluster, greedy, prompt


def done() -> bool:
    return True


def steps(cluster: Cluster, count: int) -> None:
    for _ in range(count):
        assert cluster.step() is not None


def test_what_a_rank_held_is_computed_elsewhere() -> None:
    """What precedes it is kept; the others' requests lose nothing."""
    cluster = Cluster([4, 4, 8], placement="fill_then_spill", depth=2)
    spans = cluster.add(prompt(22), greedy(8))
    steps(cluster, 5)
    ranks = [home[0] for home in spans.table.homes]
    gone = next(rank for rank in ranks if rank)
    kept = ranks.index(gone)
    homes = list(spans.table.homes)
    cluster.die([gone], done, {gone})
    assert spans.table.homes == homes[:kept] and spans.num_computed == kept * 4
    assert gone not in spans.reserved and gone not in spans.workers
    assert cluster.used()[gone] == cluster.cached()[gone] == 0
    local = cluster.add(prompt(9, 2), greedy(3))
    cluster.settle()
    assert cluster.check_outputs() == 2
    assert gone not in spans.ranks_used | local.ranks_used


def test_a_rank_that_is_back_is_used_again() -> None:
    cluster = Cluster([8, 8])
    cluster.die([1], done, {1})
    assert cluster.scheduler.largest_tokens == 32
    with pytest.raises(CapacityError, match="hold 32"):
        cluster.add(prompt(40), greedy(3))
    first, second = (cluster.add(prompt(20, n), greedy(10)) for n in (1, 2))
    steps(cluster, 3)
    assert second.table is None, "it waits"
    cluster.die([1], done, ())
    steps(cluster, 2)
    assert second.table is not None and second.table.last_rank == 1
    cluster.settle()
    assert cluster.check_outputs() == 2 and first.num_preemptions == 0


def test_who_never_fits_now_is_told_with_the_numbers() -> None:
    cluster = Cluster([8, 8])
    large = cluster.ask(prompt(20), SamplingParams(max_tokens=30, temperature=0, n=2))
    small = cluster.add(prompt(9, 2), greedy(5))
    waits = cluster.add(prompt(33, 3), greedy(2))
    steps(cluster, 3)
    assert waits.table is None
    core = cluster.core
    ends, refused = core.recover([1], {1})
    assert not ends and [request_id for request_id, _ in refused] == ["r1", "r3"]
    first, last = (err for _, err in refused)
    assert (first.need, first.largest, last.need) == (49, 32, 34)
    assert "rank 1 is away" in str(first) and "49 tokens" in str(first)
    assert all(request.finish_reason == "error" for request in (*large, waits))
    assert small.finish_reason is None
    cluster.scheduler.check_integrity()
    assert cluster.scheduler.running == [small] and not len(cluster.scheduler.waiting)


def test_an_answer_of_any_length_is_as_long_as_there_is_room() -> None:
    cluster = Cluster([8, 8], max_model_len=60)
    request = cluster.add(prompt(20), SamplingParams(max_tokens=None, temperature=0))
    assert request.max_tokens == 40
    steps(cluster, 3)
    cluster.die([1], done, {1})
    assert request.max_tokens == 13
    steps(cluster, 3)
    cluster.die([], done, ())
    assert request.max_tokens == 40, "it is back before that mattered"
    cluster.die([1], done, {1})
    cluster.settle()
    assert len(request.output) == 13 and request.finish_reason == "length"
    assert cluster.check_outputs() == 1


def test_a_drained_rank_that_was_away_stays_drained() -> None:
    cluster = Cluster([8, 8, 8])
    cluster.scheduler.drain(1)
    cluster.die([1, 2], done, {1, 2})
    stats = cluster.core.stats()
    assert stats.ranks_away == (1, 2) and stats.kv_blocks_total == (8, 0, 0)
    assert [cluster.core.stats().rank_state(rank) for rank in range(3)] == ["open", "away", "away"]
    with pytest.raises(CapacityError):
        cluster.scheduler.drain(0)
    cluster.die([1, 2], done, ())
    states = [cluster.core.stats().rank_state(rank) for rank in range(3)]
    assert states == ["open", "drained", "open"]
    cluster.die([1], done, {1})
    cluster.scheduler.reopen(1)
    assert cluster.scheduler.block_manager.closed == {1}, "it is away still"
    cluster.die([], done, ())
    assert not cluster.scheduler.block_manager.closed


def test_going_and_coming_is_no_requests_fault() -> None:
    cluster = Cluster([8, 8])
    request = cluster.add(prompt(9), greedy(5))
    for away in ({1}, (), {1}, (), {1}, ()):
        cluster.step()
        cluster.die([1] if away else [], done, away)
    cluster.settle()
    assert request.finish_reason == "length" and cluster.check_outputs() == 1
