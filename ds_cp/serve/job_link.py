"""Between the supervisors of a job on one host: what ends on one rank is known to rank 0 at once.

A killed worker says nothing; its peers learn of it by a lost connection, and of the cause never.
Its supervisor, which is its parent, knows both within a moment and tells rank 0's. A connection
that ends without a good-bye is a supervisor that was killed. The socket is a local one, whose peers
the kernel names: only processes of the same user are heard, and of each rank only one. Its name
says which process launched the job, so that what a failed start left behind does not find the next
job on the same port. Lines of JSON, bounded.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
import sys
import time
from collections.abc import Callable

import msgspec

from ds_cp.facts import Facts
from ds_cp.serve.orders import Order, Word
from ds_cp.topology.job import Job

RETRY_S = 0.1  # seconds between tries to reach rank 0's supervisor, which may start later
REPORT_S = 2.0  # seconds that a report waits for rank 0 to have it
_LINE = 32 * 1024  # bytes of a message, at most


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    """A supervisor's first message; both sides send it. ``mark``: a digest of its config and
    version."""

    rank: int
    pid: int
    mark: str = ""


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


class Bye(msgspec.Struct, frozen=True, tag="bye"):
    """The sender ends as it should."""


Said = Died | Word  # to rank 0, on its worker
Asked = End | Starting | Running | Unwanted | Order  # by rank 0
Message = Hello | Lost | Stopping | Noted | Bye | Said | Asked


def link_name(job: Job, launched_by: str = "") -> str | None:
    """The job's name in Linux's abstract namespace of local sockets; None where supervisors have no
    link: one rank, several hosts, another system. ``launched_by``: the launcher's process, the same
    for all ranks."""
    if job.world_size == 1 or not job.one_host or not sys.platform.startswith("linux"):
        return None
    return f"\0ds_cp/{os.getuid()}/{job.store_port}/{launched_by}"


class _Peer:
    """One connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @property
    def is_ours(self) -> bool:
        """Whether a process of this user is on the other side."""
        sock = self._writer.get_extra_info("socket")
        found = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        return bool(struct.unpack("3i", found)[1] == os.getuid())

    def send(self, message: Message) -> None:
        """Send one message; nothing happens when the other side is gone."""
        with contextlib.suppress(OSError, RuntimeError):
            self._writer.write(msgspec.json.encode(message) + b"\n")

    async def receive(self) -> Message | None:
        """The next message; None at the end, and for what is no message."""
        try:
            line = await self._reader.readuntil(b"\n")
            message: Message = msgspec.json.decode(line, type=Message)
            return message
        except (OSError, EOFError, asyncio.LimitOverrunError, msgspec.MsgspecError):
            return None

    def close(self) -> None:
        """End the connection; what was sent still arrives."""
        with contextlib.suppress(OSError, RuntimeError):
            self._writer.close()


