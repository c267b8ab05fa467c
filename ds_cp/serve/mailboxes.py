"""What the engine's thread has for the readers of requests, who wait in the event loop."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence

from ds_cp.errors import DsCpError
from ds_cp.outputs import Delta

# What a request has for its reader, who takes it at once; an error ends it.
Mailbox = asyncio.Queue[Delta | DsCpError]


class Mailboxes:
    """By request id. The caller has a lock around what opens, closes and finds them."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._open: dict[str, Mailbox] = {}

    def open(self, request_id: str, mailbox: Mailbox) -> None:
        """A request has a reader."""
        self._open[request_id] = mailbox

    def close(self, request_id: str) -> None:
        """It has none any more."""
        self._open.pop(request_id, None)

    def all(self) -> list[Mailbox]:
        """Those of all requests that have a reader."""
        return list(self._open.values())

    def addressed(self, deltas: Sequence[Delta]) -> list[tuple[Mailbox, Delta]]:
        """The deltas that have a reader."""
        pairs = [(self._open.get(delta.request_id), delta) for delta in deltas]
        return [(mailbox, delta) for mailbox, delta in pairs if mailbox is not None]

    def deliver(self, items: Sequence[tuple[Mailbox, Delta | DsCpError]]) -> None:
        """From another thread than the loop's, which does it."""

        def put() -> None:
            for mailbox, item in items:
                mailbox.put_nowait(item)

        if items:
            self.call(put)

    def refuse(self, refused: Sequence[tuple[str, DsCpError]]) -> None:
        """These requests are ended with an error. From another thread than the loop's."""
        pairs = [(self._open.get(request_id), err) for request_id, err in refused]
        self.deliver([(mailbox, err) for mailbox, err in pairs if mailbox is not None])

    def call(self, work: Callable[[], None]) -> None:
        """Have ``work`` done in the event loop, unless that has closed."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(work)
