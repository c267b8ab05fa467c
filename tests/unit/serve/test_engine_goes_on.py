"""The engine's thread over ranks that leave, and meet again: no token is lost or comes twice."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from ds_cp.engine.interface import EngineHealth
from ds_cp.errors import EngineDeadError
from ds_cp.plan import Outcome, Sampled, StepPlan
from ds_cp.sampling_params import SamplingParams
from ds_cp.serve.async_engine import AsyncEngine
from ds_cp.serve.channel import Resumed
from ds_cp.serve.worker_link import InterruptedStepsError, WorkerFailedError
from ds_cp.worker.state import WorkerState
from tests.unit.serve.test_async_engine import BLOCK, OneRank, Served, ask, until


class Counting(OneRank):
    """One rank that draws 10, 11, 12 ..., and is interrupted at every one of ``at`` calls of
    ``submit`` and ``outcome``. ``loses``: it is a new worker each time."""

    def __init__(self, at: set[int], loses: bool) -> None:
        super().__init__()
        self.calls = 0
        self.generation = 0
        self.computed: list[int] = []  # tokens that each begin finds stored
        self.going = threading.Event()
        self.going.set()
        self._at = at
        self._loses = loses

    def _call(self) -> None:
        self.calls += 1
        if self.calls in self._at:
            raise InterruptedStepsError("a rank is gone")

    def submit(self, plan: StepPlan) -> None:
        assert self.going.wait(60)
        self._call()
        super().submit(plan)

    def outcome(self) -> Outcome:
        self._call()
        plan = self.plans.popleft()
        if not isinstance(plan, StepPlan):
            return Outcome()
        self.computed += [begin.computed for begin in plan.begins]
        draws = self.worker_state.apply(plan).draws
        return Outcome(
            plan.step, tuple(Sampled(d.sequence.number, 10 + d.index, 0.0) for d in draws)
        )

    def resume(self) -> Resumed:
        self.plans.clear()
        self.worker_state = WorkerState(0, BLOCK)
        self.generation += 1
        return Resumed(self.generation, (self.generation if self._loses else 0,))


@pytest.mark.parametrize("loses", [False, True])
@pytest.mark.parametrize("at", [{1}, {2}, {3}, {7, 8}, {12, 13}, set(range(5, 60, 9))])
def test_streams_go_on(at: set[int], loses: bool) -> None:
    rank = Counting(at, loses)

    async def work(engine: AsyncEngine) -> None:
        rank.going.clear()
        asked = [asyncio.create_task(ask(engine, name, 12)) for name in "abc"]
        await until(lambda: len(engine._mailboxes.all()) == 3)  # alone one would be suspected
        rank.going.set()
        assert await asyncio.gather(*asked) == [list(range(10, 22))] * 3
        assert engine.state == "ready"

    served = Served(rank)
    served.run(work)
    assert not served.died and rank.generation == len([call for call in at if call <= rank.calls])
    if loses:
        assert not any(rank.computed), "what is gone counts as stored"
    elif max(at) >= 12:
        assert max(rank.computed) > BLOCK, "what is there is computed again"


def test_an_interruption_while_nothing_runs_is_seen_by_the_next_request() -> None:
    rank = Counting(set(), True)

    async def work(engine: AsyncEngine) -> None:
        assert await ask(engine, "a", 3) == [10, 11, 12]
        await until(lambda: not rank.plans)
        rank._at = {rank.calls + 1}
        assert await ask(engine, "b", 3) == [10, 11, 12]

    served = Served(rank)
    served.run(work)
    assert not served.died and rank.generation == 1


def test_ranks_that_do_not_meet_again_end_the_engine() -> None:
    class Hopeless(Counting):
        def resume(self) -> Resumed:
            raise WorkerFailedError("rank 1: another model", 2, True)

    async def work(engine: AsyncEngine) -> None:
        with pytest.raises(EngineDeadError, match="another model"):
            await ask(engine, "a", 30)
        await until(lambda: bool(served.died))

    served: Any = Served(Hopeless({6}, False))
    served.run(work)
    assert [str(err) for err in served.died] == ["rank 1: another model"]


def test_the_request_that_ends_workers_is_told() -> None:
    class Poisoned(Counting):
        def outcome(self) -> Outcome:
            plan = self.plans[0]
            if isinstance(plan, StepPlan):
                computed = {chunk.request for chunk in plan.chunks}
                if 2 in computed.union(*(decodes.requests for decodes in plan.decodes)):
                    raise InterruptedStepsError("rank 0 was ended by SIGSEGV")
            return super().outcome()

    rank = Poisoned(set(), True)
    reasons: list[str | None] = []

    async def poison(engine: AsyncEngine) -> None:
        params = SamplingParams(max_tokens=9, temperature=0.0)
        async for delta in engine.generate("b", [4, 5, 6], params):
            reasons.append(delta.finish_reason)

    async def work(engine: AsyncEngine) -> None:
        first = asyncio.create_task(ask(engine, "a", 12))
        await asyncio.sleep(0)
        ended = asyncio.create_task(poison(engine))
        await asyncio.sleep(0)
        last = asyncio.create_task(ask(engine, "c", 12))
        assert await first == await last == list(range(10, 22))
        await ended
        assert engine.state == "ready"

    served = Served(rank)
    served.run(work)
    assert reasons == ["error"] and rank.generation <= 4 and not served.died


def test_it_says_that_it_recovers_and_takes_requests_meanwhile() -> None:
    going = threading.Event()

    class Slow(Counting):
        def resume(self) -> Resumed:
            assert going.wait(60)
            return super().resume()

    async def work(engine: AsyncEngine) -> None:
        asked = [asyncio.create_task(ask(engine, "a", 12))]
        await until(lambda: engine.state == "recovering")
        assert engine.health == EngineHealth("recovering")
        asked.append(asyncio.create_task(ask(engine, "b", 12)))
        await asyncio.sleep(0)
        assert not any(one.done() for one in asked)
        going.set()
        assert await asyncio.gather(*asked) == [list(range(10, 22))] * 2
        assert engine.state == "ready" and engine.stats().num_interruptions == 1

    Served(Slow({4}, True)).run(work)
