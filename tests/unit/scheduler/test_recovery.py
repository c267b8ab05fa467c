"""What requests keep when ranks lose their workers, and what is computed again."""

from __future__ import annotations

import pytest

from ds_cp.scheduler import forgotten
from tests.helpers.cluster import Cluster, greedy, prompt, sampled


def done() -> bool:
    return True


def not_done() -> bool:
    return False


def steps(cluster: Cluster, count: int) -> None:
    for _ in range(count):
        assert cluster.step() is not None


def computed(cluster: Cluster, number: int) -> int:
    """Tokens of a request that the next steps compute, up to its next token."""
    request = cluster.lives[number].request
    return request.num_tokens - request.num_computed


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("is_done", [done, not_done])
def test_a_local_request_elsewhere_loses_nothing(depth: int, is_done: object) -> None:
    cluster = Cluster([8, 8], depth=depth)
    here = cluster.add(prompt(9), greedy(12))
    there = cluster.add(prompt(9, 2), greedy(12))
    steps(cluster, 5)
    rank = here.table.last_rank
    assert {rank, there.table.last_rank} == {0, 1}
    homes = list(here.table.homes)
    cluster.die([1 - rank], is_done)  # type: ignore[arg-type]
    # All that was confirmed is there: one known token is not stored yet, the newest.
    assert computed(cluster, here.number) == 1
    assert here.table.homes == homes[: len(here.table.homes)]
    assert there.num_computed == 0 and not there.table.homes
    assert there.reserved.keys() == {1 - rank}
    cluster.settle()
    assert cluster.check_outputs() == 2


def test_a_spanning_request_keeps_what_precedes_the_first_lost_block() -> None:
    cluster = Cluster([4, 4, 4], placement="fill_then_spill", depth=2)
    request = cluster.add(prompt(22), greedy(20))
    steps(cluster, 6)
    ranks = [home[0] for home in request.table.homes]
    lost = ranks[2]
    first = ranks.index(lost)
    held = set(request.table.homes)
    cluster.die([lost], done)
    assert request.num_computed == first * 4
    again = {(rank, block) for rank, blocks in request.reserved.items() for block in blocks}
    assert {*request.table.homes, *again} <= held, "other blocks than before"
    cluster.settle()
    assert cluster.check_outputs() == 1


def test_prefixes_of_a_lost_rank_are_not_found() -> None:
    cluster = Cluster([8, 8])
    for first in (1, 2):
        cluster.add(prompt(12, first), greedy(2))
    cluster.settle()
    kept = {first: cluster.add(prompt(12, first), greedy(2)) for first in (1, 2)}
    steps(cluster, 1)
    ranks = {first: request.table.homes[0][0] for first, request in kept.items()}
    assert {request.cached_tokens for request in kept.values()} == {8}
    cluster.settle()
    cluster.die([ranks[1]], done)
    assert cluster.cached()[ranks[1]] == 0 < cluster.cached()[ranks[2]]
    again = {first: cluster.add(prompt(12, first), greedy(2)) for first in (1, 2)}
    cluster.settle()
    assert [request.cached_tokens for request in again.values()] == [0, 8]
    assert cluster.check_outputs() == 6


def test_a_prefix_whose_step_was_not_reported_is_not_found() -> None:
    """It was entered when the step was planned."""
    cluster = Cluster([16], depth=2)
    request = cluster.add(prompt(12), greedy(4))
    cluster.core.plan()  # and nobody has run it
    assert cluster.scheduler.num_in_flight == 1
    cluster.scheduler.recover([])
    assert request.num_computed == 0
    other = cluster.add(prompt(12), greedy(4))
    assert cluster.scheduler.block_manager.prefix.find(other) == []


@pytest.mark.parametrize("is_done", [done, not_done])
@pytest.mark.parametrize("after", range(1, 6))
@pytest.mark.parametrize("length", [8, 9, 10])
def test_answers_that_share_a_prompt(length: int, after: int, is_done: object) -> None:
    """Their shared last block is written by one of them: the others have copies, wherever the
    interruption comes."""
    for lost in ([], [0], [1]):
        cluster = Cluster([12, 12], depth=2)
        cluster.add(prompt(length), sampled(6, n=3, presence_penalty=0.5))
        steps(cluster, after)
        cluster.die(lost, is_done)  # type: ignore[arg-type]
        cluster.settle()
        assert cluster.check_outputs() == 3


