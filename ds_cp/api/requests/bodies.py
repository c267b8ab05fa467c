"""Request bodies: read within one bound for all of them, and turned into models off the loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import Message

from ds_cp.api.errors import RETRY_AFTER, ApiError, from_validation
from ds_cp.api.requests.json_weight import too_heavy
from ds_cp.api.requests.strict_model import Notes
from ds_cp.api.transport.deadline import within
from ds_cp.text import MAX_NAME_CHARS, JsonError, parse_json

TINY_BYTES = 8 * 1024  # bytes of a body that is parsed at once, on the event loop
SMALL_BYTES = 64 * 1024  # bytes of a body that is in no bound of all bodies
HELD_BODIES = 16  # bodies of the largest size whose bytes are held at once
GRACE_S = 3.0  # seconds of reading in which no body has to make room for others
_LOOK_S = 0.5  # seconds between looks for a body that has to make room

Model = TypeVar("Model", bound=BaseModel)


@dataclass(eq=False)
class _Held:
    """A body and its part of the room. ``cut`` is set when it has to make room while it is read."""

    begun: float  # seconds of the loop's clock
    cut: asyncio.Event
    size: int = 0  # bytes received
    reserved: int = 0  # bytes of the room
    reading: bool = False  # whether it has room and is not whole yet


class Bodies:
    """The bodies of one application.

    Bodies above ``SMALL_BYTES`` share a room of ``HELD_BODIES`` times the largest body, from before
    they are read until they are answered. One that finds no room waits half of ``timeout_s``
    seconds, the time that it has to arrive, then its answer is 503. Meanwhile the slowest of those
    that have been read for ``GRACE_S`` seconds is cut off.

    Bodies above ``TINY_BYTES`` are parsed and validated in a thread, one at a time: it holds up the
    event loop only as long as one call into C takes, because ``too_heavy`` has bounded what a large
    body makes. Small ones have a thread of their own, so that they do not wait for large ones.
    """

    def __init__(
        self, max_body_bytes: int, timeout_s: float, max_values: Callable[[], int]
    ) -> None:
        self._largest = max_body_bytes
        self._free = HELD_BODIES * max_body_bytes  # bytes
        self._timeout_s = timeout_s
        self._max_values = max_values
        self._held: set[_Held] = set()
        self._line = asyncio.Lock()  # of the bodies that wait for room, the oldest first
        self._freed = asyncio.Event()
        self._small = ThreadPoolExecutor(1, thread_name_prefix="ds_cp-small-body")
        self._large = ThreadPoolExecutor(1, thread_name_prefix="ds_cp-large-body")

    def close(self) -> None:
        """Cancel what waits for the threads."""
        for thread in (self._small, self._large):
            thread.shutdown(wait=False, cancel_futures=True)

    @asynccontextmanager
    async def model(
        self, request: Request, kind: type[Model], notes: Notes
    ) -> AsyncIterator[Model | None]:
        """The body of a request as a ``kind``; None when it is empty. Its room is free at the end
        of the block.

        Raises ``ApiError`` 400 for what is wrong with it, 408 when it had to make room, 503 when it
        found none or was not looked at in time.
        """
        held = _Held(asyncio.get_running_loop().time(), asyncio.Event())
        self._held.add(held)
        try:
            data = await self._read(request, held)
            yield await self._parsed(data, kind, notes) if data else None
        finally:
            self._held.discard(held)
            self._release(held, held.reserved)

    async def _read(self, request: Request, held: _Held) -> bytes:
        data = bytearray()
        more = True
        while more:
            message = await self._next(request, held)
            if message["type"] == "http.disconnect":
                raise ApiError(400, "the client left before the end of the body")
            more = message.get("more_body", False)
            data += message.get("body", b"")
            held.size = len(data)
            if held.size > SMALL_BYTES and not held.reserved:
                await self._reserve(held, self._expected(request) if more else held.size)
        held.reading = False
        if held.reserved:
            self._release(held, held.reserved - held.size)
        return bytes(data)

    def _expected(self, request: Request) -> int:
        declared = Headers(scope=request.scope).get("content-length", "")
        return min(int(declared), self._largest) if declared.isdecimal() else self._largest

    async def _next(self, request: Request, held: _Held) -> Message:
        if not held.reserved:
            return await request.receive()
        receiving = asyncio.ensure_future(request.receive())
        cut = asyncio.ensure_future(held.cut.wait())
        try:
            await asyncio.wait({receiving, cut}, return_when=asyncio.FIRST_COMPLETED)
            if not receiving.done():
                raise ApiError(
                    408,
                    f"the body came slowly ({held.size} bytes so far) and others wait for its "
                    "room; send it again, faster",
                    code="body_timeout",
                )
            return receiving.result()
        finally:
            receiving.cancel()
            cut.cancel()
            await asyncio.gather(receiving, cut, return_exceptions=True)

    async def _reserve(self, held: _Held, need: int) -> None:
        try:
            await within(self._timeout_s / 2, self._wait_for(held, need))
        except asyncio.TimeoutError:
            raise _busy(f"{need} bytes") from None

    async def _wait_for(self, held: _Held, need: int) -> None:
        async with self._line:
            while need > self._free:
                self._cut_slowest()
                self._freed.clear()
                with suppress(asyncio.TimeoutError):
                    await within(_LOOK_S, self._freed.wait())
            self._free -= need
            held.reserved, held.reading = need, True

    def _cut_slowest(self) -> None:
        now = asyncio.get_running_loop().time()
        old = [held for held in self._held if held.reading and now - held.begun > GRACE_S]
        if old:
            min(old, key=lambda held: held.size / (now - held.begun)).cut.set()

    def _release(self, held: _Held, count: int) -> None:
        held.reserved -= count
        self._free += count
        self._freed.set()

    async def _parsed(self, data: bytes, kind: type[Model], notes: Notes) -> Model:
        if len(data) <= TINY_BYTES:
            result = _to_model(data, kind, notes, None)
        else:
            small = len(data) <= SMALL_BYTES
            most = None if small else self._max_values()
            thread = self._small if small else self._large
            loop = asyncio.get_running_loop()
            future = loop.run_in_executor(thread, _to_model, data, kind, notes, most)
            try:
                result = await within(self._timeout_s, future)
            except asyncio.TimeoutError:
                raise _busy("this one") from None
        if isinstance(result, ApiError):
            raise result
        return result


def _to_model(
    data: bytes, kind: type[Model], notes: Notes, max_values: int | None
) -> Model | ApiError:
    """The model that a body spells, or what is wrong with it. ``max_values``: for ``too_heavy``,
    which a small body does not need."""
    reason = None if max_values is None else too_heavy(data, max_values)
    if reason is not None:
        return _invalid(reason)
    try:
        value = parse_json(data.decode())
    except UnicodeDecodeError as err:
        return _invalid(f"not UTF-8 text (byte {err.start})")
    except JsonError as err:
        return _invalid(str(err), err.key)
    try:
        return kind.model_validate(value, context=notes)
    except ValidationError as err:
        return from_validation(err.errors(include_url=False))


def _invalid(reason: str, key: str | None = None) -> ApiError:
    param = None if key is None else key[:MAX_NAME_CHARS]
    return ApiError(400, f"the body is {reason}", param=param, code="invalid_json")


def _busy(what: str) -> ApiError:
    return ApiError(
        503,
        f"too many bodies at once: there was no room for {what} in time; try again",
        code="bodies_busy",
        headers=RETRY_AFTER,
    )
