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

    def __init__(
        self, size: int, rng: random.Random, max_restarts: int = 10**9, min_ranks: int | None = None
    ) -> None:
        self.rng = rng
        self.coordinator = Generations(size, max_restarts, LOAD_S, min_ranks)
        self.away: set[int] = set()  # ranks without a supervisor
        self.without: dict[int, tuple[int, ...]] = {}  # generation -> ranks that were not called
        self.now = 0.0
        self.steps = 0
        self.group: list[int | None] = [0] * size  # the generation that each worker is in
        self.lives = [0] * size  # which worker of the rank it is
        self.still: set[int] = set()  # ranks that do nothing
        self.asked: list[deque[Any]] = [deque() for _ in range(size)]
        self.said: list[deque[Any]] = [deque() for _ in range(size)]
        self.calls: dict[int, set[int]] = {}  # generation -> ranks that try to meet in it
        self.kept = [False] * size  # whether the worker has outlived that it was out of reach
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
                    found = self.coordinator
                    for rank, state in enumerate(found.states):
                        assert (state is State.JOINING) == (rank not in action.order.away)
                    assert action.rank not in action.order.away
                    self.without[action.order.generation] = action.order.away
                self.asked[action.rank].append(action.order)

    def die(self, rank: int) -> None:
        self.group[rank] = None
        self.lives[rank] += 1
        self.still.discard(rank)
        self.asked[rank].clear()
        self.said[rank].clear()
        for ranks in self.calls.values():
            ranks.discard(rank)
        if rank in self.away:
            return
        is_slow = self.rng.random() < 0.5
        self.carry_out(self.coordinator.died(rank, f"rank {rank}", self.steps, self.now, is_slow))
        self.said[rank].append(("loaded",))

    def lose(self, rank: int, outlives: bool) -> None:
        """Its supervisor is gone, and its worker with it; or it ``outlives`` that it is out of
        reach."""
        worker = self.group[rank]
        self.asked[rank].clear()
        self.said[rank].clear()
        self.still.discard(rank)
        for ranks in self.calls.values():
            ranks.discard(rank)
        self.group[rank] = None
        self.away.add(rank)
        self.kept[rank] = outlives and worker is not None
        self.carry_out(self.coordinator.gone(rank, f"rank {rank}", self.steps, self.now))

    def come_back(self, rank: int) -> None:
        self.away.discard(rank)
        self.carry_out(self.coordinator.back(rank, self.now))
        self.said[rank].append(("left", 0) if self.kept[rank] else ("loaded",))

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
            if ranks and len(ranks) == len(self.group) - len(self.without[generation]):
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
        if self.coordinator.is_whole and self.group[0] is not None:
            self.steps += 1

    def settle(self) -> None:
        for _ in range(20_000):
            if self.coordinator.is_whole and not any(self.said) and not any(self.asked):
                break
            self.turn()
        assert self.coordinator.is_whole, (self.coordinator.states, self.group, self.asked)
        absent = self.coordinator.absent
        assert set(absent) == self.away
        generation = self.coordinator.generation
        assert self.group == [None if r in absent else generation for r in range(len(self.group))]


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


@pytest.mark.parametrize("size", [2, 3, 5])
def test_ranks_go_and_come_back(size: int) -> None:
    """As long as enough are left, the others meet without those that are away, and with all that
    have come back."""
    alone, meetings = 0, 0
    for number in range(ROUNDS // size):
        rng = random.Random(f"away {size} {number}")
        ranks = Ranks(size, rng, min_ranks=1)
        for _ in range(rng.randint(1, 200)):
            ranks.turn()
            rank = rng.randrange(size)
            if rng.random() < 0.02 and rank not in ranks.away:
                ranks.die(rank)
            rank = rng.randrange(1, size)
            if rng.random() < 0.05:
                if rank in ranks.away:
                    ranks.come_back(rank)
                else:
                    ranks.lose(rank, rng.random() < 0.5)
        ranks.settle()
        alone += len(ranks.away)
        for rank in sorted(ranks.away):
            ranks.come_back(rank)
        ranks.settle()
        assert not ranks.coordinator.absent and not ranks.gave_up
        meetings += ranks.coordinator.generation
    assert meetings > ROUNDS // size and alone, "too tame"


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


def test_the_usual_way_of_a_rank_that_goes() -> None:
    found = Generations(3, 3, LOAD_S, min_ranks=2)
    assert found.gone(2, "it", 5, 0.0) == [Ask(0, Leave(0)), Ask(1, Leave(0))]
    assert found.absent == (2,)
    assert found.left(0, 0, "", 5, 0.1) == []
    assert found.left(1, 0, "", 5, 0.1) == [Ask(0, Meet(1, (2,))), Ask(1, Meet(1, (2,)))]
    found.met(0, 1, 0.2)
    found.met(1, 1, 0.2)
    assert found.is_whole
    assert found.back(2, 1.0) == [], "nobody waits for one that loads"
    assert found.is_whole and found.absent == (2,)
    assert found.loaded(2, 3.0) == [Ask(0, Leave(1)), Ask(1, Leave(1))]
    found.left(0, 1, "", 7, 3.1)
    assert found.left(1, 1, "", 7, 3.1) == [Ask(rank, Meet(2)) for rank in range(3)]
    for rank in range(3):
        found.met(rank, 2, 3.2)
    assert found.is_whole and not found.absent and found.in_a_row == 1


def test_the_others_go_on_while_a_slow_one_loads() -> None:
    found = Generations(3, 3, LOAD_S, min_ranks=2)
    assert found.died(2, "it", 5, 0.0, True) == [Ask(0, Leave(0)), Ask(1, Leave(0))]
    found.left(0, 0, "", 5, 0.1)
    assert found.left(1, 0, "", 5, 0.1) == [Ask(0, Meet(1, (2,))), Ask(1, Meet(1, (2,)))]
    found.met(0, 1, 0.2)
    found.met(1, 1, 0.2)
    assert found.died(1, "it", 6, 0.3, True) == [Ask(0, Leave(1))], "all that are left are needed"
    found.left(0, 1, "", 6, 0.4)
    assert found.loaded(2, 1.0) == []
    assert found.loaded(1, 2.0) == [Ask(rank, Meet(2)) for rank in range(3)]


def test_too_few_are_left() -> None:
    found = Generations(3, 3, LOAD_S, min_ranks=2)
    assert found.gone(0, "rank 0", 0, 0.0) == [GiveUp("rank 0")], "it is the front"
    assert Generations(3, 3, LOAD_S).gone(1, "rank 1", 0, 0.0) == [GiveUp("rank 1")]
    assert not isinstance(found.gone(1, "rank 1", 0, 0.0)[0], GiveUp)
    assert found.gone(2, "rank 2", 0, 0.0) == [GiveUp("rank 2")]


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
