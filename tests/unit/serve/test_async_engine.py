"""The engine's thread over a simulated worker: it checks its block counts whenever it is idle."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest

from ds_cp.config import load_config
from ds_cp.engine.core import EngineCore
from ds_cp.errors import CommError, DsCpError, EngineDeadError, RequestError, StoppingError
from ds_cp.facts import Facts
from ds_cp.outputs import EndedRequest
from ds_cp.plan import Outcome, Sampled, StepPlan
from ds_cp.sampling_params import SamplingParams
from ds_cp.serve.async_engine import AsyncEngine
from ds_cp.serve.channel import Ready
from ds_cp.worker.state import WorkerState

BLOCK = 4
FACTS = Facts(
    hosts=("here",), cp_size=1, tp_size=1, device="cpu", dtype="float32", kernel="sdpa",
    max_model_len=100, vocab_size=50, eos_token_ids=(), num_q_heads=2, num_kv_heads=1,
    block_size=BLOCK, blocks_per_rank=(30,), bytes_per_token=8, num_layers=1, threads=1,
    ranks_at_once=1, exactness=0.0, links=(), flops_per_s=1e9, weights=100, head_dim=4,
)  # fmt: skip


class OneRank:
    """One rank that draws token 7."""

    sent: dict[str, tuple[int, int]] = {}

    def __init__(self) -> None:
        self.plans: deque[StepPlan] = deque()
        self.worker_state = WorkerState(0, BLOCK)

    def ready(self) -> Ready:
        return Ready(FACTS, ())

    def submit(self, plan: StepPlan) -> None:
        self.plans.append(plan)

    def outcome(self) -> Outcome:
        plan = self.plans.popleft()
        if not isinstance(plan, StepPlan):
            return Outcome()
        draws = self.worker_state.apply(plan).draws
        return Outcome(plan.step, tuple(Sampled(d.sequence.number, 7, 0.0) for d in draws))

    def leave(self) -> None:
        pass


class Served:
    def __init__(self, rank: OneRank | None = None, server: dict[str, float] | None = None) -> None:
        self.died: list[DsCpError] = []
        self.engine: AsyncEngine
        self._rank = rank or OneRank()
        self._config = load_config({"model": "pretended", "server": server or {}})

    def run(self, work: Callable[[AsyncEngine], Any]) -> None:
        async def main() -> None:
            ready = asyncio.Event()
            loop = asyncio.get_running_loop()
            self.engine = AsyncEngine(
                self._config, "pretended", self._rank, loop, lambda: None,
                lambda _: loop.call_soon_threadsafe(ready.set),  # type: ignore[arg-type, return-value]
                lambda err, _: self.died.append(err),
            )  # fmt: skip
            self.engine.start()
            await asyncio.wait_for(ready.wait(), 60)
            await asyncio.wait_for(work(self.engine), 60)
            await self.engine.stop(10)

        asyncio.run(main())


async def ask(engine: AsyncEngine, name: str, new: int = 9) -> list[int]:
    params = SamplingParams(max_tokens=new, temperature=0.0)
    return [t async for delta in engine.generate(name, [1, 2, 3], params) for t in delta.token_ids]


async def until(done: Callable[[], bool]) -> None:
    while not done():
        await asyncio.sleep(0.005)


def test_blocks_are_counted_at_each_idle_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    checks: list[bool] = []
    real = EngineCore.check_integrity

    def counted(core: EngineCore) -> None:
        real(core)
        checks.append(core.has_work)

    monkeypatch.setattr(EngineCore, "check_integrity", counted)

    async def work(engine: AsyncEngine) -> None:
        for turn in range(1, 4):
            both = await asyncio.gather(ask(engine, "a"), ask(engine, "b"))
            assert both == [[7] * 9, [7] * 9]
            await until(lambda turn=turn: len(checks) >= turn)  # type: ignore[misc]

    served = Served()
    served.run(work)
    assert not served.died and not any(checks)


def test_blocks_that_do_not_add_up_end_the_engine_with_the_numbers() -> None:
    async def work(engine: AsyncEngine) -> None:
        assert await ask(engine, "a") == [7] * 9
        core = engine._core
        assert core is not None
        core.scheduler.allocator.allocate(0, 1)  # a block that no request holds
        assert await ask(engine, "b") == [7] * 9
        await until(lambda: engine.state == "dead")
        with pytest.raises(EngineDeadError, match="the engine is dead"):
            await ask(engine, "c")

    served = Served()
    served.run(work)
    [err] = served.died
    assert "KV ledger does not balance (1 blocks: (references, holders) differ: {(0, " in str(err)
    assert "\n" not in str(err)


def test_a_picture_of_what_runs() -> None:
    """Also while a step runs: the engine waits for it without its lock."""
    rank = StuckRank()

    async def work(engine: AsyncEngine) -> None:
        before = engine.picture()
        assert before is not None and before.requests == () and before.ranks[0].host == "here"
        rank.going.clear()
        asking = asyncio.create_task(ask(engine, "a-0"))
        await until(lambda: engine._steps.age_s > 0)
        during = await asyncio.to_thread(engine.picture)
        assert during is not None
        (request,) = during.requests
        assert (request.id, request.mode, request.working) == ("a-0", "local", True)
        assert request.why == (
            "one rank has room, and no link was measured; "
            "queries and keys are on one rank, so nothing travels"
        )
        rank.going.set()
        assert await asking == [7] * 9
        after = engine.picture()
        assert after is not None and [e.finish_reason for e in after.recent] == ["length"]
        assert after.counters.generation_tokens == 9 and after.counters.prefill_tokens == 3

    served = Served(rank)
    served.run(work)
    assert not served.died


def test_a_check_waits_for_no_step() -> None:
    """A long prompt is looked through while the engine's thread holds the lock."""

    async def work(engine: AsyncEngine) -> None:
        loop, params = asyncio.get_running_loop(), SamplingParams()
        with engine._lock:
            done = loop.run_in_executor(None, engine.check, [1, 2, 3], params)
            await asyncio.wait_for(done, 60)
            wrong = loop.run_in_executor(None, engine.check, [1, 50], params)
            with pytest.raises(RequestError, match="token id 50 of the prompt") as caught:
                await asyncio.wait_for(wrong, 60)
        assert caught.value.param == "prompt"

    Served().run(work)


