"""What the supervisors of a job say to each other, and a connection that carries it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
from typing import Protocol

import msgspec

from ds_cp.serve.orders import Order, Word


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    """A supervisor's first message; both sides send it. ``host``: "" on one host."""

    rank: int
    pid: int
    host: str = ""


class Lost(msgspec.Struct, frozen=True, tag="lost"):
    """The sender's worker has ended by no wish of anyone; the job's exit code. ``since``: it lived
    at that ``time.monotonic()``, which is one clock on one host; None when it said the cause."""

    cause: str
    exit_code: int = 1
    since: float | None = None


class Stopping(msgspec.Struct, frozen=True, tag="stopping"):
    """The sender was asked to end. ``hurry``: without waiting for requests."""

    reason: str
    hurry: bool


class Died(msgspec.Struct, frozen=True, tag="died"):
    """The sender's worker has ended by no wish of anyone, and another one loads."""

    cause: str


class End(msgspec.Struct, frozen=True, tag="end"):
    """The receiver is to kill its worker, which will be replaced as after any death."""

    why: str


class Noted(msgspec.Struct, frozen=True, tag="noted"):
    """Rank 0 has a ``Lost``."""


class Beat(msgspec.Struct, frozen=True, tag="beat"):
    """Sent now and then to another host, whose system has to answer."""


class Bye(msgspec.Struct, frozen=True, tag="bye"):
    """The sender ends as it should."""


Said = Died | Word  # to rank 0, on its worker
Asked = End | Order  # by rank 0
Message = Hello | Lost | Stopping | Noted | Beat | Bye | Said | Asked


class Gone(msgspec.Struct, frozen=True):
    """A supervisor that ended without a good-bye. ``silent``: its host, or the network to it, does
    not answer; else its process was killed. ``host``: "" on this one."""

    pid: int
    host: str = ""
    silent: bool = False

    def describe(self, rank: int, limit_s: float) -> str:
        """What has happened to the supervisor of ``rank``; ``limit_s``: how long it may be
        silent."""
        if self.silent:
            return (
                f"host {self.host} of rank {rank} did not answer for {limit_s:g} s "
                "(fault_tolerance.host_timeout_s): it is down, or the network to it"
            )
        where = f" on {self.host}" if self.host else ""
        return f"the supervisor of rank {rank} (process {self.pid}{where}) was killed"


class Peer(Protocol):
    """One connection. ``silent``: it has ended since the other host does not answer."""

    silent: bool

    def send(self, payload: bytes) -> None:
        """Send one message; nothing happens when the other side is gone."""
        ...

    async def receive(self) -> bytes | None:
        """The next message; None at the end, and for what is none."""
        ...

    def close(self) -> None:
        """End the connection; what was sent still arrives."""
        ...


class LocalPeer:
    """A connection of one host, on which a message is a line."""

    silent = False

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @property
    def is_ours(self) -> bool:
        """Whether a process of this user is on the other side."""
        sock = self._writer.get_extra_info("socket")
        found = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        return bool(struct.unpack("3i", found)[1] == os.getuid())

    def send(self, payload: bytes) -> None:
        with contextlib.suppress(OSError, RuntimeError):
            self._writer.write(payload + b"\n")

    async def receive(self) -> bytes | None:
        try:
            return await self._reader.readuntil(b"\n")
        except (OSError, EOFError, asyncio.LimitOverrunError):
            return None

    def close(self) -> None:
        with contextlib.suppress(OSError, RuntimeError):
            self._writer.close()


def send(peer: Peer, message: Message) -> None:
    """Send one message; nothing happens when the other side is gone."""
    peer.send(msgspec.json.encode(message))


async def receive(peer: Peer) -> Message | None:
    """The next message, but no sign of life; None at the end, and for what is no message."""
    while (raw := await peer.receive()) is not None:
        try:
            message: Message = msgspec.json.decode(raw, type=Message)
        except msgspec.MsgspecError:
            return None
        if not isinstance(message, Beat):
            return message
    return None
