"""Who ends workers, from who was in flight when they ended."""

from __future__ import annotations

import pytest

from ds_cp.scheduler.inquest import PROVEN, Inquest
from ds_cp.scheduler.recovery import Flight
from tests.helpers.cluster import (
    Cluster,
    greedy,
    in_its_decodes,
    in_its_last_chunk,
    prompt,
    sampled,
)

ALIVE = range(100)


def flights(*steps: dict[int, int]) -> list[Flight]:
    """Of each step, the tokens of each request that are computed then."""
    return [Flight(reached=tuple(step.items())) for step in steps]


def test_one_among_many() -> None:
    inquest = Inquest()
    suspects = inquest.suspects
    assert inquest.interrupted(flights({1: 5, 2: 5}, {1: 6, 3: 5}), ALIVE) is None
    assert not suspects
    assert inquest.interrupted(flights({1: 5, 2: 5, 4: 5}), ALIVE) is None
    assert suspects == {1, 2}
    [flight] = flights({1: 6 + PROVEN})
    inquest.done(flight)
    assert suspects == {2}
    assert inquest.interrupted(flights({2: 5}), ALIVE) is None
    assert inquest.interrupted(flights({2: 5}), ALIVE) == 2
    assert not suspects


def test_when_nobody_gets_on_three_are_enough() -> None:
    inquest = Inquest()
    for _ in range(2):
        assert inquest.interrupted(flights({1: 5, 2: 5}), ALIVE) is None
    assert inquest.interrupted(flights({2: 5}), ALIVE) == 2


def test_others_may_come_on_between() -> None:
    """It has to come further itself to be free."""
    inquest = Inquest()
    for _ in range(2):
        assert inquest.interrupted(flights({1: 5, 2: 5}), ALIVE) is None
        inquest.done(flights({1: 5 + PROVEN})[0])
    assert inquest.suspects == {2}
    assert inquest.interrupted(flights({2: 5}), ALIVE) is None
    assert inquest.interrupted(flights({2: 5}), ALIVE) == 2


def test_who_comes_further_is_free() -> None:
    inquest = Inquest()
    for position in range(0, 90, 10):
        assert inquest.interrupted(flights({1: position}), ALIVE) is None
        inquest.done(flights({1: position + PROVEN})[0])
        assert not inquest.suspects


def test_who_only_comes_as_far_as_before_is_not() -> None:
    """Its first chunks are well each time, and its last ends the worker."""
    inquest = Inquest()
    for times in range(2):
        inquest.done(flights({1: 8})[0])
        found = inquest.interrupted(flights({1: 14}), ALIVE)
        assert found == (1 if times == 1 else None)


def test_nobody_in_flight_is_nobodys_fault() -> None:
    inquest = Inquest()
    for _ in range(9):
        assert inquest.interrupted(flights({}), ALIVE) is None
    assert not inquest.suspects


def test_who_has_ended_is_forgotten() -> None:
    inquest = Inquest()
    for _ in range(2):
        inquest.interrupted(flights({1: 5, 2: 5}), ALIVE)
    assert inquest.interrupted(flights({1: 5}), {2}) is None
    assert inquest.suspects == {2}
    inquest.forget(2)
    assert not inquest.suspects


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("blocks", [7, 40])
def test_poison_in_the_last_of_several_chunks(blocks: int, depth: int) -> None:
    """With room for all, and with room for few, so that it waits when its turn has come."""
    cluster = Cluster([blocks], depth=depth, budget=4)
    others = [cluster.add(prompt(9, 2 + n), sampled(12)) for n in range(3)]
    poison = cluster.add(prompt(14), greedy(6))
    cluster.poison = {poison.number}
    cluster.strikes = in_its_last_chunk
    cluster.settle()
    assert poison.finish_reason == "error"
    assert cluster.check_outputs() == 4
    assert all(request.finish_reason in ("length", "stop") for request in others)


@pytest.mark.parametrize("depth", [1, 2])
def test_poison_in_its_decodes_alone(depth: int) -> None:
    """Computed again as a prompt it does no harm."""
    cluster = Cluster([40], depth=depth)
    others = [cluster.add(prompt(9, 2 + n), sampled(12)) for n in range(2)]
    poison = cluster.add(prompt(14), greedy(40))
    cluster.poison = {poison.number}
    cluster.strikes = in_its_decodes
    cluster.settle()
    assert poison.finish_reason == "error" and cluster.scheduler.num_interruptions <= 4
    assert cluster.check_outputs() == 3
    assert all(request.finish_reason in ("length", "stop") for request in others)
