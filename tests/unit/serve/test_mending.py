"""Three supervisors in one process, over their real link, with workers that are played."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from ds_cp.config import load_config
from ds_cp.facts import Facts
from ds_cp.serve import generations, mending
from ds_cp.serve.job_link import FollowingLink, LeadingLink
from ds_cp.serve.job_words import Lost
from ds_cp.serve.mending import Mending
from ds_cp.serve.orders import Leave, Left, Loaded, Met, Order, Word
from ds_cp.topology.job import Job

RANKS = 3
LIMIT_S = 60.0
FACTS = Facts(
    ("here",) * RANKS, RANKS, 1, "cpu", "fp32", "torch", 64, 100, (1,), 1, 2, 2, 8, (2, 4, 6), 10,
    1, 1, 0.0, (), 1e9, 100, 8, notes=("a long one",),
)  # fmt: skip


@dataclass
class Room:
    """Where workers meet: who has come, by generation. ``is_open``: whether a meeting comes about
    when all are there."""

    here: dict[int, dict[int, Played]] = field(default_factory=dict)
    is_open: bool = True
    size: int = RANKS

    def enter(self, generation: int, worker: Played) -> None:
        self.here.setdefault(generation, {})[worker.rank] = worker
        self.look()

    def look(self) -> None:
        for generation, workers in self.here.items():
            if self.is_open and len(workers) == self.size:
                for worker in workers.values():
                    worker.generation = generation
                    worker.says(Met(generation))
                workers.clear()

    def leave(self, worker: Played) -> None:
        for workers in self.here.values():
            workers.pop(worker.rank, None)


class Played:
    """A supervisor's seat and the worker in it: ``lives`` counts those before this one."""

    outlives = can_replace = True
    facts: Facts | None = None

    def __init__(self, rank: int, room: Room) -> None:
        self.rank = rank
        self.room = room
        self.on_word: Callable[[Word], None] = lambda word: None
        self.on_death: Callable[[], None] = lambda: None
        self.generation: int | None = 0
        self.lives = 0
        self.still = False
        self.dead = False
        self.why = ""
        self.channel = self.process = self  # type: ignore[assignment]

    def poll(self) -> int | None:
        return -9 if self.dead else None

    def kill(self) -> None:
        self.dead, self.generation, self.still = True, None, False
        self.room.leave(self)
        asyncio.get_running_loop().call_soon(self.on_death)

    def end(self, why: str) -> None:
        self.why = why
        self.kill()

    def joins(self, facts: Facts) -> None:
        self.facts = facts
        self.generation = None

    async def replace(self) -> None:
        self.dead = False
        self.lives += 1
        asyncio.get_running_loop().call_later(0.02, self.says, Loaded(), self.lives)

    def says(self, word: Word, life: int | None = None) -> None:
        if not self.dead and life in (None, self.lives):
            asyncio.get_running_loop().call_soon(self.on_word, word)

    def tell(self, order: Order) -> None:
        if self.still or self.dead:
            return
        if isinstance(order, Leave):
            self.leave(order.generation)
        else:
            self.room.enter(order.generation, self)

    def leave(self, generation: int) -> None:
        self.generation = None
        self.room.leave(self)
        self.says(Left(generation, "a peer is gone"))


class Whole:
    """What ``Mending`` asks of its supervisor."""

    def __init__(self) -> None:
        self.mends = True
        self.given_up: list[str] = []
        self.ended = False

    def give_up(self, why: str) -> None:
        self.given_up.append(why)
        self.mends = False

    def end_worker(self) -> None:
        self.ended = True


class Link:
    """Rank 0's way to its worker."""

    steps_done = 0

    def replace(self, channel: Any) -> None:
        pass


