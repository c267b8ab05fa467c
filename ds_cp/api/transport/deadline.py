"""Waiting with a limit, without losing a cancellation."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

Result = TypeVar("Result")


async def within(seconds: float, work: Awaitable[Result]) -> Result:
    """The result of ``work``. After ``seconds`` it cancels ``work`` and raises
    ``asyncio.TimeoutError``.

    ``asyncio.wait_for`` of Python 3.11 and older returns the result and drops the cancellation of
    the caller when both happen at once: a stream would go on for a client that left.
    """
    task = asyncio.ensure_future(work)
    try:
        done, _ = await asyncio.wait({task}, timeout=max(seconds, 0.0))
        if not done:
            raise asyncio.TimeoutError
        return task.result()
    finally:
        if not task.done():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