class LeadingLink:
    """Rank 0's side. Each function gets the rank: ``on_lost`` with what it reported, ``on_gone``
    with the process id of a supervisor that ended without a good-bye, ``on_stopping`` with the
    reason and whether to hurry, ``on_said`` with what its worker does. ``on_here`` gets the first
    message of a supervisor that is here, and may ``ask`` it. They run in the event loop.
    """

    def __init__(
        self,
        world_size: int,
        on_lost: Callable[[int, Lost], None],
        on_gone: Callable[[int, int], None],
        on_stopping: Callable[[int, str, bool], None],
    ) -> None:
        self._world_size = world_size
        self._on_lost = on_lost
        self._on_gone = on_gone
        self._on_stopping = on_stopping
        self.on_said: Callable[[int, Said], None] = lambda rank, said: None
        self.on_here: Callable[[Hello], None] = lambda hello: None
        self._peers: dict[int, _Peer] = {}  # by rank
        self._closed = False
        self._server: asyncio.AbstractServer | None = None

    async def open(self, name: str) -> None:
        """Listen. Where the name is taken, there is no link."""
        with contextlib.suppress(OSError):
            self._server = await asyncio.start_unix_server(self._attend, name, limit=_LINE)

    @property
    def is_open(self) -> bool:
        """Whether other supervisors can reach this one."""
        return self._server is not None

    def ask(self, rank: int, asked: Asked) -> None:
        """Ask another rank's supervisor; nothing happens when that is gone, which ends the job."""
        if rank in self._peers:
            self._peers[rank].send(asked)

    async def close(self) -> None:
        """Say good-bye to all."""
        self._closed = True
        for peer in self._peers.values():
            peer.send(Bye())
            peer.close()
        if self._server is not None:
            self._server.close()

    async def _attend(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # At the end of the loop; Python 3.11 would log the cancellation of such a task.
        with contextlib.suppress(asyncio.CancelledError):
            await self._listen(_Peer(reader, writer))

    async def _listen(self, peer: _Peer) -> None:
        hello = await peer.receive() if peer.is_ours else None
        if not isinstance(hello, Hello) or not self._expects(hello.rank):
            peer.close()
            return
        peer.send(Hello(0, os.getpid()))
        self._peers[hello.rank] = peer
        self.on_here(hello)
        try:
            while not isinstance(message := await peer.receive(), Bye):
                if isinstance(message, Lost):
                    peer.send(Noted())
                    self._on_lost(hello.rank, message)
                elif isinstance(message, Stopping):
                    self._on_stopping(hello.rank, message.reason, message.hurry)
                elif isinstance(message, Said):
                    self.on_said(hello.rank, message)
                elif message is None:
                    break
        finally:
            del self._peers[hello.rank]
            peer.close()
        if message is None and not self._closed:
            self._on_gone(hello.rank, hello.pid)

    def _expects(self, rank: int) -> bool:
        return 0 < rank < self._world_size and rank not in self._peers


class FollowingLink:
    """Another rank's side. ``on_gone`` gets 0 and the process id of rank 0's supervisor when that
    ends without a good-bye. ``patience_s``: seconds that rank 0 may start later. ``on_asked`` gets
    what rank 0 asks, ``on_bye`` is called when it ends as it should. ``mark``: see
    ``Hello``; "" where the job never goes on without this rank."""

    def __init__(
        self,
        rank: int,
        patience_s: float,
        on_gone: Callable[[int, int], None],
    ) -> None:
        self.mark = ""
        self.on_asked: Callable[[Asked], None] = lambda asked: None
        self.on_bye: Callable[[], None] = lambda: None
        self._rank = rank
        self._patience_s = patience_s
        self._on_gone = on_gone
        self._peer: _Peer | None = None
        self._connected = asyncio.Event()
        self._noted = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def open(self, name: str) -> None:
        """Begin to reach rank 0's supervisor."""
        self._task = asyncio.create_task(self._run(name))

    async def report(self, lost: Lost) -> bool:
        """Tell rank 0 that this rank's worker is lost. Whether it has heard."""
        if self._task is not None and not self._task.done():
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._report(lost), REPORT_S)
        return self._noted.is_set()

    async def _report(self, lost: Lost) -> None:
        await self._connected.wait()
        assert self._peer is not None
        self._peer.send(lost)
        await self._noted.wait()

    async def until_end(self, seconds: float) -> None:
        """Wait until rank 0's supervisor has ended, at most ``seconds``."""
        if self._task is None or self._peer is None:
            await asyncio.sleep(seconds)
        else:
            await asyncio.wait({self._task}, timeout=seconds)

    @property
    def is_open(self) -> bool:
        """Whether rank 0 hears."""
        return self._connected.is_set() and self._task is not None and not self._task.done()

    def say(self, said: Said) -> None:
        """Tell rank 0 what this rank's worker does."""
        if self._peer is not None:
            self._peer.send(said)

    def stopping(self, reason: str, hurry: bool) -> None:
        """Tell rank 0 that this rank was asked to end."""
        if self._peer is not None:
            self._peer.send(Stopping(reason, hurry))

    async def close(self) -> None:
        """Say good-bye."""
        if self._peer is not None:
            self._peer.send(Bye())
            self._peer.close()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self, name: str) -> None:
        end = time.monotonic() + self._patience_s
        hello: Hello | None = None
        while hello is None:
            if (peer := await self._reach(name)) is not None:
                hello = await self._greet(peer)
            if hello is None:
                if time.monotonic() >= end or (peer is not None and not self.mark):
                    return
                await asyncio.sleep(RETRY_S)
        assert peer is not None
        self._peer = peer
        self._connected.set()
        while not isinstance(message := await peer.receive(), Bye):
            if isinstance(message, Noted):
                self._noted.set()
            elif isinstance(message, Asked):
                self.on_asked(message)
            elif message is None:
                self._on_gone(0, hello.pid)
                return
        self.on_bye()

    async def _reach(self, name: str) -> _Peer | None:
        try:
            return _Peer(*await asyncio.open_unix_connection(name, limit=_LINE))
        except OSError:
            return None

    async def _greet(self, peer: _Peer) -> Hello | None:
        """None where this rank is not expected: with ``mark`` it tries again, since rank 0's may
        still count on the supervisor of this rank that was before."""
        peer.send(Hello(self._rank, os.getpid(), self.mark))
        hello = await peer.receive() if peer.is_ours else None
        if isinstance(hello, Hello):
            return hello
        peer.close()
        return None
