"""The coordinator of generations against simulated workers that die, are slow, or stand still."""

from __future__ import annotations

import random
from collections import deque
from typing import Any

import pytest

from ds_cp.serve.generations import LEAVE_S, MEET_S, Ask, Generations, GiveUp, Kill, State
from ds_cp.serve.orders import Leave, Meet

LOAD_S = 100.0
ROUNDS = 400


class Ranks:
    """Workers as ``Generations`` believes them to be. What they say arrives late, in the order of
    each rank, but for a death, which its supervisor sees before the last words are read."""

    def __init__(self, size: int, rng: random.Random, max_restarts: int = 10**9) -> None:
        self.rng = rng
        self.coordinator = Generations(size, max_restarts, LOAD_S)
        self.now = 0.0
        self.steps = 0
        self.group: list[int | None] = [0] * size  # the generation that each worker is in
        self.lives = [0] * size  # which worker of the rank it is
        self.still: set[int] = set()  # ranks that do nothing
        self.asked: list[deque[Any]] = [deque() for _ in range(size)]
        self.said: list[deque[Any]] = [deque() for _ in range(size)]
        self.calls: dict[int, set[int]] = {}  # generation -> ranks that try to meet in it
        self.gave_up = ""

    def carry_out(self, actions: list[Any]) -> None:
        for action in actions:
            if isinstance(action, GiveUp):
                self.gave_up = action.why
            elif isinstance(action, Kill):
                self.die(action.rank)
            else:
                assert isinstance(action, Ask)
                if isinstance(action.order, Meet):
                    assert self.coordinator.states == [State.JOINING] * len(self.group)
                self.asked[action.rank].append(action.order)

    def die(self, rank: int) -> None:
        self.group[rank] = None
        self.lives[rank] += 1
        self.still.discard(rank)
        self.asked[rank].clear()
        self.said[rank].clear()
        for ranks in self.calls.values():
            ranks.discard(rank)
        self.carry_out(self.coordinator.died(rank, f"rank {rank}", self.steps, self.now))
        self.said[rank].append(("loaded",))

    def act(self, rank: int) -> None:
        """The worker does the next thing that it was asked."""
        if rank in self.still:
            return
        if self.asked[rank]:
            order = self.asked[rank].popleft()
            if isinstance(order, Leave):
                if self.group[rank] is not None or rank in self.calls.get(order.generation, ()):
                    self.leave(rank, order.generation)
            else:
                self.calls.setdefault(order.generation, set()).add(rank)
        for generation, ranks in self.calls.items():
            if len(ranks) == len(self.group):
                for each in sorted(ranks):
                    assert self.group[each] is None, "it is in another generation"
                    self.group[each] = generation
                    self.said[each].append(("met", generation))
                ranks.clear()

    def leave(self, rank: int, generation: int) -> None:
        self.group[rank] = None
        for ranks in self.calls.values():
            ranks.discard(rank)
        self.said[rank].append(("left", generation))

    def hear(self, rank: int) -> None:
        if not self.said[rank]:
            return
        kind, *rest = self.said[rank].popleft()
        found = self.coordinator
        if kind == "loaded":
            self.carry_out(found.loaded(rank, self.now))
        elif kind == "left":
            self.carry_out(found.left(rank, rest[0], "an exchange", self.steps, self.now))
        else:
            self.carry_out(found.met(rank, rest[0], self.now))

    def turn(self) -> None:
        rank = self.rng.randrange(len(self.group))
        self.rng.choice((self.act, self.hear))(rank)
        self.now += self.rng.choice((0.0, 0.01, 1.0))
        self.carry_out(self.coordinator.overdue(self.now))
        if len(set(self.group)) == 1 and self.group[0] is not None:
            self.steps += 1

    def settle(self) -> None:
        for _ in range(20_000):
            if self.coordinator.is_whole and not any(self.said) and not any(self.asked):
                break
            self.turn()
        assert self.coordinator.is_whole, (self.coordinator.states, self.group, self.asked)
        assert self.group == [self.coordinator.generation] * len(self.group)


