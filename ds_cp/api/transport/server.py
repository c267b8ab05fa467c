"""The server loop over listening sockets. Signals and processes belong to the supervisor."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Iterator, Sequence

import uvicorn
from fastapi import FastAPI
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from ds_cp.api.errors import RETRY_AFTER, ApiError
from ds_cp.api.transport.accept import Acceptor
from ds_cp.api.transport.capacity import Capacity, connection_bound
from ds_cp.api.transport.connection import Connection, Shared
from ds_cp.api.transport.head import METHODS
from ds_cp.api.transport.middleware import Failures, ReadLimits, RequestIds
from ds_cp.config import Server

logger = logging.getLogger("ds_cp.api")

KEEP_ALIVE_CONNECTION_S = 30  # seconds that a connection may be idle between requests
_AFTER_CANCEL_S = 2.0  # seconds for requests cancelled at the end of a drain to answer
_AFTER_HURRY_S = 0.5  # the same when the server is to end at once
_PAUSE_S = 0.1  # seconds for the last bytes to reach the sockets


class _Server(uvicorn.Server):
    """uvicorn without signal handlers, which the supervisor owns, over connections that this
    package accepts."""

    def __init__(
        self, config: uvicorn.Config, listeners: Sequence[socket.socket], shared: Shared
    ) -> None:
        super().__init__(config)
        self._listeners = listeners
        self._shared = shared
        self._acceptor: Acceptor | None = None

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start the application, then accept."""
        await super().startup(sockets=[])

        def connect() -> Connection:
            return Connection(self._shared, self.config, self.server_state, self.lifespan.state)

        self._acceptor = Acceptor(self._listeners, self._shared.capacity, connect)

    def stop_accepting(self) -> None:
        """Close the listeners."""
        if self._acceptor is not None:
            self._acceptor.close()
        for listener in self._listeners:
            listener.close()

    async def end_requests(self, patience_s: float) -> None:
        """Cancel what is in flight, let the clients be told within ``patience_s`` seconds, and
        close every connection."""
        tasks = set(self.server_state.tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=patience_s)
        await asyncio.sleep(_PAUSE_S)
        left = list(self.server_state.connections)
        for connection in left:
            connection.transport.abort()
        if left:
            logger.warning("%d connections were closed at the end of the drain", len(left))


async def serve_until(
    app: FastAPI,
    listeners: Sequence[socket.socket],
    server: Server,
    stop: asyncio.Event,
    hurry: asyncio.Event | None = None,
    *,
    access_log: bool = False,
) -> None:
    """Serve until ``stop`` is set, then drain: no new connection, running requests may finish.

    Requests that run on after ``server.drain_timeout_s`` seconds, or once ``hurry`` is set, are
    cancelled: their engine requests are aborted, their clients get a 503 or an error event. Then
    every connection is closed, whether or not its client reads: within 3 seconds, or one in a
    hurry. Closes ``listeners``. Raises what the server raises if it fails by itself.
    """
    hurry = hurry or asyncio.Event()
    http = _Server(_config(app, server, access_log), listeners, _shared(server))
    running = asyncio.create_task(http.serve())
    stopping = asyncio.create_task(stop.wait())
    hurrying = asyncio.create_task(hurry.wait())
    waits = {running, stopping, hurrying}
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        http.should_exit = True
        http.stop_accepting()
        await asyncio.wait(
            {running, hurrying},
            timeout=server.drain_timeout_s,
            return_when=asyncio.FIRST_COMPLETED,
        )
        if not running.done():
            await http.end_requests(_AFTER_HURRY_S if hurry.is_set() else _AFTER_CANCEL_S)
        await running
    finally:
        for task in waits:
            task.cancel()
        await asyncio.gather(*waits, return_exceptions=True)
        http.stop_accepting()


def _shared(server: Server) -> Shared:
    def within_limits(app: ASGIApp) -> ASGIApp:
        limits = ReadLimits(app, server.max_body_bytes, server.body_timeout_s)
        return RequestIds(Failures(limits))

    return Shared(
        Capacity(connection_bound(server.max_connections)),
        server.header_timeout_s,
        server.write_timeout_s,
        busy=within_limits(_busy),
        options=within_limits(_options),
    )


async def _busy(scope: Scope, receive: Receive, send: Send) -> None:
    error = ApiError(
        503,
        "every connection of this server is taken; try again in a moment",
        code="too_many_connections",
        headers={**RETRY_AFTER, "Connection": "close"},
    )
    await error.response()(scope, receive, send)


async def _options(scope: Scope, receive: Receive, send: Send) -> None:
    await Response(status_code=204, headers={"Allow": ", ".join(METHODS)})(scope, receive, send)


def _config(app: FastAPI, server: Server, access_log: bool) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http="httptools",
        ws="none",
        lifespan="on",
        log_config=None,
        log_level="error",  # its warnings are what any client can cause
        access_log=access_log,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_CONNECTION_S,
    )
