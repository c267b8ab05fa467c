"""Our own launcher: n ranks of one command on this machine, started, watched and ended together."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType

from ds_cp.errors import LaunchError
from ds_cp.log_stream import say
from ds_cp.process import StopSignals, die_with_parent

LAUNCHER = "ds-cp"  # as ranks learn it from their environment
POLL_S = 0.05  # seconds between looks at the ranks
# Seconds between SIGTERM and SIGKILL when a rank has failed. Most ranks end by themselves within
# them; about once in a hundred failures under load, gloo misses that a peer is gone and waits
# comm.timeout_s.
FAILURE_GRACE_S = 5.0
# Seconds after a second signal until SIGKILL. Clients are told meanwhile; what a rank waits for at
# most, from their end to its last words, is some 7 s together.
HURRY_GRACE_S = 8.0
# How often a rank is started again, each time that it has not lived for so many seconds.
RETRIES, LIVED_S = 3, 60.0
# Signals that every rank gets as well.
_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def own_command() -> list[str]:
    """The command line of this process, for a rank."""
    script = sys.argv[0]
    program = ["-m", "ds_cp.cli"] if Path(script).name == "__main__.py" else [script]
    return [sys.executable, *program, *sys.argv[1:]]


def spawn(
    command: Sequence[str], ranks: int, env: Mapping[str, str], *, grace_s: float,
    works: Callable[[], bool] = lambda: False, min_ranks: int | None = None,
) -> int:  # fmt: skip
    """Run ``command`` on ``ranks`` ranks and wait for all of them; the exit code of the job.

    SIGINT, SIGTERM and SIGHUP are passed on to every rank, which then has ``grace_s`` seconds to
    end, and more for as long as ``works()``. A second signal is passed on as SIGINT, which hurries
    them; a third kills them at once (``StopSignals`` counts them). When a rank fails, the others
    are ended; but with ``min_ranks``, as long as so many are left, one other than 0 that was killed
    is started again, and when that fails the others go on without it. The kernel kills the ranks
    when this process dies, and processes that a rank leaves behind in its session are killed with
    it.

    ``LaunchError`` when a process cannot be started.
    """
    with _recorded_signals() as received:
        watch = _Ranks(command, env, received, grace_s, works, min_ranks)
        try:
            watch.start(ranks)
            while watch.alive:
                watch.step()
                time.sleep(POLL_S)
        finally:
            watch.kill()
    return watch.exit_code()


class _Ranks:
    def __init__(
        self, command: Sequence[str], env: Mapping[str, str], received: list[int], grace_s: float,
        works: Callable[[], bool], min_ranks: int | None,
    ) -> None:  # fmt: skip
        self._command = list(command)
        self._env = dict(env)
        self._min_ranks = min_ranks
        self._tries: dict[int, int] = {}  # of ranks that were started again
        self._began: dict[int, float] = {}  # in time.monotonic(), of each rank's process
        self.alive: dict[int, subprocess.Popen[bytes]] = {}
        self._received = received
        self._handled = 0
        self._signals = StopSignals()
        self._grace_s = grace_s
        self._works = works
        self._kill_at: float | None = None
        self._first_failure: tuple[int, int] | None = None  # rank, return code

    def start(self, ranks: int) -> None:
        port = _free_port()
        place = {
            "WORLD_SIZE": ranks,
            "LOCAL_WORLD_SIZE": ranks,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "DS_CP_LAUNCHER": LAUNCHER,
        }
        self._env.update({name: str(value) for name, value in place.items()})
        for rank in range(ranks):
            self._start(rank)

    def _start(self, rank: int) -> None:
        try:
            self.alive[rank] = subprocess.Popen(
                self._command,
                env={**self._env, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                preexec_fn=die_with_parent(os.getpid()),
            )
        except OSError as err:
            ranks = self._env["WORLD_SIZE"]
            raise LaunchError(
                f"cannot start rank {rank} of {ranks}: {err.strerror or err}"
            ) from None
        self._began[rank] = time.monotonic()

    def step(self) -> None:
        """Pass on new signals, reap ranks that have ended, kill the rest past the deadline."""
        for number in self._received[self._handled :]:
            self._handled += 1
            if not self._signals.take(number):
                continue
            if self._signals.count > 2:
                self.kill()
            elif self._signals.count == 2:
                self._end(signal.SIGINT, HURRY_GRACE_S)
            else:
                self._end(signal.SIGTERM if number == signal.SIGHUP else number, self._grace_s)
        for rank, process in list(self.alive.items()):
            if _has_ended(process):
                self._collect(rank)
        if self._kill_at is not None and time.monotonic() >= self._kill_at:
            if self._signals.count > 1 or not self._works():
                self.kill()

    def kill(self) -> None:
        """Kill every rank that is left."""
        for rank in list(self.alive):
            self._collect(rank)

    def exit_code(self) -> int:
        if signal.SIGINT in self._received:
            return 128 + signal.SIGINT
        if self._first_failure is None:
            return 0
        rank, code = self._first_failure
        if not self._received and rank != 0 and code == 1:  # else it was said already, or by rank 0
            say(f"error: rank {rank} failed; the job was ended")
        return 128 - code if code < 0 else code

    def _end(self, number: int, grace_s: float) -> None:
        self._kill_at = time.monotonic() + grace_s
        for process in self.alive.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, number)  # Popen.send_signal would reap one that has ended

    def _collect(self, rank: int) -> None:
        """Reap one rank, after killing what is left of its session.

        In this order: until the rank is reaped, no other process group can have its number.
        """
        process = self.alive.pop(rank)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        code = process.wait()
        if code != 0 and self._goes_on(rank, code):
            return
        if code != 0 and self._first_failure is None:
            self._first_failure = (rank, code)
            if self._kill_at is None:
                self._end(signal.SIGTERM, FAILURE_GRACE_S)
            if code < 0 and not self._received:  # at once: the other ranks' words come later
                say(f"error: rank {rank} was ended by {_signal_name(-code)}; the job was ended")

    def _goes_on(self, rank: int, code: int) -> bool:
        """Whether the others go on without a rank that has failed. It is started again, unless
        that was in vain. One that leaves by itself, and was not started again, says why the job
        ends."""
        if self._kill_at is not None and rank in self._tries:
            return True  # the job ends, perhaps before this rank was back in it
        if self._min_ranks is None or rank == 0 or 0 not in self.alive:
            return False
        if self._kill_at is not None or len(self.alive) < self._min_ranks:
            return False
        if code > 0 and rank not in self._tries:
            return False
        if time.monotonic() - self._began[rank] >= LIVED_S:
            self._tries[rank] = 0
        tries = self._tries[rank] = self._tries.get(rank, 0) + 1
        how = f"was ended by {_signal_name(-code)}" if code < 0 else f"left with exit code {code}"
        if tries > RETRIES:
            say(f"warning: rank {rank} {how} {RETRIES} times in a row; it is not started again")
            return True
        say(f"warning: rank {rank} {how}; it is started again")
        self._start(rank)
        return True


@contextlib.contextmanager
def _recorded_signals() -> Iterator[list[int]]:
    """Inside the block, signals are appended to the list instead of ending this process."""
    received: list[int] = []

    def record(number: int, frame: FrameType | None) -> None:
        received.append(number)

    before = {number: signal.signal(number, record) for number in _FORWARDED}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _has_ended(process: subprocess.Popen[bytes]) -> bool:
    """Whether a child has ended, without reaping it."""
    found = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    return found is not None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _signal_name(number: int) -> str:
    name = signal.Signals(number).name
    return f"{name} (out of memory?)" if number == signal.SIGKILL else name
