"""The engine's thread over a simulated worker: it checks its block counts whenever it is idle."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest

from ds_cp.config import load_config
from ds_cp.engine.core import EngineCore
from ds_cp.errors import DsCpError, EngineDeadError, RequestError
from ds_cp.facts import Facts
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
    def __init__(self) -> None:
        self.died: list[DsCpError] = []
        self.engine: AsyncEngine

    def run(self, work: Callable[[AsyncEngine], Any]) -> None:
        async def main() -> None:
            ready = asyncio.Event()
            loop = asyncio.get_running_loop()
            self.engine = AsyncEngine(
                load_config({"model": "pretended"}), "pretended", OneRank(), loop, lambda: None,
                lambda _: loop.call_soon_threadsafe(ready.set),  # type: ignore[arg-type, return-value]
                lambda err, _: self.died.append(err),
            )  # fmt: skip
            self.engine.start()
            await asyncio.wait_for(ready.wait(), 10)
            await asyncio.wait_for(work(self.engine), 20)
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


def test_a_check_waits_for_no_step() -> None:
    """A long prompt is looked through while the engine's thread holds the lock."""

    async def work(engine: AsyncEngine) -> None:
        loop, params = asyncio.get_running_loop(), SamplingParams()
        with engine._lock:
            done = loop.run_in_executor(None, engine.check, [1, 2, 3], params)
            await asyncio.wait_for(done, 5)
            wrong = loop.run_in_executor(None, engine.check, [1, 50], params)
            with pytest.raises(RequestError, match="token id 50 of the prompt") as caught:
                await asyncio.wait_for(wrong, 5)
        assert caught.value.param == "prompt"

    Served().run(work)


def test_a_request_that_comes_while_the_engine_stops_is_refused() -> None:
    """The engine's thread may be in its last step still: nothing would ever answer it."""

    async def work(engine: AsyncEngine) -> None:
        stopping = asyncio.create_task(engine.stop(10))
        with engine._lock:  # the thread cannot see yet that it should stop
            engine._stopping = True
        with pytest.raises(EngineDeadError, match="stopping"):
            await asyncio.wait_for(ask(engine, "late"), 5)
        await stopping

    served = Served()
    served.run(work)
    assert not served.died