def test_a_request_that_comes_while_the_engine_stops_is_refused() -> None:
    """The engine's thread may be in its last step still: nothing would ever answer it."""

    async def work(engine: AsyncEngine) -> None:
        stopping = asyncio.create_task(engine.stop(10))
        with engine._lock:  # the thread cannot see yet that it should stop
            engine._stopping = engine._refusing = True
        with pytest.raises(EngineDeadError, match="stopping"):
            await asyncio.wait_for(ask(engine, "late"), 60)
        await stopping

    served = Served()
    served.run(work)
    assert not served.died


class StuckRank(OneRank):
    """Draws nothing while ``going`` is not set."""

    def __init__(self) -> None:
        super().__init__()
        self.going = threading.Event()
        self.going.set()
        self.failure: DsCpError | None = None

    def outcome(self) -> Outcome:
        assert self.going.wait(60)
        if self.failure is not None:
            raise self.failure
        return super().outcome()


async def told(asking: asyncio.Task[list[int]]) -> BaseException | None:
    await asyncio.wait({asking}, timeout=60)
    return asking.exception()


def test_a_step_that_takes_too_long_is_seen_until_it_ends() -> None:
    rank = StuckRank()

    async def work(engine: AsyncEngine) -> None:
        assert engine.state == "ready" and engine.stats().step_age_seconds == 0
        rank.going.clear()
        asking = asyncio.create_task(ask(engine, "a"))
        await until(lambda: engine.state == "stalled")
        assert engine.stats().step_age_seconds > 0.5
        also = asyncio.create_task(ask(engine, "b"))  # it waits with the others
        rank.going.set()
        assert await asking == await also == [7] * 9
        await until(lambda: engine.state == "ready" and not engine.stats().step_age_seconds)

    served = Served(rank, {"stall_s": 0.5})
    served.run(work)
    assert not served.died


def test_a_drain_refuses_what_comes_and_finishes_what_runs() -> None:
    rank = StuckRank()

    async def work(engine: AsyncEngine) -> None:
        rank.going.clear()
        asking = asyncio.create_task(ask(engine, "a"))
        await until(lambda: engine._steps.age_s > 0)
        engine.refuse_new()
        assert engine.state == "stopping"
        for refused in (ask(engine, "b"), asyncio.to_thread(engine.check, [1], SamplingParams())):
            with pytest.raises(StoppingError):
                await refused
        rank.going.set()
        assert await asking == [7] * 9

    Served(rank).run(work)


@pytest.mark.parametrize("how", ["cut", "fail", "a rank ends during the drain", "it fails at once"])
def test_requests_are_told_at_once_why_they_end(how: str) -> None:
    """Although no step ends: the ranks wait for one that is gone."""
    rank = StuckRank()
    served = Served(rank)

    async def work(engine: AsyncEngine) -> None:
        rank.going.clear()
        asking = asyncio.create_task(ask(engine, "a"))
        await until(lambda: engine._steps.age_s > 0)
        if how == "cut":
            engine.cut()
        elif how == "fail":
            engine.fail("rank 1 is gone")
        else:
            if how.endswith("drain"):
                engine.refuse_new()
            rank.failure = CommError("a peer is gone")
            rank.going.set()
        deliberate = how in ("cut", "a rank ends during the drain")
        assert type(await told(asking)) is (StoppingError if how == "cut" else EngineDeadError)
        assert engine.state == ("stopping" if deliberate else "dead")
        with pytest.raises(StoppingError if deliberate else EngineDeadError) as caught:
            await ask(engine, "late")
        assert type(caught.value) is (StoppingError if deliberate else EngineDeadError)
        if not deliberate:
            assert engine.stats().step_age_seconds == 0
        rank.failure = CommError("a peer is gone")
        rank.going.set()
        engine._thread.join(60)

    served.run(work)
    assert len(served.died) == (how != "fail")


def test_listeners_hear_of_each_answer_that_ends_in_the_event_loop() -> None:
    """However it ends: by itself, by its client, or because the server stops."""
    rank = StuckRank()
    heard: list[tuple[str, str, int]] = []
    threads: set[int] = set()

    def listen(ended: EndedRequest) -> None:
        heard.append((ended.request_id, ended.finish_reason, ended.new_tokens))
        threads.add(threading.get_ident())

    async def work(engine: AsyncEngine) -> None:
        engine.on_ended(listen)
        assert await ask(engine, "a") == [7] * 9
        rank.going.clear()
        asking = asyncio.create_task(ask(engine, "b"))
        await until(lambda: engine._steps.age_s > 0)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        await until(lambda: len(heard) == 2)
        rank.going.set()

    Served(rank).run(work)
    assert heard == [("a", "length", 9), ("b", "abort", 0)]
    assert threads == {threading.get_ident()}
