"""Processes that one process forks for another: the child of a fork server is its supervisor's.

A supervisor that adopts (``adopt``) becomes the parent of what a descendant leaves behind. So
the server forks twice, the process in between ends at once, and the supervisor sees the end of the
last one as that of any child. Linux.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol

from ds_cp.process import die_with_parent

ADOPTION_S = 5.0  # seconds in which a forked process becomes the supervisor's
_PR_SET_CHILD_SUBREAPER, _PR_SET_NAME = 36, 15  # of prctl(2)
_ARG_START, _ARG_END = 45, 46  # in /proc/self/stat, after the name


class WorkerProcess(Protocol):
    """A child of this process, as ``subprocess.Popen`` is one."""

    @property
    def pid(self) -> int:
        """Its number."""
        ...

    @property
    def returncode(self) -> int | Any:
        """Its exit code, or the negative number of the signal that ended it, once that is known."""
        ...

    def poll(self) -> int | None:
        """Look whether it has ended."""
        ...

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end. Raises ``subprocess.TimeoutExpired``."""
        ...

    def kill(self) -> None:
        """End it; nothing happens when it has ended."""
        ...


class Adopted:
    """A ``WorkerProcess`` that another process has forked and this one has adopted."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """As ``Popen.poll``."""
        if self.returncode is None:
            self._reap(os.WNOHANG)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """As ``Popen.wait``."""
        if self.returncode is None and timeout is not None and not self._ends_within(timeout):
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
        while self.returncode is None:
            self._reap(0)
        return self.returncode

    def kill(self) -> None:
        """As ``Popen.kill``: its number is its own until it is waited for."""
        if self.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)

    def _ends_within(self, seconds: float) -> bool:
        try:
            handle = os.pidfd_open(self.pid)
        except OSError:  # it has ended, and was no child of ours
            return True
        try:
            poll = select.poll()
            poll.register(handle, select.POLLIN)
            return bool(poll.poll(seconds * 1000))
        finally:
            os.close(handle)

    def _reap(self, options: int) -> None:
        try:
            pid, status = os.waitpid(self.pid, options)
        except ChildProcessError:  # it ended before it became a child of ours
            self.returncode = -signal.SIGKILL
            return
        if pid == self.pid:
            self.returncode = os.waitstatus_to_exitcode(status)


def adopt(on: bool) -> None:
    """From now on this process adopts what its descendants leave behind, or not any more."""
    _prctl(_PR_SET_CHILD_SUBREAPER, int(on))


def can_fork_servers() -> bool:
    """Whether this system has what a fork server needs."""
    return sys.platform.startswith("linux") and hasattr(os, "pidfd_open")


def fork_for(supervisor: int, work: Callable[[], object]) -> None:
    """Run ``work`` in a process that is a child of the process ``supervisor``, an ancestor that
    adopts, and ends with that. ``work`` does not return. Only for a process without threads.

    Raises ``OSError`` when there is no room for another process."""
    ask = die_with_parent(supervisor)
    between = os.fork()
    if between == 0:
        code = 1
        with suppress(BaseException):
            if os.fork() == 0:
                _become(supervisor, ask, work)
            code = 0
        os._exit(code)
    if os.waitstatus_to_exitcode(os.waitpid(between, 0)[1]):
        raise OSError("no other process could be forked")


def _become(supervisor: int, ask: Callable[[], None], work: Callable[[], object]) -> None:
    """In the last process: wait until it is adopted, and work."""
    try:
        limit = time.monotonic() + ADOPTION_S
        while os.getppid() != supervisor and time.monotonic() < limit:
            time.sleep(0.0005)
        ask()
        work()
    finally:
        os._exit(1)  # it does not go on with what its parent was about


def count_threads() -> int:
    """Threads of this process."""
    return len(os.listdir("/proc/self/task"))


def rename(module: str, new: str, name: str) -> None:
    """Let this process show ``new`` instead of ``module`` in its command line, where it fits, and
    ``name`` (15 letters) as its own name."""
    buffer = ctypes.create_string_buffer(name.encode()[:15])
    _prctl(_PR_SET_NAME, ctypes.addressof(buffer))
    with suppress(OSError, ValueError, IndexError):
        with open("/proc/self/stat") as file:
            fields = file.read().rpartition(") ")[2].split()
        start, end = int(fields[_ARG_START]), int(fields[_ARG_END])
        shown = ctypes.string_at(start, end - start).rstrip(b"\0")
        changed = shown.replace(module.encode(), new.encode(), 1)
        if changed != shown and len(changed) < end - start:
            ctypes.memmove(start, changed.ljust(end - start, b"\0"), end - start)


def _prctl(option: int, value: int) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(option, ctypes.c_ulong(value), 0, 0, 0)
