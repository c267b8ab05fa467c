"""Between the supervisors of a job: what ends on one rank is known to rank 0 at once.

A killed worker says nothing; its peers learn of it by a lost connection, and of the cause never.
Its supervisor, which is its parent, knows both within a moment and tells rank 0's. A connection
that ends without a good-bye is a supervisor that was killed; where another host does not answer,
the host or the network to it is lost. On one host the socket is a local one, whose peers the kernel
names: only processes of the same user are heard, and of each rank only one. Its name says which
process launched the job, so that what a failed start left behind does not find the next job on the
same port. Between hosts it is rank 0's port (``ds_cp.link``). Messages are JSON, bounded.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import time
from collections.abc import Callable, Coroutine
from dataclasses import replace

import msgspec

from ds_cp.errors import DsCpError
from ds_cp.link.knock import Port, knock_async
from ds_cp.serve.job_words import (
    Asked,
    Bye,
    Gone,
    Hello,
    LocalPeer,
    Lost,
    Noted,
    Peer,
    Said,
    Stopping,
    beat,
    receive,
    send,
)
from ds_cp.topology.job import Job

RETRY_S = 0.1  # seconds between tries to reach rank 0's supervisor, which may start later
REPORT_S = 2.0  # seconds that a report waits for rank 0 to have it
_LINE = 32 * 1024  # bytes of a message, at most


def link_name(job: Job, launched_by: str = "") -> str | None:
    """The job's name in Linux's abstract namespace of local sockets; None where supervisors have no
    link: one rank, several hosts, another system. ``launched_by``: the launcher's process, the same
    for all ranks."""
    if job.world_size == 1 or not job.one_host or not sys.platform.startswith("linux"):
        return None
    return f"\0ds_cp/{os.getuid()}/{job.store_port}/{launched_by}"


def has_link(job: Job) -> bool:
    """Whether the supervisors of this job hear of each other: on one host, or by rank 0's port."""
    return job.by_port or link_name(job) is not None


