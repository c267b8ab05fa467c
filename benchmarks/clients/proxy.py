"""A small proxy in front of the server under test: it records what clients send and gives the
answers of a busy or failing server, in the server's own words.

A client's base URL is ``PROXY/t/LABEL/FAULT/v1``. ``LABEL`` keeps requests apart; ``FAULT`` is

- ``none``: everything goes through;
- ``429x1``, ``503x1``: the first request of that label gets this status, the others go through;
- ``events3``: a stream is cut after three events by the error event of a stopped engine.

``GET PROXY/t/LABEL/count`` tells how many requests came. Each connection carries one request.
"""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections import Counter
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from ds_cp.api.answers.named_events import named_event
from ds_cp.api.error_shapes import is_messages_path, messages_error
from ds_cp.api.errors import ApiError, from_engine, not_ready
from ds_cp.errors import QueueFullError

_PATH = re.compile(r"/t/([\w.-]+)/(?:(count)$|(none|(429|503)x(\d+)|events(\d+))(/.*))")
_WAIT_S = 120.0  # seconds for any one thing to arrive
_QUEUE = QueueFullError("the queue is full: 1 request waits; try again in a moment")


@dataclass(frozen=True)
class Sent:
    """One request of a client."""

    label: str
    method: str
    path: str
    headers: dict[str, str]  # lower-case names
    body: Any  # the JSON, None without one


@dataclass
class Proxy:
    """Use as a context manager; ``url`` is known inside."""

    target: str
    sent: list[Sent] = field(default_factory=list)
    url: str = ""
    _counts: Counter[str] = field(default_factory=Counter)

    def __enter__(self) -> Proxy:
        started = threading.Event()
        self._thread = threading.Thread(
            target=lambda: asyncio.run(self._serve(started)), daemon=True
        )
        self._thread.start()
        assert started.wait(10), "the proxy did not start"
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)

    def forget(self) -> None:
        """Begin anew: nothing recorded, nothing counted."""
        self.sent.clear()
        self._counts.clear()

    async def _serve(self, started: threading.Event) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        server = await asyncio.start_server(self._client, "127.0.0.1", 0, limit=1 << 20)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        started.set()
        await self._stop.wait()
        server.close()

    async def _client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await asyncio.wait_for(self._answer(reader, writer), _WAIT_S)
        except (OSError, EOFError, asyncio.TimeoutError, asyncio.IncompleteReadError):
            pass  # the client or the server left; the other one is told by the close
        finally:
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")[:-2]
        method, target, _ = first.split(" ")
        headers = {n.strip().lower(): v.strip() for n, _, v in (ln.partition(":") for ln in lines)}
        body = await reader.readexactly(int(headers.get("content-length", "0")))
        found = _PATH.match(target)
        if not found:
            error = ApiError(404, f"no such path of the proxy: {target[:200]}")
            writer.write(_whole(error, target))
            return
        label, counted, _, status, first_n, events, path = found.groups()
        if counted:
            writer.write(_json(200, {"count": self._counts[label]}))
            return
        self._counts[label] += 1
        self.sent.append(Sent(label, method, path, headers, _parsed(body)))
        if status and self._counts[label] <= int(first_n):
            busy = from_engine(_QUEUE) if status == "429" else not_ready("starting")
            assert busy is not None
            writer.write(_whole(busy, path))
            return
        await self._through(reader, writer, method, path, headers, body, int(events or 0))

    async def _through(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        method: str,
        path: str,
        headers: dict[str, str],
        body: bytes,
        events: int,
    ) -> None:
        parts = urlsplit(self.target)
        above, upstream = await asyncio.open_connection(parts.hostname, parts.port)
        kept = headers | {"host": parts.netloc, "connection": "close"}
        head = "".join(f"{name}: {value}\r\n" for name, value in kept.items())
        upstream.write(f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode("latin-1") + body)
        left = asyncio.create_task(reader.read())  # ends when the client leaves
        copied = asyncio.create_task(_copy(above, writer, path, events))
        try:
            await asyncio.wait({left, copied}, return_when=asyncio.FIRST_COMPLETED)
            if copied.done():
                copied.result()
        finally:
            for task in (left, copied):
                task.cancel()
            await asyncio.gather(left, copied, return_exceptions=True)
            upstream.close()


async def _copy(
    above: asyncio.StreamReader, writer: asyncio.StreamWriter, path: str, events: int
) -> None:
    """Hand an answer on; with ``events``, end it by an error event after that many chunks."""
    seen, handed = b"", 0
    while data := await above.read(65536):
        seen = (seen + data) if events else b""
        ends = [found.end() for found in re.finditer(rb"\n\n\r\n", seen)]
        if events and len(ends) >= events:
            text = _last_event(not_ready("dead"), path)
            last = b"%x\r\n%s\r\n0\r\n\r\n" % (len(text), text)
            writer.write(seen[handed : ends[events - 1]] + last)
            await writer.drain()
            return
        writer.write(data)
        handed += len(data)
        await writer.drain()


def _parsed(body: bytes) -> Any:
    try:
        return json.loads(body) if body else None
    except ValueError:
        return None


def _last_event(error: ApiError, path: str) -> bytes:
    if is_messages_path(path.partition("?")[0]):
        return named_event(_body(error, path))
    return b"data: " + json.dumps(_body(error, path)).encode() + b"\n\ndata: [DONE]\n\n"


def _whole(error: ApiError, path: str) -> bytes:
    return _json(error.status_code, _body(error, path), dict(error.headers or {}))


def _body(error: ApiError, path: str) -> dict[str, Any]:
    """An error in the shape of the protocol that a path is of."""
    if is_messages_path(path.partition("?")[0]):
        return messages_error(error.status_code, error.body()["error"]["message"], None)
    return error.body()


def _json(status: int, value: Any, headers: dict[str, str] | None = None) -> bytes:
    data = json.dumps(value).encode()
    named = {"Content-Type": "application/json", "Content-Length": str(len(data))}
    lines = named | {"Connection": "close"} | (headers or {})
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return f"HTTP/1.1 {status} x\r\n{head}\r\n".encode() + data
