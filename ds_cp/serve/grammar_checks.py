"""Grammars of requests, checked beside the event loop."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

from ds_cp.errors import GrammarBusyError
from ds_cp.grammar.checker import WALL_S, GrammarChecker
from ds_cp.grammar.constraint import StructuredOutputsParams

THREADS = 4  # of this process, that wait for grammars to be compiled
WAIT_S = 2 * WALL_S  # seconds for one, the wait for a thread included


class GrammarChecks:
    """Asks a ``GrammarChecker`` from asyncio."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(THREADS, "ds_cp grammars")

    async def check(self, checker: GrammarChecker, wanted: StructuredOutputsParams | None) -> str:
        """``checker.check`` of a request's wish, "" where it has none. Raises as that does, and
        ``GrammarBusyError`` when no thread is free in time. One that was checked lately waits for
        nothing."""
        if wanted is None:
            return ""
        if (known := checker.recall(wanted)) is not None:
            return known
        work = asyncio.get_running_loop().run_in_executor(self._threads, checker.check, wanted)
        try:
            return await asyncio.wait_for(work, WAIT_S)
        except asyncio.TimeoutError:
            raise GrammarBusyError(
                f"this grammar was not compiled within {WAIT_S:g} s, as others are; try again"
            ) from None

    async def close(self, checker: GrammarChecker | None) -> None:
        """End the checker's process; checks that wait for it raise."""
        if checker is not None:
            await asyncio.to_thread(checker.close)
        self._threads.shutdown(wait=False, cancel_futures=True)
