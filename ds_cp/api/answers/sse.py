"""Server-sent events: framing, keep-alive comments, errors in a stream, clients that leave."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import aclosing
from dataclasses import dataclass
from itertools import chain
from time import monotonic
from typing import Any, Protocol

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ds_cp.api.answers.generation import Generation, unless_disconnected
from ds_cp.api.answers.paced import Turns
from ds_cp.api.answers.prompts import PromptEvents
from ds_cp.api.errors import ApiError, from_engine, internal_error, shutting_down
from ds_cp.api.transport.deadline import within
from ds_cp.errors import DsCpError
from ds_cp.outputs import Delta, PromptProgress

logger = logging.getLogger("ds_cp.api")

END = b"\n\n"  # of an event
DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"  # a comment, which clients ignore
PROGRESS_S = 0.25  # seconds between looks at a prompt's progress
_CLOSE_S = 0.001  # seconds by which a wait may end early
_LAST_EVENT_S = 1.0  # seconds to send the event that the server is shutting down


def event(data: Any) -> bytes:
    """One event with JSON data."""
    return b"data: " + json.dumps(data, ensure_ascii=False, allow_nan=False).encode() + b"\n\n"


@dataclass(frozen=True)
class Framing:
    """How a protocol writes its events: one from what its answer makes, whole or in pieces, of
    which the last one alone ends with ``END``; the one of an error, what ends every stream, and
    what it says while nothing comes."""

    event: Callable[[Any], bytes | Iterator[bytes]]
    error: Callable[[ApiError], bytes]
    last: bytes
    keep_alive: bytes = KEEP_ALIVE


OPENAI = Framing(event, lambda err: event(err.body()), DONE)


async def stream_events(
    generation: Generation,
    *,
    opening: Iterable[Any],
    chunks_of: Callable[[int, Delta], Iterable[Any]],
    closing: Callable[[], Iterable[Any]],
    turns: Turns,
    keep_alive_s: float,
    request_id: str,
    framing: Framing = OPENAI,
    progress: Callable[[PromptProgress], Any] | None = None,
) -> AsyncIterator[bytes]:
    """The events of a stream, up to the last one of its ``framing``; an error becomes an event.
    ``progress`` makes those that say how far the prompt has come, up to all of it.

    Many chunks at once, such as those of a long prompt, are made as the client reads them and a few
    a turn of the event loop.
    """
    try:
        written = _Written(opening, framing, turns)
        while (data := await written.next()) is not None:
            yield data
        prompts, due = PromptEvents(generation, progress), monotonic() + keep_alive_s
        while not generation.finished:
            written = _Written(prompts.now(), framing, turns)
            while (data := await written.next()) is not None:
                due = monotonic() + keep_alive_s
                yield data
            wait_s = max(0.0, due - monotonic())
            item = await generation.next(min(wait_s, PROGRESS_S) if prompts.asks else wait_s)
            if item is None:
                if monotonic() >= due - _CLOSE_S:
                    due = monotonic() + keep_alive_s
                    yield framing.keep_alive
                continue
            said = False
            chunks = chain(prompts.before(*item), chunks_of(*item))
            written = _Written(chunks, framing, turns)
            while (data := await written.next()) is not None:
                said = True
                yield data
            if not said and monotonic() >= due:  # tokens come of which the client sees nothing
                said = True
                yield framing.keep_alive
            if said:
                due = monotonic() + keep_alive_s
        written = _Written(closing(), framing, turns)
        while (data := await written.next()) is not None:
            yield data
    except Exception as err:
        yield framing.error(stream_error(err, request_id))
    yield framing.last


class _Written:
    """Events of these chunks, several at once, but none in part: what may end a stream early begins
    at the beginning of an event. One of many megabytes is made in many turns of the loop."""

    def __init__(self, chunks: Iterable[Any], framing: Framing, turns: Turns) -> None:
        self._paced = turns.pace(_pieces(chunks, framing))

    async def next(self) -> bytes | None:
        """The next ones, None at the end. Raises what making them raises."""
        whole = bytearray()
        while (data := await self._paced.next()) is not None:
            whole += data
            if whole.endswith(END):
                return bytes(whole)
        return None


def _pieces(chunks: Iterable[Any], framing: Framing) -> Iterator[bytes]:
    for chunk in chunks:
        made = framing.event(chunk)
        if isinstance(made, bytes):
            yield made
        else:
            yield from made


def stream_error(err: Exception, request_id: str) -> ApiError:
    """The part of an error that a client may see; an unexpected one is logged."""
    if isinstance(err, ApiError):
        return err
    known = from_engine(err) if isinstance(err, DsCpError) else None
    if known is not None:
        return known
    logger.error("request %s failed", request_id, exc_info=err)
    return internal_error(request_id)


class Closable(Protocol):
    """What a stream ends with it."""

    async def close(self) -> None:
        """Free what it holds. May be called twice."""
        ...


class EventStream(Response):
    """Sends events until the last one, or until the client leaves; then closes the generation.

    Unlike starlette's ``StreamingResponse`` it closes the iterator itself, instead of the garbage
    collector; and it sends an error event when the server cancels it at the end of a drain. Clients
    that do not read are the connection's to end.
    """

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncIterator[bytes], generation: Closable, framing: Framing = OPENAI
    ) -> None:
        self.status_code = 200
        self.background = None
        self._events = events
        self._generation = generation
        self._framing = framing
        # A proxy that buffers would hide tokens and keep-alives alike.
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_disconnected(receive, self._write(send))
        except asyncio.CancelledError:
            await self._send_shutting_down(send)
        finally:
            await self._generation.close()

    async def _write(self, send: Send) -> None:
        head = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(head)
        async with aclosing(self._events) as events:  # type: ignore[type-var]
            async for data in events:
                await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send_shutting_down(self, send: Send) -> None:
        data = self._framing.error(shutting_down()) + self._framing.last
        body = {"type": "http.response.body", "body": data, "more_body": False}
        try:
            await within(_LAST_EVENT_S, send(body))
        except (asyncio.TimeoutError, RuntimeError, OSError):
            logger.info("a stream ended before the event of the shutdown was sent")
