"""What a process that renders chat templates is asked and answers: typed frames over a local
socket, never pickled."""

from __future__ import annotations

import socket
import time
from typing import Any, TypeVar

import msgspec

LIMIT = 1 << 28  # bytes of the largest frame
_CHUNK = 1 << 20  # bytes read at once

Kind = TypeVar("Kind")


class Render(msgspec.Struct, frozen=True, tag="render"):
    """Render ``messages``. ``tokens``: the tokenizer's special tokens by name. A rendering has at
    most ``max_chars`` characters."""

    template: str
    tokens: dict[str, str]
    messages: list[dict[str, Any]]
    add_generation_prompt: bool
    max_chars: int


class Look(msgspec.Struct, frozen=True, tag="look"):
    """Find out what shape of content a template wants, by rendering short conversations."""

    template: str
    tokens: dict[str, str]


class Limits(msgspec.Struct, frozen=True):
    """What one job may take: seconds of computing, seconds by the clock, bytes of memory more than
    the process has. The kernel ends a process that passes either time."""

    cpu_s: float
    wall_s: float
    memory_bytes: int


class Job(msgspec.Struct, frozen=True):
    """One piece of work with its limits."""

    work: Render | Look
    limits: Limits


class Rendered(msgspec.Struct, frozen=True, tag="rendered"):
    """The text of a conversation."""

    text: str


class Looked(msgspec.Struct, frozen=True, tag="looked"):
    """What was found about a template. ``shapes``: by role, what its content must be like
    (``ds_cp.templates.shape``). ``lost``: roles whose text the template leaves out.
    ``failed``: the exception by role where every try ended with one."""

    shapes: dict[str, str]
    lost: list[str]
    failed: dict[str, str]


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """No rendering. ``kind``: "refused" (by the template's author), "raised", "broken" (it does
    not compile), "memory", "long", "lost" (a user's text is not in the rendering) or "unavailable"
    (the process cannot render at all). ``reason`` is one line."""

    kind: str
    reason: str


class Ended(msgspec.Struct, frozen=True, tag="ended"):
    """The process ended before it answered: by signal number ``signal``, or with exit code
    ``code``."""

    signal: int
    code: int


Answer = Rendered | Looked | Failed | Ended


def frame(message: Job | Answer) -> bytes:
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
