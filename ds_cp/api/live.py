"""GET /state: the live picture, as events or once. Made once for all who look, and only then."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import msgspec
from fastapi import APIRouter, Query
from starlette.requests import Request
from starlette.responses import Response

from ds_cp.api.answers.budget import held_by
from ds_cp.api.answers.sse import KEEP_ALIVE, EventStream
from ds_cp.api.context import AppContext
from ds_cp.api.errors import RETRY_AFTER, ApiError
from ds_cp.api.transport.deadline import within
from ds_cp.engine.picture import Counters

PER_S = 4.0  # pictures a second at most, for all viewers together
IDLE_S = 1.0  # seconds between pictures at most, while nothing changes
WINDOW_S = 2.0  # seconds over which rates are taken
MAX_VIEWERS = 64  # streams at once
FRAME_BYTES = 512 * 1024  # of memory that a viewer may hold: a frame that waits in its socket
_ENDS = ("stopping", "dead")  # states after which a stream ends


@dataclass(frozen=True)
class Frame:
    """One picture. ``number`` counts those that differ; ``data``: JSON of one line."""

    number: int
    data: bytes
    state: str


class LiveFeed:
    """Makes frames when somebody waits for one, at most ``PER_S`` a second in all.

    There is no task of its own: of those who wait, one makes the frame and all others get it.
    """

    def __init__(self, context: AppContext) -> None:
        self.viewers = 0
        self.made = 0  # pictures that were made, whether or not they differ
        self._context = context
        self._turn = asyncio.Lock()
        self._newest = Frame(0, b"", "")
        self._body = b""
        self._wait_s = 1 / PER_S
        self._due = 0.0  # when the next one may be made, in time.monotonic()
        self._rates = Rates()

    async def once(self) -> Frame:
        """A new frame, or the newest one while it is too early for another."""
        if self._is_due():
            async with self._turn:
                if self._is_due():  # nobody made one meanwhile
                    await self._make()
        return self._newest

    def _is_due(self) -> bool:
        return time.monotonic() >= self._due or not self._newest.number

    async def after(self, number: int) -> Frame:
        """The newest frame once it is another than frame ``number``."""
        while self._newest.number <= number:
            async with self._turn:
                if self._newest.number > number:
                    break
                await asyncio.sleep(self._due - time.monotonic())
                await self._make()
        return self._newest

    async def _make(self) -> None:
        self._due = time.monotonic() + self._wait_s  # at first, so that a failure counts too
        engine = self._context.engine
        state = engine.state
        picture = await asyncio.to_thread(engine.picture) if state != "starting" else None
        self.made += 1
        rates = self._rates.add(time.monotonic(), picture.counters) if picture else None
        body = msgspec.json.encode({
            "state": state,
            "model": self._context.model_name() if picture else None,
            "max_model_len": engine.info.max_model_len if picture else None,
            "rates": rates,
            "picture": picture,
        })  # fmt: skip
        if body == self._body:
            self._wait_s = min(self._wait_s * 1.5, IDLE_S)
            return
        self._body, self._wait_s = body, 1 / PER_S
        data = b'{"at":%.3f,' % time.time() + body[1:]
        self._newest = Frame(self._newest.number + 1, data, state)

    async def events(self, keep_alive_s: float) -> AsyncIterator[bytes]:
        """The events of one viewer, from a new frame on; one that reads slowly misses some. They
        end when the server does."""
        number = (await self.once()).number - 1
        while True:
            try:
                frame = await within(keep_alive_s, self.after(number))
            except asyncio.TimeoutError:
                yield KEEP_ALIVE
                continue
            number = frame.number
            yield b"data: " + frame.data + b"\n\n"
            if frame.state in _ENDS:
                return


class Rates:
    """Counters per second, over the last ``WINDOW_S``."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, Counters]] = deque()

    def add(self, now: float, counters: Counters) -> dict[str, Any] | None:
        """The rates up to ``counters``; None for the first ones, or after a time unobserved."""
        samples = self._samples
        while samples and now - samples[0][0] > WINDOW_S + IDLE_S:
            samples.popleft()
        while len(samples) > 1 and now - samples[1][0] >= WINDOW_S:
            samples.popleft()
        samples.append((now, counters))
        then, old = samples[0]
        if now <= then:
            return None

        def rate(name: str) -> float:
            return float(round((getattr(counters, name) - getattr(old, name)) / (now - then), 2))

        sent = {
            scheme: round((count - old.comm_bytes.get(scheme, 0)) / (now - then))
            for scheme, count in counters.comm_bytes.items()
        }
        return {
            "generation_tokens_per_s": rate("generation_tokens"),
            "prefill_tokens_per_s": rate("prefill_tokens"),
            "steps_per_s": rate("steps"),
            "comm_bytes_per_s": sent,
        }


class _Viewer:
    """One open stream; ``close`` gives its place back."""

    def __init__(self, feed: LiveFeed) -> None:
        self._feed: LiveFeed | None = feed
        feed.viewers += 1

    async def close(self) -> None:
        """End it. May be called twice."""
        if self._feed is not None:
            self._feed.viewers -= 1
            self._feed = None


def live_routes(context: AppContext) -> APIRouter:
    """GET /state: server-sent events, each a whole picture; with ``?once=1`` one picture as JSON.

    Not in openapi.json: the stream has no end, and programs that walk the routes would wait for it.
    """
    router = APIRouter()
    feed = LiveFeed(context)

    @router.get("/state", include_in_schema=False)
    async def state(request: Request, once: bool = Query(default=False)) -> Response:
        """The live picture as server-sent events, or with ``once=1`` one as JSON. 503 when
        ``MAX_VIEWERS`` look already."""
        if once:
            frame = await feed.once()
            return Response(frame.data, 200, {"Cache-Control": "no-store"}, "application/json")
        if feed.viewers >= MAX_VIEWERS:
            raise ApiError(
                503,
                f"{feed.viewers} streams of /state are open, as many as there may be; close one, "
                "or ask for /state?once=1 from time to time",
                code="too_many_viewers",
                headers=RETRY_AFTER,
            )
        if request.scope["state"].get("head"):
            return Response(None, 200, media_type=EventStream.media_type)
        held_by(request.scope).take(FRAME_BYTES)
        return EventStream(feed.events(context.server.keep_alive_s), _Viewer(feed))

    return router
