"""Large answers beside small ones: made a piece at a time, with turns of the event loop between."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator
from time import perf_counter

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ds_cp.api.answers.generation import unless_disconnected

BATCH_S = 0.001  # seconds of work before the event loop gets its turn
BATCH_BYTES = 64 * 1024  # bytes of one message to the client
SMALL_BYTES = BATCH_BYTES  # bytes of an answer that is sent as a whole, with its length


class Turns:
    """Shares the event loop among large answers: all together do one batch of work a turn, however
    many they are."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()

    def pace(self, pieces: Iterable[bytes]) -> Paced:
        """``pieces`` in batches."""
        return Paced(self._lock, iter(pieces))


class Paced:
    """Pieces of one answer in batches of about ``BATCH_S`` and ``BATCH_BYTES``. The first batch is
    made at once: few answers have another."""

    def __init__(self, lock: asyncio.Lock, pieces: Iterator[bytes]) -> None:
        self._lock = lock
        self._pieces = pieces
        self._begun = False
        self._over = False

    async def next(self) -> bytes | None:
        """The next batch, None at the end. Raises what making it raises."""
        if self._over:
            return None
        if not self._begun:
            self._begun = True
            return self._batch()
        async with self._lock:
            batch = self._batch()
            await asyncio.sleep(0)  # with the lock held: all others have a turn first
        return batch

    def _batch(self) -> bytes | None:
        batch = bytearray()
        end = perf_counter() + BATCH_S
        for piece in self._pieces:
            batch += piece
            if len(batch) >= BATCH_BYTES or perf_counter() >= end:
                return bytes(batch)
        self._over = True
        return bytes(batch) or None


class PacedJson(Response):
    """A JSON answer from its pieces. A small one is sent as a whole, with its length; a large one
    in chunks, as they are made and as the client reads them.

    An error before the first byte is the caller's, to be answered with an HTTP status. A later one
    is raised too, and the server then closes the connection before the end of the last chunk: what
    the client has received can be told from an answer.
    """

    media_type = "application/json"

    def __init__(self, pieces: Iterable[bytes], turns: Turns) -> None:
        self.status_code = 200
        self.background = None
        self._paced = turns.pace(pieces)
        self.init_headers()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer, or as much of it as the client stays for."""
        head = bytearray()
        whole = False
        while not whole and len(head) <= SMALL_BYTES:
            batch = await self._paced.next()
            whole = batch is None
            head += batch or b""
        if whole:
            self.raw_headers.append((b"content-length", b"%d" % len(head)))
            await self._start(send)
            await send({"type": "http.response.body", "body": bytes(head), "more_body": False})
            return
        await unless_disconnected(receive, self._write(bytes(head), send))

    async def _write(self, head: bytes, send: Send) -> None:
        await self._start(send)
        batch: bytes | None = head
        while batch is not None:
            await send({"type": "http.response.body", "body": batch, "more_body": True})
            batch = await self._paced.next()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _start(self, send: Send) -> None:
        head = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(head)
