"""Plain ASGI layers: request ids and the last guard, API keys, and limits on what is read.

None of them is starlette's ``BaseHTTPMiddleware``: that one hides ``http.disconnect`` from the
routes.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import re
import secrets
import uuid
from collections.abc import Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ds_cp.api.deadline import within
from ds_cp.api.errors import ApiError, internal_error, shutting_down

logger = logging.getLogger("ds_cp.serve")

MAX_HEADER_BYTES = 32 * 1024
MAX_TARGET_BYTES = 8 * 1024
BODY_BYTES_PER_S = 64 * 1024  # a body that keeps this pace is never cut off
_SANE_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_LINGER_S = 1.0
_LINGER_BYTES = 4 * 2**20


class RequestIds:
    """Names every request (``X-Request-Id``) and answers for whatever nobody else caught.

    The id is the client's if it is 1 to 64 characters of ``[A-Za-z0-9._-]``, else a new one; it
    stands in ``scope["state"]["request_id"]``. A cancelled request (the end of a drain) is a 503.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _SANE_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        started = False

        async def named_send(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        try:
            await self.app(scope, receive, named_send)
        except asyncio.CancelledError:
            if started:
                raise
            await shutting_down().response()(scope, receive, named_send)
        except Exception:
            logger.exception("request %s failed", request_id)
            if started:
                raise
            await internal_error(request_id).response()(scope, receive, named_send)


class ApiKeys:
    """Asks for ``Authorization: Bearer KEY`` on every path but /health.

    The sha256 (hex) of the key that was used stands in ``scope["state"]["key_digest"]``.
    The sha256 of what was sent is compared with that of every key, without an early exit, so that
    the time taken tells nothing about a key.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self.app = app
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] == "/health" or self._allows(scope):
            await self.app(scope, receive, send)
            return
        error = ApiError(
            401,
            "a valid API key is needed: send the header Authorization: Bearer KEY",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )
        await error.response()(scope, receive, send)

    def _allows(self, scope: Scope) -> bool:
        sent = Headers(scope=scope).get("authorization", "")
        scheme, _, key = sent.partition(" ")
        digest = hashlib.sha256(key.strip().encode("latin-1", "replace")).digest()
        found = False
        for known in self._digests:
            found |= secrets.compare_digest(digest, known)
        scope.setdefault("state", {})["key_digest"] = digest.hex()
        return found and scheme.lower() == "bearer"


class ReadLimits:
    """Bounds what one request may send: header bytes, target bytes, body bytes, and the body's
    time.

    Chunked bodies are counted as they come. The body may take ``timeout_s`` plus the time that
    ``BODY_BYTES_PER_S`` needs for what has arrived (408 then). An answer given before the whole
    body was read closes the connection, so that an endless body ends there.
    """

    def __init__(self, app: ASGIApp, max_body_bytes: int, timeout_s: float) -> None:
        self.app = app
        self._max = max_body_bytes
        self._timeout_s = timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        body = _Body(scope, receive, send, self._max, self._timeout_s)
        error = self._refusal(scope)
        if error is not None:
            await error.response()(scope, body.receive, body.send)
        else:
            await self.app(scope, body.receive, body.send)

    def _refusal(self, scope: Scope) -> ApiError | None:
        target = len(scope.get("raw_path") or b"") + len(scope.get("query_string") or b"")
        if target > MAX_TARGET_BYTES:
            return ApiError(414, f"the URL has {target} bytes; at most {MAX_TARGET_BYTES}")
        size = sum(len(name) + len(value) for name, value in scope["headers"])
        if size > MAX_HEADER_BYTES:
            return ApiError(431, f"the headers have {size} bytes; at most {MAX_HEADER_BYTES}")
        declared = Headers(scope=scope).get("content-length", "")
        if declared.isdecimal() and int(declared) > self._max:
            return too_large(f"{int(declared)} bytes", self._max)
        return None


class _Body:
    """The reading side of one request."""

    def __init__(
        self, scope: Scope, receive: Receive, send: Send, max_bytes: int, timeout_s: float
    ) -> None:
        headers = Headers(scope=scope)
        self._receive = receive
        self._send = send
        self._max = max_bytes
        self._timeout_s = timeout_s
        self._begun = asyncio.get_running_loop().time()
        self._size = 0
        declared = headers.get("content-length", "0")
        self._whole = "transfer-encoding" not in headers and declared == "0"
        self._waits = headers.get("expect", "").lower() == "100-continue"

    async def receive(self) -> Message:
        """The server's ``receive`` until the body is whole, with its limits; then untouched."""
        if self._whole:
            return await self._receive()
        left = self._begun + self._timeout_s + self._size / BODY_BYTES_PER_S
        left -= asyncio.get_running_loop().time()
        try:
            message = await within(left, self._receive())
        except asyncio.TimeoutError:
            raise ApiError(
                408,
                f"the body was not received in time ({self._size} bytes so far); send it faster",
                code="body_timeout",
            ) from None
        self._note(message)
        if self._size > self._max:
            raise too_large(f"more than {self._max} bytes", self._max)
        return message

    async def send(self, message: Message) -> None:
        """The server's ``send``; an answer before the whole body closes the connection."""
        if message["type"] == "http.response.start" and not self._whole:
            MutableHeaders(scope=message)["Connection"] = "close"
            if message["status"] != 408 and not self._waits:
                await self._linger()
        await self._send(message)

    async def _linger(self) -> None:
        """Read on a little: closing with unread data resets what the client has yet to read."""
        end = asyncio.get_running_loop().time() + _LINGER_S
        most = self._size + _LINGER_BYTES
        while not self._whole and self._size < most:
            left = end - asyncio.get_running_loop().time()
            try:
                self._note(await within(left, self._receive()))
            except asyncio.TimeoutError:
                return

    def _note(self, message: Message) -> None:
        self._size += len(message.get("body", b""))
        self._whole = message["type"] == "http.disconnect" or not message.get("more_body", False)


def too_large(size: str, limit: int) -> ApiError:
    """413 with the numbers."""
    return ApiError(413, f"the body has {size}; at most {limit} are read", code="request_too_large")