class Three:
    def __init__(self, **tolerance: Any) -> None:
        self.room = Room()
        self.seats = [Played(rank, self.room) for rank in range(RANKS)]
        self.wholes = [Whole() for _ in range(RANKS)]
        self.worker = Link()
        config = load_config({"model": "none", "fault_tolerance": tolerance})
        nobody: Callable[..., None] = lambda *args: None  # noqa: E731
        self.leading = LeadingLink(RANKS, nobody, self.gone, nobody)
        self.config = config
        self.name = f"\0ds_cp-test/mending/{os.getpid()}/{time.monotonic_ns()}"
        self.following = [FollowingLink(rank, LIMIT_S, nobody) for rank in range(1, RANKS)]
        links = [self.leading, *self.following]
        self.mendings = []
        self.deaths: list[asyncio.Future[None]] = []
        for rank, (seat, link, whole) in enumerate(
            zip(self.seats, links, self.wholes, strict=True)
        ):
            self.mendings.append(self.mending(seat, link, whole))
            seat.on_death = self._watcher(rank)
        self.mendings[0].worker = self.worker  # type: ignore[assignment]

    def mending(self, seat: Played, link: LeadingLink | FollowingLink, whole: Whole) -> Mending:
        job = Job(seat.rank, RANKS, seat.rank, RANKS, None, "here", "torchrun", "127.0.0.1", 0)
        return Mending(self.config, job, seat, link, whole)  # type: ignore[arg-type]

    def gone(self, rank: int, pid: int) -> None:
        self.mendings[0].gone(rank, f"the supervisor of rank {rank} was killed")

    def lose(self, rank: int) -> None:
        """Its supervisor ends without a good-bye, and its worker with it."""
        self.seats[rank].dead, self.seats[rank].generation = True, None
        self.room.leave(self.seats[rank])
        self.room.size -= 1
        peer = self.following[rank - 1]._peer
        assert peer is not None
        peer.close()

    async def come(self, rank: int, mark: str = "") -> tuple[Played, Whole, bool]:
        """It is started again; whether its worker is to load alone."""
        seat, whole = Played(rank, self.room), Whole()
        link = FollowingLink(rank, LIMIT_S, lambda *args: None)
        one = self.mending(seat, link, whole)
        link.mark = mark or link.mark
        joins = asyncio.create_task(one.joins(asyncio.Event()))
        await link.open(self.name)
        joined = await joins
        self.seats[rank], self.following[rank - 1] = seat, link
        return seat, whole, joined

    def _watcher(self, rank: int) -> Callable[[], None]:
        def see() -> None:
            if self.wholes[rank].mends:
                cause = f"the worker of rank {rank} was ended"
                self.deaths.append(asyncio.ensure_future(self.mendings[rank].died(cause)))

        return see

    def run(self, work: Callable[[Three], Awaitable[None]]) -> None:
        async def main() -> None:
            await self.leading.open(self.name)
            for link in self.following:
                await link.open(self.name)
            await self.until(lambda: all(link.is_open for link in self.following))
            self.seats[0].facts = FACTS  # it has started
            await asyncio.wait_for(work(self), LIMIT_S)
            for link in self.following:
                await link.close()
            await self.leading.close()

        asyncio.run(main())

    async def until(self, done: Callable[[], bool]) -> None:
        end = time.monotonic() + LIMIT_S
        while not done():
            states = self.mendings[0]._generations.states
            assert time.monotonic() < end, (states, [seat.generation for seat in self.seats])
            await asyncio.sleep(0.005)

    async def met(self, generation: int) -> None:
        """All ranks are in that generation, and rank 0 knows."""
        found = self.mendings[0]._generations
        await self.until(lambda: found.is_whole and found.generation == generation)
        assert [seat.generation for seat in self.seats] == [generation] * RANKS
        self.worker.steps_done += 1

    @property
    def lives(self) -> list[int]:
        return [seat.lives for seat in self.seats]


def test_each_may_die(capsys: pytest.CaptureFixture[str]) -> None:
    async def work(three: Three) -> None:
        for number, rank in enumerate((1, 0, 2, 0), 1):
            three.seats[rank].kill()
            await three.met(number)
        assert three.lives == [2, 1, 1], "a survivor was not kept"

    three = Three()
    three.run(work)
    said = capsys.readouterr().err
    assert "the worker of rank 1 was ended; another worker takes its place" in said
    assert said.count("all ranks have met again") == 4 and "(generation 4, " in said
    assert not any(whole.given_up or whole.ended for whole in three.wholes)