@pytest.mark.parametrize("size", [2, 3, 5])
def test_all_meet_again_whoever_dies_whenever(size: int) -> None:
    meetings = 0
    for number in range(ROUNDS // size):
        rng = random.Random(f"{size} {number}")
        ranks = Ranks(size, rng)
        for _ in range(rng.randint(1, 200)):
            ranks.turn()
            if rng.random() < 0.05:
                ranks.die(rng.randrange(size))
            if rng.random() < 0.02:  # an exchange fails, and nobody knows why
                one = rng.randrange(size)
                if ranks.group[one] is not None and one not in ranks.still:
                    ranks.leave(one, ranks.group[one])  # type: ignore[arg-type]
            if rng.random() < 0.02:
                ranks.still.add(rng.randrange(size))
        ranks.settle() if not ranks.still else settle_with_still(ranks)
        meetings += ranks.coordinator.generation
    assert meetings > ROUNDS // size, "too tame"


def settle_with_still(ranks: Ranks) -> None:
    """Whoever stands still is killed once it does not do what it is asked; nobody waits for it
    while all is well."""
    ranks.carry_out(ranks.coordinator.died(0, "rank 0", ranks.steps, ranks.now))
    ranks.still.discard(0)
    ranks.group[0] = None
    ranks.asked[0].clear()
    ranks.said[0].clear()
    ranks.said[0].append(("loaded",))
    for calls in ranks.calls.values():
        calls.discard(0)
    ranks.settle()


def test_the_usual_way() -> None:
    """Two die at once; the third keeps what it has; all are called when the last has loaded."""
    found = Generations(3, 3, LOAD_S)
    assert found.died(1, "it", 5, 0.0) == [Ask(0, Leave(0)), Ask(2, Leave(0))]
    assert found.died(2, "it", 5, 0.1) == []
    assert found.left(0, 0, "a peer is gone", 5, 0.2) == []
    assert found.loaded(2, 1.0) == []
    assert found.loaded(1, 2.0) == [Ask(rank, Meet(1)) for rank in range(3)]
    for rank in range(3):
        assert not found.is_whole
        found.met(rank, 1, 2.1)
    assert found.is_whole and found.in_a_row == 1


def test_deadlines() -> None:
    found = Generations(3, 3, LOAD_S)
    found.died(1, "it", 0, 0.0)
    found.left(0, 0, "", 0, 1.0)
    assert found.overdue(LEAVE_S - 0.1) == []
    assert [(kill.rank, type(kill)) for kill in found.overdue(LEAVE_S)] == [(2, Kill)]
    assert found.overdue(LEAVE_S + 0.1) == [], "once"
    found.died(2, "it was ended", 0, LEAVE_S + 0.2)
    [late] = found.overdue(LOAD_S)
    assert isinstance(late, Kill) and late.rank == 1 and "did not load within 100 s" in late.why
    found.died(1, "it was ended", 0, LOAD_S)
    found.loaded(1, LOAD_S)
    found.loaded(2, LOAD_S)
    assert {kill.rank for kill in found.overdue(LOAD_S + MEET_S)} == {0, 1, 2}  # type: ignore[union-attr]


def test_deaths_in_a_row_end_the_job() -> None:
    """A step done between them begins a new row."""

    def interrupted(found: Generations, steps: int) -> list[Any]:
        if actions := [a for a in found.died(1, "it", steps, 0.0) if isinstance(a, GiveUp)]:
            return actions
        found.left(0, found.generation, "", steps, 0.0)
        found.loaded(1, 0.0)
        for rank in range(2):
            found.met(rank, found.generation, 0.0)
        assert found.is_whole
        return []

    found = Generations(2, 2, LOAD_S)
    for steps in range(1, 20):
        assert interrupted(found, steps) == []
    assert interrupted(found, 19) == []
    [end] = interrupted(found, 19)
    assert end.why.startswith("it, after 2 interruptions in a row without a step done")


def test_a_new_worker_that_dies_while_it_loads_counts() -> None:
    found = Generations(2, 2, LOAD_S)
    assert found.died(1, "it", 0, 0.0) == [Ask(0, Leave(0))]
    assert found.died(1, "it", 0, 0.0) == []
    assert isinstance(found.died(1, "it", 0, 0.0)[0], GiveUp)
