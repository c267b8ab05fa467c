"""What the supervisors of a job say to each other, and a connection that carries it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
import time
from collections.abc import Callable, Iterable
from typing import Protocol

import msgspec

from ds_cp.config.fault_tolerance import FaultTolerance
from ds_cp.facts import Facts
from ds_cp.link.peer import Ended
from ds_cp.serve.orders import Order, Word

BEAT_S = 0.25  # seconds between signs of life to other hosts
GAP_S = 1.0  # seconds between them, above which this process did not run
LEAST_STALL_S = 30.0  # seconds without a sign of life that a supervisor is always given
ORPHAN_S = 1.0  # seconds that a worker has to end once rank 0's supervisor is gone


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    """A supervisor's first message; both sides send it. ``host``: "" on one host; ``mark``: a
    digest of its config and version there; between hosts these are compared before."""

    rank: int
    pid: int
    host: str = ""
    mark: str = ""


class Lost(msgspec.Struct, frozen=True, tag="lost"):
    """The sender's worker has ended by no wish of anyone; the job's exit code. ``since``: it lived
    at that ``time.monotonic()``, which is one clock on one host; None when it said the cause, and
    from another host."""

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


class Starting(msgspec.Struct, frozen=True, tag="starting"):
    """The job starts: all ranks are to join."""


class Running(msgspec.Struct, frozen=True, tag="running"):
    """The job runs, without the receiver's worker, which is to load alone and say so. ``facts``: of
    the start."""

    facts: Facts


class Unwanted(msgspec.Struct, frozen=True, tag="unwanted"):
    """The job runs, and the receiver cannot be a part of it."""

    why: str


class Noted(msgspec.Struct, frozen=True, tag="noted"):
    """Rank 0 has a ``Lost``."""


class Beat(msgspec.Struct, frozen=True, tag="beat"):
    """Sent now and then to another host, whose system has to answer."""


class Bye(msgspec.Struct, frozen=True, tag="bye"):
    """The sender ends as it should."""


Said = Died | Word  # to rank 0, on its worker
Asked = End | Starting | Running | Unwanted | Order  # by rank 0
Message = Hello | Lost | Stopping | Noted | Beat | Bye | Said | Asked


def stall_limit(limits: FaultTolerance) -> float | None:
    """Seconds in which a supervisor of another host has to give a sign of life: a busy machine may
    keep one from running for longer than a worker's threads, and its end may be the job's."""
    return None if limits.hang_s is None else max(limits.hang_s, LEAST_STALL_S)


class Gone(msgspec.Struct, frozen=True):
    """A supervisor that ended without a good-bye: it was killed; or ``how`` its connection ended
    says that its host, or the network to it, does not answer, or that it stands still. ``host``: ""
    on this one."""

    pid: int
    host: str = ""
    how: Ended = "closed"

    def describe(self, rank: int, limits: FaultTolerance) -> str:
        """What has happened to the supervisor of ``rank``, and the limits that it did not keep."""
        if self.how == "unreachable":
            return (
                f"host {self.host} of rank {rank} did not answer for {limits.host_timeout_s:g} s "
                "(fault_tolerance.host_timeout_s): it is down, or the network to it"
            )
        where = f" on {self.host}" if self.host else ""
        who = f"the supervisor of rank {rank} (process {self.pid}{where})"
        if self.how == "stalled":
            return (
                f"{who} gave no sign of life for {stall_limit(limits):g} s (fault_tolerance.hang_s)"
            )
        return f"{who} was killed"


class Peer(Protocol):
    """One connection. ``ended``: how, once it has; ``heard``: when the last message came, in
    ``time.monotonic()``."""

    ended: Ended
    heard: float

    def send(self, payload: bytes) -> None:
        """Send one message; nothing happens when the other side is gone."""
        ...

    async def receive(self) -> bytes | None:
        """The next message; None at the end, and for what is none."""
        ...

    def close(self) -> None:
        """End the connection; what was sent still arrives."""
        ...

    def give_up(self) -> None:
        """End it at once, since nothing is heard."""
        ...


class LocalPeer:
    """A connection of one host, on which a message is a line."""

    ended: Ended = "closed"  # the kernel knows

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.heard = 0.0
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

    def give_up(self) -> None:
        self.close()

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


async def beat(peers: Callable[[], Iterable[Peer]], hang_s: float | None) -> None:
    """Give signs of life to other hosts, and expect theirs within ``hang_s``: what a system answers
    by itself says nothing of the process. Time in which this process did not run does not count."""
    last = time.monotonic()
    while True:
        await asyncio.sleep(BEAT_S)
        now = time.monotonic()
        for peer in list(peers()):
            send(peer, Beat())
            if now - last > GAP_S:
                peer.heard = now
            elif hang_s is not None and now - peer.heard > hang_s:
                peer.give_up()
        last = now
