"""Memory that was freed goes back to the system."""

from __future__ import annotations

import asyncio
import ctypes

TRIM_BYTES = 32 * 2**20  # bytes that requests have held and released between two trims
TRIM_AFTER_S = 0.5  # seconds from the release, in which the request's objects end


class Trimmer:
    """Has glibc return the free pages of its heap once many megabytes of answers were released.

    By itself it keeps them: the pieces of answers that grew side by side leave gaps between what
    lives on. Where the C library has no such call, nothing is done.
    """

    def __init__(self) -> None:
        self._trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        self._released = 0
        self._due = False

    def released(self, size: int) -> None:
        """Some request has released ``size`` bytes. Called in the event loop."""
        self._released += size
        if self._trim is not None and not self._due and self._released >= TRIM_BYTES:
            self._due = True
            asyncio.get_running_loop().call_later(TRIM_AFTER_S, self._start)

    def _start(self) -> None:
        self._due, self._released = False, 0
        assert self._trim is not None
        # In a thread: ctypes lets go of the interpreter meanwhile.
        asyncio.get_running_loop().run_in_executor(None, self._trim, 0)
