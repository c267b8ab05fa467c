"""Grammars of requests, checked beside the event loop."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

from ds_cp.errors import GrammarBusyError
from ds_cp.grammar.constraint import StructuredOutputsParams
from ds_cp.grammar.desk import WALL_S, GrammarDesk

THREADS = 4  # of this process, that wait for grammars to be compiled
WAIT_S = 2 * WALL_S  # seconds for one, the wait for a thread included


class GrammarChecks:
    """Asks a desk from asyncio."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(THREADS, "ds_cp grammars")

    async def check(self, desk: GrammarDesk, wanted: StructuredOutputsParams | None) -> str:
        """``desk.check`` of a request's wish, "" where it has none. Raises as that does, and
        ``GrammarBusyError`` when no thread is free in time. One that was checked lately waits for
        nothing."""
        if wanted is None:
            return ""
        if (known := desk.recall(wanted)) is not None:
            return known
        work = asyncio.get_running_loop().run_in_executor(self._threads, desk.check, wanted)
        try:
            return await asyncio.wait_for(work, WAIT_S)
        except asyncio.TimeoutError:
            raise GrammarBusyError("too many grammars wait to be compiled; try again") from None

    async def close(self, desk: GrammarDesk | None) -> None:
        """End the desk's process; checks that wait for it raise."""
        if desk is not None:
            await asyncio.to_thread(desk.close)
        self._threads.shutdown(wait=False, cancel_futures=True)
