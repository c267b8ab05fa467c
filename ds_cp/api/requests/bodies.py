"""Request bodies: read within one bound for all of them, and turned into models off the loop."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, is_dataclass
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import Message

from ds_cp.api.answers.budget import BODY_BYTES, ID_BYTES, LARGE_SHARE, Held, held_by
from ds_cp.api.errors import RETRY_AFTER, ApiError, from_validation
from ds_cp.api.requests.json_weight import too_heavy
from ds_cp.api.requests.strict_model import Notes
from ds_cp.api.transport.deadline import within
from ds_cp.text import MAX_NAME_CHARS, JsonError, parse_json

TINY_BYTES = 8 * 1024  # bytes of a body that is parsed at once, on the event loop
SMALL_BYTES = 64 * 1024  # bytes of a body that is not charged while it is read
HELD_BODIES = 16  # bodies of the largest size that are read and parsed at once
BODIES_SHARE = 1 / 2  # of the budget: what several bodies that are read and parsed may take
MODEL_BYTES = 1024  # of a validated object, beside its values
GRACE_S = 3.0  # seconds of reading in which no body has to make room for others
MAX_LENGTH_DIGITS = 19  # of a Content-Length that is read as a number
_LOOK_S = 0.5  # seconds between looks for a body that has to make room

Model = TypeVar("Model", bound=BaseModel)


@dataclass(eq=False)
class _Body:
    """A body and its part of the room. ``cut`` is set when it has to make room while it is read."""

    held: Held
    begun: float  # seconds of the loop's clock
    cut: asyncio.Event
    size: int = 0  # bytes received
    reserved: int = 0  # bytes of the room
    reading: bool = False  # whether it has room and is not whole yet


class Bodies:
    """The bodies of one application.

    Bodies above ``SMALL_BYTES`` share a room of ``HELD_BODIES`` times the largest body, and are
    charged ``BODY_BYTES`` a byte, while they are read, parsed and validated: together at most
    ``BODIES_SHARE`` of ``budget`` bytes, though a single one may take more. One that finds no room
    waits half of ``timeout_s`` seconds, the time that it has to arrive, then its answer is 503.
    Meanwhile the slowest of those that have been read for ``GRACE_S`` seconds is cut off. What a
    request keeps of its body, of any size, is charged until it is answered.

    Bodies above ``TINY_BYTES`` are parsed and validated in a thread, one at a time: it holds up the
    event loop only as long as one call into C takes, because ``too_heavy`` has bounded what a large
    body makes. Small ones have a thread of their own, so that they do not wait for large ones.
    """

    def __init__(
        self, max_body_bytes: int, timeout_s: float, max_values: Callable[[], int], budget: int
    ) -> None:
        self._largest = max_body_bytes
        # Bytes that are kept for a body of an unknown length.
        self._unknown = min(max_body_bytes, int(budget * LARGE_SHARE / BODY_BYTES))
        self._room = min(HELD_BODIES * max_body_bytes, int(budget * BODIES_SHARE / BODY_BYTES))
        self._taken = 0  # bytes of the room
        self._timeout_s = timeout_s
        self._max_values = max_values
        self._bodies: set[_Body] = set()
        self._line = asyncio.Lock()  # of the bodies that wait for room, the oldest first
        self._freed = asyncio.Event()
        self._small = ThreadPoolExecutor(1, thread_name_prefix="ds_cp-small-body")
        self._large = ThreadPoolExecutor(1, thread_name_prefix="ds_cp-large-body")

    def close(self) -> None:
        """Cancel what waits for the threads."""
        for thread in (self._small, self._large):
            thread.shutdown(wait=False, cancel_futures=True)

    async def model(self, request: Request, kind: type[Model], notes: Notes) -> Model | None:
        """The body of a request as a ``kind``; None when it is empty.

        Raises ``ApiError`` 400 for what is wrong with it or too large for the budget, 408 when it
        had to make room, 503 when it found none or was not looked at in time.
        """
        held = held_by(request.scope)
        body = _Body(held, asyncio.get_running_loop().time(), asyncio.Event())
        self._bodies.add(body)
        try:
            data = await self._read(request, body)
            if not data:
                return None
            model, size = await self._parsed(data, kind, notes)
        finally:
            self._bodies.discard(body)
            self._release(body, body.reserved)
        held.take(size)
        return model

    async def _read(self, request: Request, body: _Body) -> bytes:
        data = bytearray()
        more = True
        while more:
            message = await self._next(request, body)
            if message["type"] == "http.disconnect":
                raise ApiError(400, "the client left before the end of the body")
            more = message.get("more_body", False)
            data += message.get("body", b"")
            body.size = len(data)
            if body.size > SMALL_BYTES and not body.reserved:
                await self._reserve(body, self._expected(request) if more else body.size)
            elif body.reserved < body.size and body.reserved:  # it is longer than the budget allows
                self._take(body, body.size - body.reserved)
        body.reading = False
        if body.reserved:
            self._release(body, body.reserved - body.size)
        return bytes(data)

    def _expected(self, request: Request) -> int:
        declared = Headers(scope=request.scope).get("content-length", "")
        # ``int`` refuses very long ones. They begin with zeros: the largest body is expected.
        plain = declared.isdecimal() and len(declared) <= MAX_LENGTH_DIGITS
        return min(int(declared), self._largest) if plain else self._unknown

    async def _next(self, request: Request, body: _Body) -> Message:
        if not body.reserved:
            return await request.receive()
        receiving = asyncio.ensure_future(request.receive())
        cut = asyncio.ensure_future(body.cut.wait())
        try:
            await asyncio.wait({receiving, cut}, return_when=asyncio.FIRST_COMPLETED)
            if not receiving.done():
                raise ApiError(
                    408,
                    f"the body came slowly ({body.size} bytes so far) and others wait for its "
                    "room; send it again, faster",
                    code="body_timeout",
                )
            return receiving.result()
        finally:
            receiving.cancel()
            cut.cancel()
            await asyncio.gather(receiving, cut, return_exceptions=True)

    async def _reserve(self, body: _Body, need: int) -> None:
        try:
            await within(self._timeout_s / 2, self._wait_for(body, need))
        except asyncio.TimeoutError:
            raise _busy(f"{need} bytes") from None

    async def _wait_for(self, body: _Body, need: int) -> None:
        body.held.check_size(BODY_BYTES * need)
        async with self._line:
            while not self._has_room(body, need):
                self._cut_slowest()
                self._freed.clear()
                with suppress(asyncio.TimeoutError):
                    await within(_LOOK_S, self._freed.wait())
            self._take(body, need)
            body.reading = True

    def _take(self, body: _Body, need: int) -> None:
        body.held.take(BODY_BYTES * need)
        body.reserved += need
        self._taken += need

    def _has_room(self, body: _Body, need: int) -> bool:
        fits = self._taken == 0 or self._taken + need <= self._room
        return fits and body.held.has_room(BODY_BYTES * need)

    def _cut_slowest(self) -> None:
        now = asyncio.get_running_loop().time()
        old = [body for body in self._bodies if body.reading and now - body.begun > GRACE_S]
        if old:
            min(old, key=lambda body: body.size / (now - body.begun)).cut.set()

    def _release(self, body: _Body, count: int) -> None:
        body.reserved -= count
        self._taken -= count
        body.held.give_back(BODY_BYTES * count)
        self._freed.set()

    async def _parsed(self, data: bytes, kind: type[Model], notes: Notes) -> tuple[Model, int]:
        if len(data) <= TINY_BYTES:
            result = _sized(data, kind, notes, None)
        else:
            small = len(data) <= SMALL_BYTES
            most = None if small else self._max_values()
            thread = self._small if small else self._large
            loop = asyncio.get_running_loop()
            future = loop.run_in_executor(thread, _sized, data, kind, notes, most)
            try:
                result = await within(self._timeout_s, future)
            except asyncio.TimeoutError:
                raise _busy("this one") from None
        if isinstance(result, ApiError):
            raise result
        return result


def kept_bytes(value: Any) -> int:
    """Bytes of memory that a validated value holds: texts, lists of token ids, what has them."""
    if isinstance(value, str):
        return sys.getsizeof(value)
    if isinstance(value, BaseModel):
        return MODEL_BYTES + sum(map(kept_bytes, value.__dict__.values()))
    if is_dataclass(value):  # a tool, a turn
        return MODEL_BYTES + sum(map(kept_bytes, vars(value).values()))
    if isinstance(value, dict):
        return sum(map(kept_bytes, (*value, *value.values())))
    if isinstance(value, list | tuple) and value:
        return ID_BYTES * len(value) if isinstance(value[0], int) else sum(map(kept_bytes, value))
    return 0


def _sized(
    data: bytes, kind: type[Model], notes: Notes, max_values: int | None
) -> tuple[Model, int] | ApiError:
    model = _to_model(data, kind, notes, max_values)
    return model if isinstance(model, ApiError) else (model, kept_bytes(model))


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
