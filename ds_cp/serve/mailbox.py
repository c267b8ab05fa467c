"""Deltas of one request on their way from the engine to a client that may read slowly.

The engine never waits for a client, and no token is lost, so what waits here grows with the
request. It is kept small: once ``APART`` items wait, further deltas of an answer are joined. A
waiting token then holds some 40 bytes instead of 300, and 16 for each log-probability instead of
120; the HTTP application counts on both when it admits a request.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import replace
from io import StringIO
from typing import Any

from ds_cp.errors import DsCpError
from ds_cp.outputs import Delta, PackedLogprobs, pack_logprob

APART = 64  # items that wait as they came
JOINED_TOKENS = 256  # tokens of one joined delta at most
JOINED_ENTRIES = 512  # log-probabilities of one joined delta at most


class Mailbox:
    """An unbounded queue of one reader, for the event loop's thread alone."""

    def __init__(self) -> None:
        self._items: deque[Delta | _Joined | DsCpError] = deque()
        self._open: dict[int, _Joined] = {}  # answer index -> its last item, if it may grow
        self._filled = asyncio.Event()

    def put(self, item: Delta | DsCpError) -> None:
        """Add a delta, or the error that ends the request."""
        self._filled.set()
        if isinstance(item, DsCpError) or item.finish_reason == "error":
            self._open.clear()
            self._items.append(item)
        elif len(self._items) < APART and item.index not in self._open:
            self._items.append(item)
        else:
            self._join(item)

    def _join(self, delta: Delta) -> None:
        joined = self._open.get(delta.index)
        if joined is None:
            joined = self._open[delta.index] = _Joined(delta)
            self._items.append(joined)
        joined.add(delta)
        if joined.is_full or delta.finish_reason is not None:
            del self._open[delta.index]

    async def get(self) -> Delta:
        """The next delta, perhaps of several tokens. Raises the error that ended the request."""
        while not self._items:
            self._filled.clear()
            await self._filled.wait()
        item = self._items.popleft()
        if isinstance(item, DsCpError):
            raise item
        if isinstance(item, Delta):
            return item
        if self._open.get(item.index) is item:
            del self._open[item.index]
        return item.whole()


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

    def add(self, delta: Delta) -> None:
        """One more delta."""
        self._text.write(delta.text)
        self._ids += delta.token_ids
        self._end = (delta.finish_reason, delta.stop_reason)
        if delta.logprobs is not None:
            self._logprobs = self._logprobs or []
            self._logprobs += map(pack_logprob, delta.logprobs)
            self._entries += sum(1 + len(item.top) for item in delta.logprobs)

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
