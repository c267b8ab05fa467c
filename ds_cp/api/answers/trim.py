"""Memory that was freed goes back to the system."""

from __future__ import annotations

import asyncio
import ctypes

TRIM_BYTES = 8 * 2**20  # bytes that requests have held and released between two trims
TRIM_AFTER_S = 0.5  # seconds from the release, in which the request's objects end
TRIM_EVERY_S = 3.0  # seconds between two trims at least


class Trimmer:
    """Has glibc return the free pages of its heap once many megabytes of answers were released.

    By itself it keeps them: the pieces of answers that grew side by side leave gaps between what
    lives on. Where the C library has no such call, nothing is done.
    """

    def __init__(self) -> None:
        self._trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        self._released = 0
        self._due = False
        self._next = 0.0  # seconds of the loop's clock

    def released(self, size: int) -> None:
        """Some request has released ``size`` bytes. Called in the event loop."""
        self._released += size
        if self._trim is not None and not self._due and self._released >= TRIM_BYTES:
            self._due = True
            loop = asyncio.get_running_loop()
            loop.call_at(max(loop.time() + TRIM_AFTER_S, self._next), self._start)

    def _start(self) -> None:
        self._due, self._released = False, 0
        assert self._trim is not None
        loop = asyncio.get_running_loop()
        self._next = loop.time() + TRIM_EVERY_S
        # In a thread, without the interpreter. The event loop waits all the same where it allocates
        # from the arena that is being trimmed: milliseconds for some 100 MB, and so not often.
        loop.run_in_executor(None, self._trim, 0)
