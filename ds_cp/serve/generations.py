"""How ranks meet again after one of them has died: what rank 0's supervisor asks of whom, and when.

Numbers and words only: the caller carries out what is returned, and says what happens. A rank's
worker is *in* the generation; is asked to leave it; is *out* of all groups, alive, with its model
and KV; *joins* the next one. Or it *loads*, since its supervisor has started another one in place
of the dead. When all are out, all are asked to meet. Another death on the way is one more that
loads.

A rank whose place cannot be filled, since its supervisor is gone, is *away*: the others meet
without it, as long as they are enough. When its supervisor is here again it *returns*: its worker
loads, while the others go on. Once it is *back*, they leave, and all meet.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from ds_cp.serve.orders import Leave, Meet, Order

LEAVE_S = 10.0  # seconds to leave; a worker that cannot is killed
MEET_S = 45.0  # seconds to meet, once all were asked; then those that still try are killed


@dataclass(frozen=True)
class Ask:
    """Give ``rank`` an order."""

    rank: int
    order: Order


@dataclass(frozen=True)
class Kill:
    """End the worker of ``rank``, which does not do what it was asked; its end is to be said."""

    rank: int
    why: str


@dataclass(frozen=True)
class GiveUp:
    """End the job."""

    why: str


Action = Ask | Kill | GiveUp


class State(Enum):
    """Of a rank's worker, as the module says."""

    IN = "in"
    LEAVING = "leaving"
    OUT = "out"
    LOADING = "loading"
    JOINING = "joining"
    AWAY = "away"
    RETURNING = "returning"
    BACK = "back"


_ABSENT = (State.AWAY, State.RETURNING, State.BACK)  # the others go on without such a rank


