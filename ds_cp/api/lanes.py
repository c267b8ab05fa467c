"""Threads beside the event loop, in two lanes: long work is not in the way of short work."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import TypeVar

from ds_cp.api.errors import RETRY_AFTER, ApiError

THREADS = 2  # pieces of work done at once in each lane
MAX_WAITING = 256  # pieces of work in one lane

Result = TypeVar("Result")


class Lanes:
    """Two pools of threads, each with a bounded line before it."""

    def __init__(self, name: str) -> None:
        self._pools = {
            False: ThreadPoolExecutor(THREADS, thread_name_prefix=f"ds_cp-{name}"),
            True: ThreadPoolExecutor(THREADS, thread_name_prefix=f"ds_cp-long-{name}"),
        }
        self._held = {False: 0, True: 0}  # works in a lane, waiting or in a thread

    def close(self) -> None:
        """Cancel the work that waits for a thread; that in a thread ends by itself."""
        for pool in self._pools.values():
            pool.shutdown(wait=False, cancel_futures=True)

    async def run(self, work: Callable[[Event], Result], *, long: bool, timeout_s: float) -> Result:
        """The result of ``work`` in a thread of a lane. ``work`` gets an event that is set when its
        result is no longer wanted.

        Raises what ``work`` raises, ``TimeoutError`` after ``timeout_s`` seconds, and ``ApiError``
        503 when too many wait.
        """
        if self._held[long] >= MAX_WAITING:
            raise try_again(f"{self._held[long]} texts wait to be tokenized", "tokenize_busy")
        loop, stop = asyncio.get_running_loop(), Event()
        future = loop.run_in_executor(self._pools[long], work, stop)
        self._held[long] += 1
        future.add_done_callback(lambda _: self._leave(long))
        try:
            done, _ = await asyncio.wait({future}, timeout=timeout_s)
            if not done:
                raise TimeoutError(f"not done within {timeout_s:g} s")
            return future.result()
        finally:
            stop.set()
            future.cancel()

    def _leave(self, long: bool) -> None:
        self._held[long] -= 1


def try_again(message: str, code: str) -> ApiError:
    """503 for what may work a little later."""
    return ApiError(503, f"{message}; try again", code=code, headers=RETRY_AFTER)
