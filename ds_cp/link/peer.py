"""One proved connection, as an event loop uses it."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from typing import Literal

from ds_cp.link.seal import HEAD, MAX_FRAME, Seal, SealError, size_of

# How a connection has ended: by the other process, since its system does not answer, since it says
# nothing.
Ended = Literal["closed", "unreachable", "stalled"]
LOW_DELAY = 0x10  # the IPv4 type of service that asks for it
KEEP_IDLE_S = 1  # seconds of silence after which a system asks the other one whether it is there


class SealedPeer:
    """Messages of one connection, each sealed."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, seal: Seal
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._seal = seal
        self.ended: Ended = "closed"
        self.heard = time.monotonic()  # when the last message came

    def send(self, payload: bytes) -> None:
        """Send one message; nothing happens when the other side is gone."""
        with contextlib.suppress(OSError, RuntimeError):
            self._writer.write(self._seal.close_over(payload))

    async def receive(self) -> bytes | None:
        """The next message; None at the end, and for what was not sent by the other side."""
        try:
            message = self._seal.open(await read_frame(self._reader, MAX_FRAME))
            self.heard = time.monotonic()
            return message
        except (ConnectionResetError, BrokenPipeError, EOFError, SealError):
            return None
        except OSError:  # time-out, no route
            self.ended = "unreachable"
            return None

    def close(self) -> None:
        """End the connection; what was sent still arrives."""
        with contextlib.suppress(OSError, RuntimeError):
            self._writer.close()

    def give_up(self) -> None:
        """The other process says nothing, though its system answers."""
        self.ended = "stalled"
        self.abort()

    def abort(self) -> None:
        """End the connection at once."""
        with contextlib.suppress(OSError, RuntimeError):
            self._writer.transport.abort()


async def read_frame(reader: asyncio.StreamReader, limit: int) -> bytes:
    """The next frame, without its length. Raises ``EOFError``, ``OSError`` at the end of the
    connection, ``SealError`` for one above ``limit`` bytes."""
    return await reader.readexactly(size_of(await reader.readexactly(HEAD), limit))


def watch_peer(sock: socket.socket, unheard_s: float | None) -> None:
    """Have the system end a connection whose other system does not answer for ``unheard_s``
    seconds, whatever the processes on both sides are busy with (Linux; elsewhere: keep-alive). What
    it carries goes before bulk, where queues know the difference."""
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if unheard_s is None:
        return
    if sock.family == socket.AF_INET:
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, LOW_DELAY)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    options = {
        "TCP_KEEPIDLE": KEEP_IDLE_S,
        "TCP_KEEPINTVL": KEEP_IDLE_S,
        "TCP_KEEPCNT": max(1, round(unheard_s)),
        "TCP_USER_TIMEOUT": round(unheard_s * 1000),
    }
    for name, value in options.items():
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
