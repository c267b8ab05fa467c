"""The server loop over listening sockets. Signals and processes belong to the supervisor."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket
from collections.abc import Iterator, Sequence
from http import HTTPStatus

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from ds_cp.api.errors import error_type
from ds_cp.config import Server
from ds_cp.process import give_large_blocks_back

logger = logging.getLogger("ds_cp.api")

MAX_CONNECTIONS = 1024  # connections open at once; more are answered 503
KEEP_ALIVE_CONNECTION_S = 30  # seconds that a connection may be idle between requests
_AFTER_CANCEL_S = 2.0  # seconds for requests cancelled at the end of a drain to answer
_PAUSE_S = 0.1  # seconds for the last bytes to reach the sockets


class Connection(H11Protocol):
    """One connection: heads have a deadline, and what is not HTTP is refused in OpenAI's shape.

    uvicorn itself waits for the rest of a half-sent head without a limit.
    """

    header_timeout_s = 10.0
    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A new connection must send a whole head in time."""
        super().connection_made(transport)
        self._watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the deadline."""
        self._forget_head()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """A head that has begun keeps its deadline; a whole one has met it."""
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._forget_head()
        elif self._head_timer is None:
            self._watch_head()

    def on_response_complete(self) -> None:
        """After an answer, uvicorn's limit for idle connections counts until the next byte."""
        self._forget_head()
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:
        """Answer 400 in OpenAI's shape, unless an answer has begun."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.abort()
            return
        self._refuse(400, "this is not valid HTTP/1.1")

    def _watch_head(self) -> None:
        self._head_timer = self.loop.call_later(self.header_timeout_s, self._head_late)

    def _forget_head(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_late(self) -> None:
        self._head_timer = None
        if self.transport.is_closing():
            return
        if self.conn.our_state is h11.IDLE and self.conn.trailing_data[0]:
            self._refuse(408, "the request's head was not received in time")
        else:
            self.transport.close()

    def _refuse(self, status: int, message: str) -> None:
        error = {"message": message, "type": error_type(status), "param": None, "code": None}
        body = json.dumps({"error": error}).encode()
        headers = [
            ("content-type", "application/json"),
            ("content-length", str(len(body))),
            ("connection", "close"),
        ]
        for part in (
            h11.Response(status_code=status, headers=headers, reason=HTTPStatus(status).phrase),
            h11.Data(data=body),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(part) or b"")
        self.transport.close()


class _Server(uvicorn.Server):
    """uvicorn without signal handlers: the supervisor owns signals."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def serve_until(
    app: FastAPI,
    listeners: Sequence[socket.socket],
    server: Server,
    stop: asyncio.Event,
    *,
    access_log: bool = False,
) -> None:
    """Serve until ``stop`` is set, then drain: no new connection, running requests may finish.

    Requests that run on after ``server.drain_timeout_s`` seconds are cancelled: their engine
    requests are aborted, their clients get a 503 or an error event. Closes ``listeners``. Raises
    what the server raises if it fails by itself.
    """
    give_large_blocks_back()
    http = _Server(_config(app, server, access_log))
    running = asyncio.create_task(http.serve(sockets=list(listeners)))
    stopping = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({running, stopping}, return_when=asyncio.FIRST_COMPLETED)
        http.should_exit = True
        await running
        left = set(http.server_state.tasks)
        if left:
            await asyncio.wait(left, timeout=_AFTER_CANCEL_S)
            await asyncio.sleep(_PAUSE_S)  # let the last bytes reach the sockets
    finally:
        stopping.cancel()
        if not running.done():
            running.cancel()
        await asyncio.gather(running, stopping, return_exceptions=True)
        for listener in listeners:
            listener.close()


def _config(app: FastAPI, server: Server, access_log: bool) -> uvicorn.Config:
    connection = type("Connection", (Connection,), {"header_timeout_s": server.header_timeout_s})
    return uvicorn.Config(
        app,
        http=connection,
        ws="none",
        lifespan="on",
        log_config=None,
        log_level="error",  # its warnings are what any client can cause
        access_log=access_log,
        proxy_headers=False,
        server_header=False,
        limit_concurrency=MAX_CONNECTIONS,
        timeout_keep_alive=KEEP_ALIVE_CONNECTION_S,
        timeout_graceful_shutdown=max(1, round(server.drain_timeout_s)),
    )
