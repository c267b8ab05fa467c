"""Accepting connections, also when files or places run out."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import Callable, Sequence

from ds_cp.api.transport.capacity import Capacity, Seldom
from ds_cp.api.transport.connection import Connection

ACCEPTS_PER_TURN = 16  # connections of a listener that one turn of the loop accepts
_NO_ROOM_PAUSE_S = 0.02  # seconds until the next try when every place is taken
_ERROR_PAUSE_S = 0.25  # seconds until the next try when the system refuses
_LOG_PERIOD_S = 60.0  # seconds between lines about that
_GONE = (errno.ECONNABORTED, errno.EPROTO)  # the client has left the queue


class Acceptor:
    """Accepts connections of ``listeners`` (non-blocking) until it is closed.

    asyncio's own loop logs a traceback for every accept that the system refuses, many in a turn.
    This one says it once a minute, closes an idle connection, and goes on after a pause.
    """

    def __init__(
        self,
        listeners: Sequence[socket.socket],
        capacity: Capacity,
        connect: Callable[[], Connection],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._listeners = list(listeners)
        self._capacity = capacity
        self._connect = connect
        self._refusals = Seldom(_LOG_PERIOD_S)
        self._starting: set[asyncio.Task[None]] = set()
        self._pauses: dict[socket.socket, asyncio.TimerHandle] = {}
        for listener in self._listeners:
            self._listen(listener)

    def close(self) -> None:
        """Accept no more. The listeners stay open."""
        for listener in self._listeners:
            self._loop.remove_reader(listener)
        for pause in self._pauses.values():
            pause.cancel()
        self._listeners.clear()
        self._pauses.clear()

    def _listen(self, listener: socket.socket) -> None:
        self._pauses.pop(listener, None)
        self._loop.add_reader(listener, self._accept, listener)

    def _pause(self, listener: socket.socket, seconds: float) -> None:
        self._loop.remove_reader(listener)
        self._pauses[listener] = self._loop.call_later(seconds, self._listen, listener)

    def _accept(self, listener: socket.socket) -> None:
        for _ in range(ACCEPTS_PER_TURN):
            if not self._capacity.has_room():
                self._pause(listener, _NO_ROOM_PAUSE_S)
                return
            try:
                sock, _ = listener.accept()
            except (BlockingIOError, InterruptedError):
                return
            except OSError as err:
                if err.errno in _GONE:
                    continue
                self._refusals.warning(
                    f"no connection can be accepted ({os.strerror(err.errno or 0)}); "
                    f"idle ones are closed, the next try is in {_ERROR_PAUSE_S:g} s"
                )
                self._capacity.close_idle()
                self._pause(listener, _ERROR_PAUSE_S)
                return
            self._start(sock)

    def _start(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        connection = self._connect()
        self._capacity.add(connection)
        task = self._loop.create_task(self._attach(sock, connection))
        self._starting.add(task)
        task.add_done_callback(self._starting.discard)

    async def _attach(self, sock: socket.socket, connection: Connection) -> None:
        try:
            # asyncio does this only for sockets that were made with a protocol's number. Without
            # it the kernel holds an answer's second piece, and each event of a stream, until the
            # client acknowledges the one before, which clients put off for 40 ms.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await self._loop.connect_accepted_socket(lambda: connection, sock)
        except OSError:  # it has left already
            self._capacity.discard(connection)
            sock.close()
