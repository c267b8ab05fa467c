"""How a process of ours settles once it is up, and how it ends, at once or with its parent.

No torch here.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import NoReturn

from ds_cp.log_stream import LogStream, drain_streams

SAME_S = 1.0  # seconds within which signals that ask for an end are one
_PR_SET_PDEATHSIG = 1  # of prctl(2)


def settle_heap() -> None:
    """Take what is alive now out of the garbage collector's sight: call it once all is loaded.

    The modules of torch and transformers and a model are some 200,000 objects that stay. A full
    collection walks them with everything stopped, 45 ms and more, whenever a large body or a long
    answer has made as many new objects as a quarter of them. What comes later is collected."""
    gc.collect()
    gc.freeze()


def leave_process(code: int) -> NoReturn:
    """End this process at once: taking torch down in order needs seconds, and may abort the process
    after a failed collective (``World.leave``). The exit code is 1 instead of 0 when what was
    written cannot be flushed; a ``LogStream`` gets a limited time, and loses the rest."""
    for stream in (sys.stdout, sys.stderr):
        if not isinstance(stream, LogStream):
            try:
                stream.flush()
            except OSError:  # the reader has left, or the disk is full
                code = code or 1
    drain_streams()
    os._exit(code)


@contextlib.contextmanager
def importing(*, for_good: bool = False) -> Iterator[None]:
    """Inside, Python's collector of cycles rests: what torch and transformers bring stays, and to
    walk it again and again while it grows takes a quarter of the time of their import.

    ``for_good``: in a process that is ours alone, so that ``settle_heap`` has less to walk.
    """
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if for_good:
            gc.freeze()
        if before:
            gc.enable()


class StopSignals:
    """Counts the signals that ask this process to end.

    A launcher passes on what systemd sent to every process as well: what comes within ``SAME_S``
    seconds of the last one that counted is the same one, unless it is the first SIGINT, which asks
    for more than SIGTERM does.
    """

    def __init__(self) -> None:
        self.count = 0
        self._last = -math.inf  # in time.monotonic()
        self._interrupted = False

    def take(self, number: int) -> bool:
        """Take one that has come; whether it is a new one."""
        now = time.monotonic()
        more = number == signal.SIGINT and not self._interrupted
        if now - self._last < SAME_S and not more:
            return False
        self._interrupted |= number == signal.SIGINT
        self._last = now
        self.count += 1
        return True


def die_with_parent(parent: int) -> Callable[[], None]:
    """What a child calls so that the kernel kills it when process ``parent`` dies.

    Made before the fork where there is one (it is a ``preexec_fn``), because loading a library is
    not safe after it. Elsewhere than on Linux the child only looks once whether its parent lives.
    """
    libc = ctypes.CDLL(None, use_errno=True) if sys.platform.startswith("linux") else None

    def ask() -> None:
        if libc is not None:
            libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the request
            os._exit(1)

    return ask