class Generations:
    """``max_restarts``: interruptions in a row, without a step done between them, that the job
    outlives; a rank that dies twice in one, or a meeting that does not come about, counts as one
    more. ``load_s``: seconds that a new worker may load. ``min_ranks``: as many ranks have to be
    left for the job to go on without the others; None: it ends when one is gone. All ranks are in
    generation 0 at first. Times are of one clock, in seconds."""

    def __init__(
        self, size: int, max_restarts: int, load_s: float, min_ranks: int | None = None
    ) -> None:
        self.generation = 0
        self.states = [State.IN] * size
        self.in_a_row = 0
        self._max_restarts = max_restarts
        self._load_s = load_s
        self._min_ranks = size if min_ranks is None else min_ranks
        self._since = [0.0] * size  # of the state
        self._steps = -1  # that were done when the last interruption began
        self._dead: set[int] = set()  # ranks that have died in it
        self._meetings = 0  # that were called in it

    @property
    def is_whole(self) -> bool:
        """Whether all ranks that are not away are in the generation."""
        return all(state is State.IN or state in _ABSENT for state in self.states)

    @property
    def is_settled(self) -> bool:
        """Whether nothing has to happen in time."""
        return self.is_whole and State.RETURNING not in self.states

    @property
    def absent(self) -> tuple[int, ...]:
        """Ranks without which the others go on."""
        return tuple(rank for rank, state in enumerate(self.states) if state in _ABSENT)

    def died(
        self, rank: int, cause: str, steps: int, now: float, is_slow: bool = False
    ) -> list[Action]:
        """The worker of ``rank`` has ended, by whatever, and another one loads. ``steps``: that the
        ranks have done so far; ``is_slow``: so slowly that the others go on meanwhile, if they are
        enough: they meet twice then."""
        if self.states[rank] in _ABSENT:
            if self.states[rank] is State.BACK:
                self._enter(rank, State.RETURNING, now)
            return []
        if self.is_whole:
            self._begin(steps)
        elif rank in self._dead:
            self.in_a_row += 1
        self._dead.add(rank)
        if self._is_hopeless:
            return [self._give_up(cause)]
        if is_slow and self._can_miss(rank):
            self._enter(rank, State.RETURNING, now)
            return [*self._interrupt(now), *self._meet(cause, now)]
        self._enter(rank, State.LOADING, now)
        return self._interrupt(now)

    def _can_miss(self, rank: int) -> bool:
        """Whether the others are enough without it."""
        return rank != 0 and len(self.states) - len(self.absent) - 1 >= self._min_ranks

    def gone(self, rank: int, cause: str, steps: int, now: float) -> list[Action]:
        """The supervisor of ``rank`` is gone, and its worker with it or out of reach."""
        if self.states[rank] in _ABSENT:
            self._enter(rank, State.AWAY, now)
            return []
        if not self._can_miss(rank):
            return [GiveUp(cause)]
        if self.is_whole:
            self._begin(steps)
            if self._is_hopeless:
                return [self._give_up(cause)]
        self._enter(rank, State.AWAY, now)
        return [*self._interrupt(now), *self._meet(cause, now)]

    def back(self, rank: int, now: float) -> list[Action]:
        """The supervisor of ``rank``, which was away, is here again: its worker loads, or says that
        it is out."""
        if self.states[rank] in _ABSENT:
            self._enter(rank, State.RETURNING, now)
        return []

    def left(self, rank: int, generation: int, cause: str, steps: int, now: float) -> list[Action]:
        """The worker of ``rank`` is out of all groups."""
        state = self.states[rank]
        if state is State.RETURNING:  # it has outlived that it was out of reach
            return self._come_back(rank, now)
        if state in (State.OUT, State.LOADING, *_ABSENT) or generation < self.generation:
            return []
        if self.is_whole:
            self._begin(steps)
            if self._is_hopeless:
                return [self._give_up(cause)]
        self._enter(rank, State.OUT, now)
        return [*self._interrupt(now), *self._meet(cause, now)]

    def loaded(self, rank: int, now: float) -> list[Action]:
        """The new worker of ``rank`` has its model."""
        if self.states[rank] is State.RETURNING:
            return self._come_back(rank, now)
        if self.states[rank] is not State.LOADING:
            return []
        self._enter(rank, State.OUT, now)
        return self._meet("the ranks do not meet", now)

    def met(self, rank: int, generation: int, now: float) -> list[Action]:
        """The worker of ``rank`` has met all others."""
        if self.states[rank] is State.JOINING and generation == self.generation:
            self._enter(rank, State.IN, now)
            return self._call_back(now)
        return []

    def overdue(self, now: float) -> list[Action]:
        """What is to be done since something did not happen in time."""
        actions: list[Action] = []
        limits = {
            State.LEAVING: (LEAVE_S, "did not leave"),
            State.JOINING: (MEET_S, "did not meet the others"),
            State.LOADING: (self._load_s, "did not load"),
            State.RETURNING: (self._load_s, "did not load"),
        }
        for rank, state in enumerate(self.states):
            if state not in limits:
                continue
            seconds, what = limits[state]
            if now - self._since[rank] >= seconds:
                self._since[rank] = now  # its end is to come
                actions.append(Kill(rank, f"{what} within {seconds:g} s"))
        return actions

    def _come_back(self, rank: int, now: float) -> list[Action]:
        self._enter(rank, State.BACK, now)
        return self._call_back(now)

    def _call_back(self, now: float) -> list[Action]:
        """Once all others are in: have them leave, to meet with those who are back."""
        if not self.is_whole or State.BACK not in self.states:
            return []
        self._dead, self._meetings = set(), 0
        return self._interrupt(now)

    def _begin(self, steps: int) -> None:
        """An interruption begins; it is the first in a row if a step was done since the last."""
        self.in_a_row = 1 if steps > self._steps else self.in_a_row + 1
        self._steps = steps
        self._dead = set()
        self._meetings = 0

    @property
    def _is_hopeless(self) -> bool:
        return self.in_a_row > self._max_restarts

    def _give_up(self, cause: str) -> GiveUp:
        most = self._max_restarts
        return GiveUp(
            f"{cause}, after {most} interruption{'s' * (most != 1)} in a row without a step done "
            "between them (fault_tolerance.max_restarts)"
        )

    def _interrupt(self, now: float) -> list[Action]:
        """Ask those to leave that are in the generation, or try to be."""
        actions: list[Action] = []
        for rank, state in enumerate(self.states):
            if state in (State.IN, State.JOINING):
                self._enter(rank, State.LEAVING, now)
                actions.append(Ask(rank, Leave(self.generation)))
        return actions

    def _meet(self, cause: str, now: float) -> list[Action]:
        if any(state is not State.OUT and state not in _ABSENT for state in self.states):
            return []
        self._meetings += 1
        self.in_a_row += self._meetings > 1
        if self._is_hopeless:
            return [self._give_up(cause)]
        self.generation += 1
        met = [r for r, state in enumerate(self.states) if state in (State.OUT, State.BACK)]
        for rank in met:
            self._enter(rank, State.JOINING, now)
        return [Ask(rank, Meet(self.generation, self.absent)) for rank in met]

    def _enter(self, rank: int, state: State, now: float) -> None:
        self.states[rank], self._since[rank] = state, now