class LeadingLink:
    """Rank 0's side. Each function gets the rank: ``on_lost`` with what it reported, ``on_gone``
    for a supervisor that ended without a good-bye, ``on_stopping`` with the reason and whether to
    hurry, ``on_said`` with what its worker does. ``on_here`` gets the first message of a supervisor
    that is here, for the first time or again, and may ``ask`` it. They run in the event loop.
    """

    def __init__(
        self,
        world_size: int,
        on_lost: Callable[[int, Lost], None],
        on_gone: Callable[[int, Gone], None],
        on_stopping: Callable[[int, str, bool], None],
    ) -> None:
        self._world_size = world_size
        self._on_lost = on_lost
        self._on_gone = on_gone
        self._on_stopping = on_stopping
        self.on_said: Callable[[int, Said], None] = lambda rank, said: None
        self.on_here: Callable[[Hello], None] = lambda hello: None
        self._peers: dict[int, Peer] = {}  # by rank
        self._closed = False
        self._server: asyncio.AbstractServer | None = None
        self._beating: asyncio.Task[None] | None = None

    async def open(self, name: str) -> None:
        """Listen on this host. Where the name is taken, there is no link."""
        with contextlib.suppress(OSError):
            self._server = await asyncio.start_unix_server(self._attend, name, limit=_LINE)

    def open_to_hosts(self, hang_s: float | None) -> None:
        """Others come by rank 0's port, and whoever lets them in calls ``listen``. ``hang_s``: as
        in ``beat``."""
        self._beating = asyncio.create_task(beat(self._peers.values, hang_s))

    @property
    def is_open(self) -> bool:
        """Whether other supervisors can reach this one."""
        return self._server is not None or self._beating is not None

    @property
    def present(self) -> frozenset[int]:
        """The ranks whose supervisors are connected."""
        return frozenset(self._peers)

    def ask(self, rank: int, asked: Asked) -> None:
        """Ask another rank's supervisor; nothing happens when that is gone, which ends the job."""
        if rank in self._peers:
            send(self._peers[rank], asked)

    async def close(self) -> None:
        """Say good-bye to all."""
        self._closed = True
        for peer in self._peers.values():
            send(peer, Bye())
            peer.close()
        if self._server is not None:
            self._server.close()
        if self._beating is not None:
            self._beating.cancel()

    async def _attend(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # At the end of the loop; Python 3.11 would log the cancellation of such a task.
        with contextlib.suppress(asyncio.CancelledError):
            peer = LocalPeer(reader, writer)
            hello = await receive(peer) if peer.is_ours else None
            if isinstance(hello, Hello) and not self.why_not(hello.rank):
                send(peer, Hello(0, os.getpid()))
                await self.listen(hello, peer)
            else:
                peer.close()

    async def listen(self, hello: Hello, peer: Peer) -> None:
        """Hear what another rank's supervisor says, to its end."""
        rank = hello.rank
        self._peers[rank] = peer
        self.on_here(hello)
        try:
            while not isinstance(message := await receive(peer), Bye):
                if isinstance(message, Lost):
                    send(peer, Noted())
                    since = None if hello.host else message.since  # another clock
                    self._on_lost(rank, msgspec.structs.replace(message, since=since))
                elif isinstance(message, Stopping):
                    self._on_stopping(rank, message.reason, message.hurry)
                elif isinstance(message, Said):
                    self.on_said(rank, message)
                elif message is None:
                    break
        finally:
            del self._peers[rank]
            peer.close()
        if message is None and not self._closed:
            self._on_gone(rank, Gone(hello.pid, hello.host, peer.ended))

    def why_not(self, rank: int) -> str:
        """Why the supervisor of ``rank`` is not heard, "" where it is."""
        if rank in self._peers:
            return f"rank {rank} is here already: two jobs, or two launches of one, meet here"
        return "" if 0 < rank < self._world_size else f"there is no rank {rank} to come"


class FollowingLink:
    """Another rank's side. ``on_gone`` gets 0 and who rank 0's supervisor was when that ends
    without a good-bye. ``patience_s``: seconds that rank 0 may start later. ``on_asked`` gets
    what rank 0 asks, ``on_bye`` is called when it ends as it should, ``on_refused`` with the reason
    when it does not let this rank in. ``mark``: see ``Hello``; "" where the job never goes on
    without this rank."""

    def __init__(
        self,
        rank: int,
        patience_s: float,
        on_gone: Callable[[int, Gone], None],
    ) -> None:
        self.on_asked: Callable[[Asked], None] = lambda asked: None
        self.on_bye: Callable[[], None] = lambda: None
        self.on_away: Callable[[Gone], None] = lambda gone: None
        self.on_back: Callable[[], None] = lambda: None
        self.on_refused: Callable[[DsCpError], None] = lambda err: None
        self.mark = ""
        self._rank = rank
        self._patience_s = patience_s
        self._on_gone = on_gone
        self._peer: Peer | None = None
        self._connected = asyncio.Event()
        self._noted = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._beating: asyncio.Task[None] | None = None
        self._returns_s = 0.0

    async def open(self, name: str) -> None:
        """Begin to reach rank 0's supervisor on this host."""
        self._task = asyncio.create_task(self._run(self._reach(name)))

    async def open_to_host(self, port: Port, hang_s: float | None, returns_s: float = 0.0) -> None:
        """Begin to reach it on another host. ``hang_s``: as in ``beat``. Where that host cannot be
        reached any more, this side calls ``on_away``, and tries for ``returns_s`` seconds; then it
        calls ``on_back``, or ``on_gone``."""
        self._returns_s = returns_s
        self._beating = asyncio.create_task(beat(self._connections, hang_s))
        self._task = asyncio.create_task(self._run(self._reach_host(port), port))

    async def report(self, lost: Lost) -> bool:
        """Tell rank 0 that this rank's worker is lost. Whether it has heard."""
        if self._task is not None and not self._task.done():
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._report(lost), REPORT_S)
        return self._noted.is_set()

    async def _report(self, lost: Lost) -> None:
        await self._connected.wait()
        assert self._peer is not None
        send(self._peer, lost)
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
            send(self._peer, said)

    def stopping(self, reason: str, hurry: bool) -> None:
        """Tell rank 0 that this rank was asked to end."""
        if self._peer is not None:
            send(self._peer, Stopping(reason, hurry))

    async def close(self) -> None:
        """Say good-bye."""
        if self._peer is not None:
            send(self._peer, Bye())
            self._peer.close()
        tasks = [task for task in (self._task, self._beating) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(
        self, reaching: Coroutine[None, None, tuple[Peer, Gone] | None], port: Port | None = None
    ) -> None:
        reached = await reaching
        while reached is not None:
            self._peer, gone = reached
            self._connected.set()
            said_bye = await self._hear(self._peer)
            self._connected.clear()
            self._peer.close()
            if said_bye:
                self.on_bye()
                return
            gone = msgspec.structs.replace(gone, how=self._peer.ended)
            reached = None
            if port is not None and gone.how == "unreachable" and self._returns_s > 0:
                self.on_away(gone)
                reached = await self._come_back(port)
            if reached is None:
                self._on_gone(0, gone)
            else:
                self.on_back()

    async def _hear(self, peer: Peer) -> bool:
        """Hear rank 0 to its end. Whether it said good-bye."""
        while not isinstance(message := await receive(peer), Bye):
            if isinstance(message, Noted):
                self._noted.set()
            elif isinstance(message, Asked):
                self.on_asked(message)
            elif message is None:
                return False
        return True

    async def _come_back(self, port: Port) -> tuple[Peer, Gone] | None:
        """Reach rank 0 again, which may not know yet that this one was gone."""
        end = time.monotonic() + self._returns_s
        while (left := end - time.monotonic()) > 0:
            with contextlib.suppress(DsCpError):
                peer, verdict = await knock_async(replace(port, timeout_s=left))
                return peer, Gone(verdict.pid, verdict.host)
            await asyncio.sleep(RETRY_S)
        return None

    async def _reach(self, name: str) -> tuple[Peer, Gone] | None:
        end = time.monotonic() + self._patience_s
        while True:
            with contextlib.suppress(OSError):
                peer = LocalPeer(*await asyncio.open_unix_connection(name, limit=_LINE))
                send(peer, Hello(self._rank, os.getpid(), mark=self.mark))
                hello = await receive(peer) if peer.is_ours else None
                if isinstance(hello, Hello):
                    return peer, Gone(hello.pid)
                peer.close()
                if not self.mark:  # else rank 0's may still count on who was here before
                    return None
            if time.monotonic() >= end:
                return None
            await asyncio.sleep(RETRY_S)

    async def _reach_host(self, port: Port) -> tuple[Peer, Gone] | None:
        try:
            peer, verdict = await knock_async(port)
        except DsCpError as err:
            self.on_refused(err)
            return None
        return peer, Gone(verdict.pid, verdict.host)

    def _connections(self) -> list[Peer]:
        return [self._peer] if self._peer is not None and self._connected.is_set() else []
