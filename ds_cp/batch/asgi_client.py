"""A request to an ASGI application in this process, without a socket."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

Message = MutableMapping[str, Any]
App = Callable[
    [Message, Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]],
    Awaitable[None],
]
Headers = tuple[tuple[bytes, bytes], ...]


@dataclass(frozen=True)
class Answer:
    """The application's answer. ``busy``: the request may be sent again later (429, or 503 with a
    time to retry)."""

    status: int
    request_id: str
    body: Any
    busy: bool


async def ask(
    app: App, url: str, body: bytes, headers: Headers = (), resumable: str = ""
) -> Answer:
    """POST a JSON body to an ASGI application and wait for the whole answer. ``resumable``: its
    name in the journal.

    Raises what the application raises, and ``ValueError`` when its answer has no end or is not
    JSON.
    """
    exchange = _Exchange(body)
    scope: Message = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": url,
        "raw_path": url.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [
            (b"host", b"127.0.0.1"),
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            *headers,
        ],
        "client": ("127.0.0.1", 0),
        "server": ("127.0.0.1", 0),
        "state": {"resumable": resumable},
    }
    try:
        await app(scope, exchange.receive, exchange.send)
    finally:
        exchange.over.set()
    if not exchange.whole:
        raise ValueError("the answer was cut off")
    answered = {name.lower(): value.decode("latin-1") for name, value in exchange.headers}
    busy = exchange.status == 429 or (exchange.status == 503 and b"retry-after" in answered)
    whole = json.loads(b"".join(exchange.parts))
    return Answer(exchange.status, answered.get(b"x-request-id", ""), whole, busy)


class _Exchange:
    """The ASGI server of one request, for a client that stays until it has the answer."""

    def __init__(self, body: bytes) -> None:
        self._body: bytes | None = body
        self.over = asyncio.Event()
        self.status = 500
        self.headers: list[tuple[bytes, bytes]] = []
        self.parts: list[bytes] = []
        self.whole = False

    async def receive(self) -> Message:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self.over.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = list(message.get("headers", ()))
        elif message["type"] == "http.response.body":
            self.parts.append(message.get("body", b""))
            self.whole = not message.get("more_body", False)
