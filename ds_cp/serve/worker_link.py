"""How the front's engine reaches rank 0's worker: in a process of its own, over the channel, or in
a thread of this process."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, Protocol

from ds_cp.engine.loop import ThreadRunner
from ds_cp.errors import EngineDeadError
from ds_cp.plan import Outcome, Plan, Stop
from ds_cp.serve.channel import Channel, Failed, FromWorker, Ready, Result

Sent = dict[str, tuple[int, int]]  # scheme -> (bytes, exchanges)
Lead = Callable[[Plan], Outcome]
ReadSent = Callable[[], Sent]


class WorkerLink(Protocol):
    """Rank 0's worker as the engine's thread sees it."""

    @property
    def sent(self) -> Sent:
        """What rank 0 has sent so far."""
        ...

    def ready(self) -> Ready:
        """Wait until the worker can run plans."""
        ...

    def submit(self, plan: Plan) -> None: ...

    def outcome(self) -> Outcome: ...

    def leave(self) -> None:
        """Tell all ranks to stop, once nothing is under way."""
        ...


class WorkerFailedError(EngineDeadError):
    """The worker has reported its failure, with its exit code."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class WorkerLostError(EngineDeadError):
    """The worker is gone and has reported nothing; its supervisor knows how it ended."""


class ProcessLink:
    """A worker process on the other side of a socket."""

    def __init__(self, channel: Channel) -> None:
        self._sent: Sent = {}
        self._channel = channel

    @property
    def sent(self) -> Sent:
        """As of the newest outcome."""
        return self._sent

    def ready(self) -> Ready:
        """The worker's first message."""
        ready: Ready = self._expect(Ready)
        return ready

    def submit(self, plan: Plan) -> None:
        """Send a plan; the worker runs it when it is done with the one before."""
        try:
            self._channel.send(plan)
        except EngineDeadError as err:
            raise WorkerLostError(str(err)) from err

    def outcome(self) -> Outcome:
        """The oldest plan's outcome."""
        result: Result = self._expect(Result)
        self._sent = result.sent
        return result.outcome

    def leave(self) -> None:
        """Send the last plan, which gets no answer."""
        with contextlib.suppress(EngineDeadError):
            self._channel.send(Stop())

    def _expect(self, kind: type) -> Any:
        try:
            message = self._channel.receive(FromWorker)
        except EngineDeadError as err:
            raise WorkerLostError(str(err)) from err
        if isinstance(message, Failed):
            raise WorkerFailedError(message.message, message.exit_code)
        assert isinstance(message, kind)
        return message


class LocalLink:
    """A worker in this process. It is built, and steps, in a thread of its own, the only one that
    computes.

    ``build`` returns three things: the function that runs a plan, the one that reads the bytes that
    rank 0 has sent, and the worker's ``Ready`` message.
    """

    def __init__(self, build: Callable[[], tuple[Lead, ReadSent, Ready]]) -> None:
        self._runner = ThreadRunner()
        self._building = self._runner.call(build)
        self._read_sent: ReadSent | None = None

    @property
    def sent(self) -> Sent:
        """As of now."""
        return self._read_sent() if self._read_sent is not None else {}

    def ready(self) -> Ready:
        """The message of a worker that is built. Raises the error of its start."""
        self._runner.lead, self._read_sent, ready = self._building.result()
        return ready

    def submit(self, plan: Plan) -> None:
        """Queue a plan for the thread."""
        self._runner.submit(plan)

    def outcome(self) -> Outcome:
        """The oldest plan's outcome."""
        return self._runner.outcome()

    def leave(self) -> None:
        """Run the last plan and end the thread."""
        self._runner.submit(Stop())
        self._runner.outcome()
        self._runner.close()
