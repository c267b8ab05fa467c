"""Engines one after the other on the same ranks, driven step by step from rank 0."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from ds_cp.config import Config
from ds_cp.engine.core import EngineCore
from ds_cp.engine.loop import PipelinedLoop, ThreadRunner
from ds_cp.facts import Facts
from ds_cp.layout import total
from ds_cp.outputs import Delta
from ds_cp.plan import Outcome, Plan, StepPlan, Stop
from ds_cp.sampling_params import SamplingParams
from ds_cp.scheduler.build import build_scheduler
from ds_cp.worker.worker import Worker


class Driver:
    """Rank 0's engine between two stops: requests come at any time, and every delta is stamped."""

    def __init__(self, worker: Worker, runner: ThreadRunner, facts: Facts, config: Config) -> None:
        self.core = EngineCore(build_scheduler(config, facts), None)
        self.stamps: dict[str, list[float]] = {}  # request -> when each of its tokens came
        self.cached: dict[str, int] = {}
        self.chunks: dict[int, list[tuple[float, int]]] = {}  # number -> (given at, tokens)
        self._worker = worker
        self._runner = runner
        runner.lead = self._lead
        self._loop = PipelinedLoop(self.core, self._runner)
        self._live: set[str] = set()

    def add(self, name: str, prompt: Sequence[int], new: int) -> int:
        """Queue a greedy request; returns its number in plans."""
        params = SamplingParams(max_tokens=new, temperature=0.0, ignore_eos=True)
        self.stamps[name] = []
        self._live.add(name)
        return self.core.add(name, prompt, params)[0].number

    def advance(self) -> list[Delta]:
        deltas = self._loop.advance()
        now = time.perf_counter()
        for delta in deltas:
            self.stamps[delta.request_id].append(now)
            if delta.cached_tokens is not None:
                self.cached[delta.request_id] = delta.cached_tokens
            if delta.finish_reason is not None:
                self._live.discard(delta.request_id)
        return deltas

    def until(self, done: Callable[[], bool]) -> None:
        while not done():
            if not self.advance() and not self._live:
                raise RuntimeError("all requests ended before what was waited for")

    def first_tokens(self, requests: dict[str, list[int]], new: int) -> list[float]:
        """Seconds to the first token of each request when all come at once and no other runs."""
        began = time.perf_counter()
        for name, prompt in requests.items():
            self.add(name, prompt, new)
        self.until(lambda: not self._live)
        return [self.stamps[name][0] - began for name in requests]

    def _lead(self, plan: Plan) -> Outcome:
        for chunk in plan.chunks if isinstance(plan, StepPlan) else ():
            tokens = sum(total(runs) for _, runs in chunk.owners)
            self.chunks.setdefault(chunk.request, []).append((time.perf_counter(), tokens))
        return self._worker.lead(plan)

    def close(self) -> None:
        for name in self._live:
            self.core.abort(name)
        self._loop.settle()
        self._runner.call(lambda: self._worker.lead(Stop())).result()


class Sessions:
    """Engines one after the other on the same ranks. Every rank opens each; only rank 0 gets a
    driver, the others have followed it to its end when the block is left."""

    def __init__(
        self, worker: Worker, runner: ThreadRunner, facts: Facts, config: Callable[[float], Config]
    ) -> None:
        self._worker, self._runner, self._facts, self._config = worker, runner, facts, config
        self.is_driver = worker.world.rank == 0

    @contextmanager
    def open(self, slowdown: float = 2.0) -> Iterator[Driver | None]:
        if not self.is_driver:
            yield None
            self._worker.follow()
            return
        driver = Driver(self._worker, self._runner, self._facts, self._config(slowdown))
        try:
            yield driver
        finally:
            driver.close()


def text(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(100, 40_000) for _ in range(count)]
