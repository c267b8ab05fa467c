"""ASGI layers: request ids, the answer to unexpected errors, API keys, limits on reading.

They are plain ASGI because starlette's ``BaseHTTPMiddleware`` hides ``http.disconnect`` from the
routes.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import re
import secrets
import uuid
from collections.abc import Collection, Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ds_cp.api.errors import ApiError, internal_error, shutting_down
from ds_cp.api.transport.deadline import within

logger = logging.getLogger("ds_cp.api")

MAX_TARGET_BYTES = 8 * 1024  # bytes of a request's URL
BODY_BYTES_PER_S = 64 * 1024  # a body that arrives at this rate is never cut off
_NO_CODING = ("", "identity")  # names of no content coding at all
_SANE_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


class RequestIds:
    """Gives every request an id (``X-Request-Id``).

    The id is the client's if it is 1 to 64 characters of ``[A-Za-z0-9._-]``, else a new one; it
    is put into ``scope["state"]["request_id"]``.
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

        async def named_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        await self.app(scope, receive, named_send)


class Failures:
    """Answers 500 for exceptions that nothing caught, and 503 for a request that is cancelled at
    the end of a drain.

    The layers outside it, ids and CORS, have their headers on these answers too.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id: str = scope["state"]["request_id"]
        started = False

        async def watched_send(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            await self.app(scope, receive, watched_send)
        except asyncio.CancelledError:
            if started:
                raise
            await shutting_down().response()(scope, receive, watched_send)
        except Exception:
            logger.exception("request %s failed", request_id)
            if started:
                raise
            await internal_error(request_id).response()(scope, receive, watched_send)


class ApiKeys:
    """Asks for ``Authorization: Bearer KEY``, or Anthropic's ``x-api-key: KEY``, on every path but
    /health and ``open_paths``.

    The sha256 (hex) of the sent key is put into ``scope["state"]["key_digest"]``. It is compared
    with that of every key, without an early exit, so that the duration reveals nothing about a key.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str], open_paths: Collection[str] = ()) -> None:
        self.app = app
        self._open = frozenset({"/health", *open_paths})
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in self._open or self._allows(scope):
            await self.app(scope, receive, send)
            return
        error = ApiError(
            401,
            "a valid API key is needed: "
            "send the header Authorization: Bearer KEY, or x-api-key: KEY",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )
        await error.response()(scope, receive, send)

    def _allows(self, scope: Scope) -> bool:
        headers = Headers(scope=scope)
        scheme, _, key = headers.get("authorization", "").partition(" ")
        allowed = False
        # Some clients send both, one of them from their environment; a valid one is enough.
        for sent in (headers.get("x-api-key", ""), key if scheme.lower() == "bearer" else ""):
            digest = hashlib.sha256(sent.strip().encode("latin-1", "replace")).digest()
            found = False
            for known in self._digests:
                found |= secrets.compare_digest(digest, known)
            if found:
                scope.setdefault("state", {})["key_digest"] = digest.hex()
                allowed = True
        return allowed


class ReadLimits:
    """Bounds the bytes of a request's target and body, and the seconds of its body.

    A body in a content coding (gzip, ...) is a 415: decoding would need bounds of its own. Chunked
    bodies are counted as they arrive. A body may take ``timeout_s`` seconds plus one for
    each ``BODY_BYTES_PER_S`` received; then the answer is 408. An answer before the whole body
    closes its connection, which reads no more of it.
    """

    def __init__(self, app: ASGIApp, max_body_bytes: int, timeout_s: float) -> None:
        self.app = app
        self._max = max_body_bytes
        self._timeout_s = timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        body = _Body(scope, receive, self._max, self._timeout_s)
        error = self._refusal(scope)
        if error is not None:
            await error.response()(scope, body.receive, send)
        else:
            await self.app(scope, body.receive, send)

    def _refusal(self, scope: Scope) -> ApiError | None:
        target = len(scope.get("raw_path") or b"") + len(scope.get("query_string") or b"")
        if target > MAX_TARGET_BYTES:
            return ApiError(414, f"the URL has {target} bytes; at most {MAX_TARGET_BYTES}")
        codings = ",".join(Headers(scope=scope).getlist("content-encoding")).lower().split(",")
        coding = next((name.strip() for name in codings if name.strip() not in _NO_CODING), None)
        if coding is not None:
            return ApiError(
                415,
                f"the body is sent as {coding[:40]}; send it without a Content-Encoding",
                code="unsupported_content_encoding",
                headers={"Accept-Encoding": "identity"},
            )
        declared = Headers(scope=scope).get("content-length", "")
        if declared.isdecimal() and int(declared) > self._max:
            return too_large(f"{int(declared)} bytes", self._max)
        return None


class _Body:
    """The reading side of one request."""

    def __init__(self, scope: Scope, receive: Receive, max_bytes: int, timeout_s: float) -> None:
        headers = Headers(scope=scope)
        self._receive = receive
        self._max = max_bytes
        self._timeout_s = timeout_s
        self._begun = asyncio.get_running_loop().time()
        self._size = 0
        declared = headers.get("content-length", "0")
        self._whole = "transfer-encoding" not in headers and declared == "0"

    async def receive(self) -> Message:
        """The server's ``receive``, with the limits until the body is whole."""
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
        self._size += len(message.get("body", b""))
        self._whole = message["type"] == "http.disconnect" or not message.get("more_body", False)
        if self._size > self._max:
            raise too_large(f"more than {self._max} bytes", self._max)
        return message


def too_large(size: str, limit: int) -> ApiError:
    """413, with the size and the limit."""
    return ApiError(413, f"the body has {size}; at most {limit} are read", code="request_too_large")
