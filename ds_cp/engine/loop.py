"""One step runs while the next one is planned: the same loop for the server and for scripts."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from ds_cp.engine.core import EngineCore
from ds_cp.engine.params import Delta
from ds_cp.engine.plan import Outcome, StepPlan

DEPTH = 2  # steps under way: one runs, one is ready


class Runner(Protocol):
    """Whoever executes plans, in order."""

    def submit(self, plan: StepPlan) -> None:
        """Give a plan; returns at once."""
        ...

    def outcome(self) -> Outcome:
        """Wait for the oldest submitted plan. Raises what its execution raised."""
        ...


class ThreadRunner:
    """Runs plans in a thread of this process; torch lets go of the interpreter while it
    computes."""

    def __init__(self, lead: Callable[[StepPlan], Outcome]) -> None:
        self._lead = lead
        self._thread = ThreadPoolExecutor(1, "ds_cp steps")
        self._flying: list[Future[Outcome]] = []

    def submit(self, plan: StepPlan) -> None:
        self._flying.append(self._thread.submit(self._lead, plan))

    def outcome(self) -> Outcome:
        return self._flying.pop(0).result()

    def close(self) -> None:
        """Wait for what runs, and end the thread."""
        self._thread.shutdown(wait=True)


class StepLoop:
    """Drives a core over a runner. ``guard`` is held while the core is touched, never while ranks
    work."""

    def __init__(
        self, core: EngineCore, runner: Runner, guard: AbstractContextManager[object] | None = None
    ) -> None:
        self._core = core
        self._runner = runner
        self._guard = guard or nullcontext()
        self.num_flying = 0

    def advance(self) -> list[Delta]:
        """Submit the next step if there is one; once two are under way, or nothing more can be
        planned, wait for the oldest and return what it adds."""
        with self._guard:
            plan = self._core.plan()
        if plan is not None:
            self._runner.submit(plan)
            self.num_flying += 1
        if self.num_flying == 0 or (plan is not None and self.num_flying < DEPTH):
            return []
        outcome = self._runner.outcome()
        self.num_flying -= 1
        with self._guard:
            return self._core.apply(outcome)

    def settle(self) -> None:
        """Wait for the steps under way and drop what they bring: their requests are gone."""
        while self.num_flying:
            self._runner.outcome()
            self.num_flying -= 1