def test_several_die_and_die_again_on_the_way() -> None:
    async def work(three: Three) -> None:
        three.room.is_open = False
        three.seats[1].kill()
        three.seats[2].kill()
        await three.until(lambda: len(three.room.here.get(1, ())) == RANKS)
        three.seats[0].kill()  # while all try to meet
        three.room.is_open = True
        await three.met(2)
        assert three.lives == [1, 1, 1]

    Three().run(work)


def test_an_exchange_fails_and_nobody_has_died() -> None:
    async def work(three: Three) -> None:
        three.seats[2].leave(0)
        await three.met(1)
        assert three.lives == [0, 0, 0]

    Three().run(work)


def test_who_does_not_leave_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generations, "LEAVE_S", 0.3)
    monkeypatch.setattr(mending, "TICK_S", 0.05)

    async def work(three: Three) -> None:
        three.seats[1].still = True
        three.seats[2].kill()
        await three.met(1)
        assert three.lives == [0, 1, 1]
        assert three.seats[1].why == "did not leave within 0.3 s"

    Three().run(work)


def test_deaths_in_a_row_end_the_job() -> None:
    """The others, who wait for a meeting, end with rank 0's supervisor."""

    async def work(three: Three) -> None:
        three.seats[1].kill()
        await three.until(lambda: three.lives == [0, 1, 0])
        three.seats[1].kill()
        await three.until(lambda: bool(three.wholes[0].given_up))
        assert (
            three.wholes[0]
            .given_up[0]
            .startswith("the worker of rank 1 was ended, after 1 interruption in a row")
        )
        await three.until(lambda: three.seats[2].generation is None)
        await three.leading.close()
        await three.until(lambda: three.wholes[2].ended)

    Three(max_restarts=1).run(work)


def test_a_rank_goes_and_comes_back(capsys: pytest.CaptureFixture[str]) -> None:
    async def work(three: Three) -> None:
        found = three.mendings[0]._generations
        three.lose(2)
        await three.until(lambda: found.is_whole and found.generation == 1)
        assert found.absent == (2,) and three.seats[1].generation == 1
        three.seats[1].kill()  # those that are left may die as ever
        await three.until(lambda: found.is_whole and found.generation == 2)
        _, whole, joined = await three.come(2, mark="another")
        assert not joined and "with another config or version" in whole.given_up[0]
        await three.following[1].close()
        seat, whole, joined = await three.come(2)
        assert joined and seat.facts == replace(FACTS, notes=()) and not whole.given_up
        three.room.size = RANKS
        seat.says(Loaded())
        await three.met(3)
        assert three.lives == [0, 1, 0]

    three = Three(min_ranks=2)
    three.run(work)
    said = capsys.readouterr().err
    assert "the job goes on with 2 of 3 ranks, without rank 2: KV for 48 tokens rather" in said
    assert "2 of 3 ranks, without rank 2 have met again (generation 1" in said
    assert "all ranks have met again (generation 3" in said


def test_too_few_ranks_are_left() -> None:
    async def work(three: Three) -> None:
        three.lose(2)
        three.lose(1)
        await three.until(lambda: bool(three.wholes[0].given_up))
        why = three.wholes[0].given_up[0]
        assert why.endswith("was killed, and fault_tolerance.min_ranks is 2")

    Three(min_ranks=2).run(work)


def test_a_job_that_starts_is_joined_together() -> None:
    async def work(three: Three) -> None:
        three.lose(1)
        three.seats[0].facts = None  # it has not begun
        _, whole, joined = await three.come(1)
        assert not joined and not whole.given_up

    Three(min_ranks=2).run(work)


def test_a_death_when_none_is_replaced_any_more() -> None:
    """Rank 0 serves no more, or not yet: the cause ends the job."""

    async def work(three: Three) -> None:
        three.wholes[0].mends = False
        three.seats[2].kill()
        await three.until(lambda: bool(three.wholes[0].given_up))
        assert three.wholes[0].given_up == ["the worker of rank 2 was ended"]
        await three.following[0].report(Lost("the link is as good as before"))

    Three().run(work)
