"""Typed messages over a local socket between processes of one server: msgpack, never pickled."""

from __future__ import annotations

import socket
import time
from typing import Any

import msgspec

LIMIT = 1 << 28  # bytes of the largest frame
_CHUNK = 1 << 20  # bytes read at once


def frame(message: Any) -> bytes:
    """A message as bytes. Raises ``UnicodeEncodeError`` for half a surrogate pair, ``ValueError``
    for a message above ``LIMIT``."""
    raw = msgspec.msgpack.encode(message)
    if len(raw) > LIMIT:
        raise ValueError(f"a frame of {len(raw)} bytes is above the limit {LIMIT}")
    return len(raw).to_bytes(4, "little") + raw


def receive(sock: socket.socket, kind: Any, deadline: float | None = None) -> Any:
    """The next message, decoded as ``kind``; None when the other side has closed.

    ``deadline``: of ``time.monotonic()``; ``TimeoutError`` then. Raises ``OSError`` when the socket
    breaks, ``ValueError`` (msgspec's is one) for what is not such a message.
    """
    head = _exactly(sock, 4, deadline)
    if head is None:
        return None
    size = int.from_bytes(head, "little")
    if size > LIMIT:
        raise ValueError(f"a frame of {size} bytes is above the limit {LIMIT}")
    raw = _exactly(sock, size, deadline)
    return None if raw is None else msgspec.msgpack.decode(raw, type=kind)


def _exactly(sock: socket.socket, size: int, deadline: float | None) -> bytes | None:
    parts = bytearray()
    while len(parts) < size:
        if deadline is not None:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError("no answer in time")
            sock.settimeout(left)
        chunk = sock.recv(min(size - len(parts), _CHUNK))
        if not chunk:
            return None
        parts += chunk
    return bytes(parts)
