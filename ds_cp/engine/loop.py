"""One step runs while the next one is planned: for the server, whose ranks are other processes, and
for scripts, which are a rank themselves."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol, TypeVar

from ds_cp.engine.core import EngineCore
from ds_cp.outputs import Delta
from ds_cp.plan import Outcome, Plan, StepPlan

T = TypeVar("T")
DEPTH = 2  # steps under way: one runs, one is ready


class Runner(Protocol):
    """Executes plans, in order."""

    def submit(self, plan: Plan) -> None:
        """Queue a plan; returns at once."""
        ...

    def outcome(self) -> Outcome:
        """Wait for the oldest submitted plan. Raises what its execution raised."""
        ...


class ThreadRunner:
    """Runs plans in a thread of this process; torch lets go of the interpreter while it
    computes.

    All that computes in this process belongs in that thread (``call``): torch keeps a pool of CPU
    threads for each thread that computes, and two pools slow each other down by half.
    """

    def __init__(self, lead: Callable[[Plan], Outcome] | None = None) -> None:
        self.lead = lead
        self._thread = ThreadPoolExecutor(1, "ds_cp steps")
        self._in_flight: list[Future[Outcome]] = []

    def call(self, work: Callable[[], T]) -> Future[T]:
        """Run ``work`` in the thread."""
        return self._thread.submit(work)

    def submit(self, plan: Plan) -> None:
        """Queue a plan for the thread."""
        assert self.lead is not None
        self._in_flight.append(self._thread.submit(self.lead, plan))

    def outcome(self) -> Outcome:
        """Wait for the oldest plan's outcome; raises what its execution raised."""
        return self._in_flight.pop(0).result()

    def close(self) -> None:
        """Wait for the plan that runs, and end the thread."""
        self._thread.shutdown(wait=True)


class PipelinedLoop:
    """Drives a core over a runner. ``guard`` is held while the core is touched, never while ranks
    work."""

    def __init__(
        self, core: EngineCore, runner: Runner, guard: AbstractContextManager[object] | None = None
    ) -> None:
        self._core = core
        self._runner = runner
        self._guard = guard or nullcontext()
        self.num_in_flight = 0

    def advance(self) -> list[Delta]:
        """Submit the next step if there is one; once two are under way, or nothing more can be
        planned, wait for the oldest and return what it adds."""
        with self._guard:
            plan = self._core.plan()
        if plan is not None:
            self._runner.submit(plan)
            self.num_in_flight += 1
        if self.num_in_flight == 0 or (plan is not None and self.num_in_flight < DEPTH):
            return []
        outcome = self._runner.outcome()
        self.num_in_flight -= 1
        with self._guard:
            return self._core.apply(outcome)

    def forget(self) -> None:
        """The steps under way will have no outcome."""
        self.num_in_flight = 0

    def settle(self) -> None:
        """Wait for the steps under way; their tokens belong to requests that are gone."""
        while self.num_in_flight:
            self.num_in_flight -= 1
            outcome = self._runner.outcome()
            with self._guard:
                self._core.apply(outcome)


class InlineLoop:
    """Drives a core over ``lead``, which runs a plan in the caller's own thread: the one in which
    torch has its pool of CPU threads already (see ``ThreadRunner``). Meanwhile a helper thread
    applies the outcome of the step before and plans the step after."""

    def __init__(self, core: EngineCore, lead: Callable[[StepPlan], Outcome]) -> None:
        self._core = core
        self._lead = lead
        self._helper = ThreadPoolExecutor(1, "ds_cp plans")
        self._planned: StepPlan | None = None
        self._outcome: Outcome | None = None
        # Whether a step did not end: KV that the scheduler counts as computed may not be there.
        self.failed = False

    @property
    def num_in_flight(self) -> int:
        """Steps that are planned, or whose outcome is not applied yet."""
        return (self._planned is not None) + (self._outcome is not None)

    def advance(self) -> list[Delta]:
        """Run the next step and return the deltas of the one before it; once nothing more can be
        planned, those of the last one."""
        plan = self._planned or self._core.plan()
        self._planned = None
        if plan is None:
            return self._apply_last()
        self.failed = True  # until it has ended
        beside = self._helper.submit(self._while_running)
        try:
            outcome = self._lead(plan)
        finally:
            deltas, planned = _ended(beside)
        self._outcome, self._planned = outcome, planned  # after a failure nothing else is run
        self.failed = False
        return deltas

    def _while_running(self) -> tuple[list[Delta], StepPlan | None]:
        return self._apply_last(), self._core.plan()

    def _apply_last(self) -> list[Delta]:
        outcome, self._outcome = self._outcome, None
        return [] if outcome is None else self._core.apply(outcome)

    def settle(self) -> None:
        """Run the step that is planned, so that workers and scheduler agree; its tokens belong to
        requests that are gone. Then end the helper thread."""
        try:
            self._apply_last()
            if self._planned is not None:
                plan, self._planned = self._planned, None
                self.failed = True
                self._core.apply(self._lead(plan))
                self.failed = False
        finally:
            self._helper.shutdown(wait=True)


def _ended(future: Future[T]) -> T:
    """The result of something short. After Ctrl-C too it returns only when the work has ended: the
    code that follows must not meet another thread."""
    try:
        return future.result()
    except KeyboardInterrupt:
        wait([future])
        raise
