"""How rank 0's engine reaches its worker: a process at the other end of a channel, or a thread of
this process."""

from __future__ import annotations

import contextlib
import queue
from collections.abc import Callable
from typing import Any, Protocol

from ds_cp.engine.loop import ThreadRunner
from ds_cp.errors import EngineDeadError
from ds_cp.plan import Outcome, Plan, Stop
from ds_cp.serve.channel import (
    Channel,
    Failed,
    FromWorker,
    Interrupted,
    Ready,
    Result,
    Resumed,
)

Sent = dict[str, tuple[int, int]]  # scheme -> (bytes, exchanges)
Lead = Callable[[Plan], Outcome]
ReadSent = Callable[[], Sent]


class WorkerLink(Protocol):
    """Rank 0's worker as the engine's thread sees it."""

    @property
    def sent(self) -> Sent:
        """What rank 0 has sent so far, by scheme."""
        ...

    def ready(self) -> Ready:
        """Wait until the worker can run plans."""
        ...

    def submit(self, plan: Plan) -> None:
        """Hand over a plan; it runs after the ones before."""
        ...

    def outcome(self) -> Outcome:
        """Wait for the outcome of the oldest plan without one."""
        ...

    def resume(self) -> Resumed:
        """Wait until all ranks have met again, after ``InterruptedStepsError``."""
        ...

    def leave(self) -> None:
        """End all ranks; no outcome is outstanding."""
        ...


class WorkerFailedError(EngineDeadError):
    """The worker has reported its failure, with its exit code. ``cause_known``: it is more than the
    loss of a peer."""

    def __init__(self, message: str, exit_code: int, cause_known: bool) -> None:
        super().__init__(message)
        self.exit_code = exit_code
        self.cause_known = cause_known


class WorkerLostError(EngineDeadError):
    """The worker ended without a report; its supervisor knows the exit code or signal."""


class InterruptedStepsError(EngineDeadError):
    """The ranks have left their groups, and do not run the plans that have no outcome:
    ``resume``."""


class ProcessLink:
    """A worker process on the other side of a socket. ``outlives``: it is replaced when it dies,
    and outlives its peers."""

    def __init__(self, channel: Channel, outlives: bool = False) -> None:
        self._sent: Sent = {}
        self._channel: Channel | None = channel
        self._outlives = outlives
        self._may_resume = False  # once it was ready
        self.steps_done = 0
        self._generation = 0
        self._next: queue.SimpleQueue[Channel] = queue.SimpleQueue()

    def replace(self, channel: Channel) -> None:
        """From another thread: a new worker takes the place of the one that has died."""
        self._next.put(channel)

    @property
    def sent(self) -> Sent:
        """Up to the newest outcome."""
        return self._sent

    def ready(self) -> Ready:
        """Wait for the worker's ``Ready``."""
        ready: Ready = self._expect(Ready)
        self._may_resume = self._outlives
        return ready

    def submit(self, plan: Plan) -> None:
        """Send a plan; the worker reads it after the one before. Raises ``WorkerLostError`` when
        the worker has ended, or ``InterruptedStepsError``."""
        assert self._channel is not None
        try:
            self._channel.send_plan(plan, self._generation)
        except EngineDeadError as err:
            raise self._lost(err) from err

    def outcome(self) -> Outcome:
        """The oldest plan's outcome."""
        result: Result = self._expect(Result)
        self._sent = result.sent
        self.steps_done += result.outcome.step > 0
        return result.outcome

    def resume(self) -> Resumed:
        """Wait until all ranks have met again, after ``InterruptedStepsError``."""
        while True:
            if self._channel is None:
                self._channel = self._next.get()
            try:
                message = self._channel.receive(FromWorker)
            except EngineDeadError:
                self._channel = None
                continue
            if isinstance(message, Failed):
                raise WorkerFailedError(message.message, message.exit_code, message.cause_known)
            if isinstance(message, Resumed):
                self._generation = message.generation
                return message

    def leave(self) -> None:
        """Send the stop plan, which has no outcome."""
        if self._channel is not None:
            with contextlib.suppress(EngineDeadError):
                self._channel.send_plan(Stop(), self._generation)

    def _expect(self, kind: type) -> Any:
        assert self._channel is not None
        try:
            message = self._channel.receive(FromWorker)
        except EngineDeadError as err:
            raise self._lost(err) from err
        if isinstance(message, Failed):
            raise WorkerFailedError(message.message, message.exit_code, message.cause_known)
        if isinstance(message, Interrupted):
            raise InterruptedStepsError(message.cause)
        assert isinstance(message, kind)
        return message

    def _lost(self, err: EngineDeadError) -> EngineDeadError:
        """The error after the other side's end."""
        if not self._may_resume:
            return WorkerLostError(str(err))
        self._channel = None
        return InterruptedStepsError(str(err))


class LocalLink:
    """A worker in this process. One thread builds it and runs its steps, and computes alone.

    ``build`` returns the function that runs a plan, the one that reads what rank 0 has sent, and
    the ``Ready`` message.
    """

    def __init__(self, build: Callable[[], tuple[Lead, ReadSent, Ready]]) -> None:
        self._runner = ThreadRunner()
        self._building = self._runner.call(build)
        self._read_sent: ReadSent | None = None

    @property
    def sent(self) -> Sent:
        """Up to this moment."""
        return self._read_sent() if self._read_sent is not None else {}

    def ready(self) -> Ready:
        """Wait until the worker is built. Raises what ``build`` raised."""
        self._runner.lead, self._read_sent, ready = self._building.result()
        return ready

    def submit(self, plan: Plan) -> None:
        """Queue a plan for the thread."""
        self._runner.submit(plan)

    def outcome(self) -> Outcome:
        """The oldest plan's outcome."""
        return self._runner.outcome()

    def resume(self) -> Resumed:
        """Never called: a worker in this process ends with it."""
        raise EngineDeadError("the worker of this process cannot be replaced")

    def leave(self) -> None:
        """Run the stop plan and end the thread."""
        self._runner.submit(Stop())
        self._runner.outcome()
        self._runner.close()
