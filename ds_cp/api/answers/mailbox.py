"""Deltas of one HTTP request on their way from the engine to a client that may read slowly.

The engine never waits for a client, and no token is lost, so what waits here grows with the
request. It is kept small: once ``APART`` items wait, further deltas of an answer are joined. A
waiting token then holds some 40 bytes instead of 300, and 16 for each log-probability instead of
120. They are charged while they wait.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import replace
from io import StringIO
from typing import Any

from ds_cp.api.answers.budget import DELTA_BYTES, PACKED_BYTES, PACKED_TOKEN_BYTES, Held
from ds_cp.outputs import Delta, PackedLogprobs, pack_logprob

APART = 64  # items that wait as they came, and are not charged
JOINED_TOKENS = 256  # tokens of one joined delta at most
JOINED_ENTRIES = 512  # log-probabilities of one joined delta at most


class Mailbox:
    """An unbounded queue of one reader, for the event loop's thread alone. Its items have the
    number of the job that they are of."""

    def __init__(self, held: Held) -> None:
        self._held = held
        self._items: deque[tuple[int, Delta | _Joined | Exception]] = deque()
        # job and answer index -> its last item, if it may grow
        self._open: dict[tuple[int, int], _Joined] = {}
        self._filled = asyncio.Event()

    def put(self, job: int, item: Delta | Exception) -> None:
        """Add a delta, or the error that ends the request."""
        self._filled.set()
        if isinstance(item, Exception) or item.finish_reason == "error":
            self._open.clear()
            self._items.append((job, item))
        elif len(self._items) < APART and (job, item.index) not in self._open:
            self._items.append((job, item))
        else:
            self._join(job, item)

    def _join(self, job: int, delta: Delta) -> None:
        key = (job, delta.index)
        joined = self._open.get(key)
        if joined is None:
            joined = self._open[key] = _Joined(delta)
            self._items.append((job, joined))
        before = joined.size
        joined.add(delta)
        self._held.spend(joined.size - before)
        if joined.is_full or delta.finish_reason is not None:
            del self._open[key]

    async def get(self) -> tuple[int, Delta]:
        """The next delta, perhaps of several tokens, and its job. Raises the error that ended the
        request."""
        while not self._items:
            self._filled.clear()
            await self._filled.wait()
        job, item = self._items.popleft()
        if isinstance(item, Exception):
            raise item
        if isinstance(item, Delta):
            return job, item
        if self._open.get((job, item.index)) is item:
            del self._open[job, item.index]
        self._held.unspend(item.size)
        return job, item.whole()


class _Joined:
    """Deltas of one answer as one."""

    def __init__(self, first: Delta) -> None:
        self.index = first.index
        # It alone tells of the prompt.
        self._first = replace(first, text="", token_ids=(), logprobs=None)
        self._text = StringIO()
        self._ids: list[int] = []
        self._logprobs: list[bytes | None] | None = None  # packed
        self._end: tuple[str | None, int | str | None] = (None, None)
        self._entries = 0
        self.size = 0  # bytes that are charged

    def add(self, delta: Delta) -> None:
        """One more delta."""
        self._text.write(delta.text)
        self._ids += delta.token_ids
        self._end = (delta.finish_reason, delta.stop_reason)
        self.size += max(DELTA_BYTES * len(delta.token_ids), 2 * len(delta.text))
        if delta.logprobs is not None:
            self._logprobs = self._logprobs or []
            self._logprobs += map(pack_logprob, delta.logprobs)
            entries = sum(1 + len(item.top) for item in delta.logprobs)
            self._entries += entries
            self.size += PACKED_TOKEN_BYTES * len(delta.logprobs) + PACKED_BYTES * entries

    @property
    def is_full(self) -> bool:
        """Whether the next delta begins another one."""
        return len(self._ids) >= JOINED_TOKENS or self._entries >= JOINED_ENTRIES

    def whole(self) -> Delta:
        """All of them."""
        logprobs: tuple[Any, ...] | None = None
        if self._logprobs is not None:
            logprobs = tuple(PackedLogprobs(self._logprobs))
        return replace(
            self._first,
            token_ids=tuple(self._ids),
            text=self._text.getvalue(),
            logprobs=logprobs,
            finish_reason=self._end[0],
            stop_reason=self._end[1],
        )