def test_preempted_with_a_draw_under_way() -> None:
    cluster = Cluster([5], depth=3)
    requests = [cluster.add(prompt(7, first), greedy(12)) for first in (1, 2)]
    steps(cluster, 3)
    assert requests[1].table is None and requests[1].in_flight
    cluster.die([], not_done)
    assert [request.in_flight for request in requests] == [0, 0]
    cluster.settle()
    assert cluster.check_outputs() == 2


def test_the_ranks_are_told_in_several_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that they forgot may be more than one plan may hold."""
    cluster = Cluster([40, 40])
    for first in range(1, 7):
        cluster.add(prompt(20, first), sampled(10, presence_penalty=0.5))
    steps(cluster, 4)
    monkeypatch.setattr(forgotten, "BEGIN_BYTES", 1000)
    cluster.die([0], done)
    plans = cluster.settle()
    assert len([plan for plan in plans if plan.begins and not plan.chunks]) >= 1
    assert cluster.check_outputs() == 6


def test_an_interruption_on_the_way_back() -> None:
    cluster = Cluster([26, 26], depth=2)
    for first in (1, 2):
        cluster.add(prompt(14, first), sampled(90))
    steps(cluster, 3)
    for lost in ([0], [1]), ([0, 1], []), ([], [1]):
        for ranks in lost:
            cluster.die(ranks, not_done)
            cluster.step()
        for _ in range(24):  # else those that run would be at fault
            cluster.step()
    cluster.settle()
    assert cluster.check_outputs() == 2


def test_a_shared_prefix_is_computed_once() -> None:
    """By the first of those that had it; the others find it, as when they came."""
    cluster = Cluster([60])
    shared = prompt(32)
    requests = [cluster.add([*shared, 800 + n], greedy(8)) for n in range(4)]
    steps(cluster, 4)
    assert all(r.table.homes[:8] == requests[0].table.homes[:8] for r in requests)
    before = len(cluster.owned)
    cluster.die([0], done)
    cluster.settle()
    assert cluster.check_outputs() == 4
    # What any of them has alone: its own token, and some of its answer.
    assert sum(map(sum, cluster.owned[before:])) <= 32 + 4 * 12


@pytest.mark.parametrize("company", [0, 1, 5])
@pytest.mark.parametrize("depth", [1, 2])
def test_who_ends_workers_is_found_and_ended(company: int, depth: int) -> None:
    """And nobody else, whose tokens are right."""
    cluster = Cluster([40, 40], depth=depth)
    others = [cluster.add(prompt(9, 2 + n), sampled(12)) for n in range(company)]
    poison = cluster.add(prompt(14), greedy(12))
    steps(cluster, 3)
    given = len(cluster.lives[poison.number].received)
    cluster.poison = {poison.number}
    cluster.settle()
    life = cluster.lives[poison.number]
    assert life.reason == "error" and len(life.received) >= given
    assert cluster.check_outputs() == company + 1
    assert all(request.finish_reason in ("length", "stop") for request in others)
    assert cluster.scheduler.num_interruptions == (4 if company else 2)
    assert not cluster.scheduler._inquest.suspects


def test_poison_of_which_there_is_more() -> None:
    cluster = Cluster([60, 60], depth=2)
    requests = [cluster.add(prompt(9, n), sampled(12)) for n in range(1, 9)]
    cluster.poison = {requests[n].number for n in (0, 3, 7)}
    cluster.settle()
    assert cluster.check_outputs() == 8
    ended = [request.number for request in requests if request.finish_reason == "error"]
    assert set(ended) == cluster.poison


def test_a_suspect_that_leaves_is_none() -> None:
    cluster = Cluster([40], depth=2)
    one, other = (cluster.add(prompt(9, n), greedy(9)) for n in (1, 2))
    steps(cluster, 2)
    for _ in range(2):
        cluster.die([0], done)
        cluster.step()
    assert cluster.scheduler._inquest.suspects == {one.number, other.number}
    cluster.abort(one)
    cluster.settle()
    assert cluster.check_outputs() == 1 and other.finish_reason == "length"
