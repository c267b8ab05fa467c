"""Rank 0's port: whoever comes has to prove that it is of the job, and is then led to what it came
for, the ranks' store or rank 0's supervisor. Who cannot is dropped and counted."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
from collections.abc import Awaitable, Callable
from functools import partial

import msgspec

from ds_cp.link.peer import SealedPeer, read_frame, watch_peer
from ds_cp.link.seal import MAX_UNPROVED, Claim, SealError, ServerProof, Verdict
from ds_cp.link.values import Reply, Request, Values

PROVE_S = 10.0  # seconds in which who has connected has to prove itself
MAX_UNKNOWN = 128  # connections that have not; one more drops the oldest
MAX_STORES = 64  # connections of one rank to the store; one more drops the oldest


class Door:
    """``sock``: listens already. ``mine``: what rank 0 claims to be, with which all others are
    compared. ``on_control`` is given every proved connection of another rank's supervisor, and
    returns when that has ended; without one there are none. ``expects`` says why a rank's
    supervisor is not let in, "" where it is. ``on_misfit`` is told of a process of this job that
    was refused, and why. Runs in one event loop.
    """

    def __init__(
        self, sock: socket.socket, secret: bytes, mine: Claim, unheard_s: float | None = None
    ) -> None:
        self.strangers = 0  # connections that were dropped
        self.values = Values()
        self.on_control: Callable[[Claim, SealedPeer], Awaitable[None]] | None = None
        self.expects: Callable[[int], str] = lambda rank: ""
        self.on_misfit: Callable[[Claim, str], None] = lambda claim, why: None
        self.on_stranger: Callable[[str, str], None] = lambda address, why: None
        self._sock = sock
        self._secret = secret
        self._mine = mine
        self._unheard_s = unheard_s
        self._server: asyncio.AbstractServer | None = None
        self._unknown: dict[asyncio.StreamWriter, None] = {}  # oldest first
        self._stores: dict[int, list[SealedPeer]] = {}  # by rank, oldest first

    async def open(self) -> None:
        """Let others in from now on; those that came before wait in the system."""
        self._server = await asyncio.start_server(
            self._attend, sock=self._sock, limit=4 * MAX_UNPROVED, backlog=1024
        )

    def close(self) -> None:
        """Let nobody in any more, and end the store."""
        if self._server is not None:
            self._server.close()
        for peers in self._stores.values():
            for peer in list(peers):
                peer.close()
        for writer in list(self._unknown):
            writer.close()

    async def _attend(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # At the end of the loop; Python 3.11 would log the cancellation of such a task.
        with contextlib.suppress(asyncio.CancelledError):
            self._unknown[writer] = None
            if len(self._unknown) > MAX_UNKNOWN:
                next(iter(self._unknown)).transport.abort()
            try:
                let_in = await self._prove(reader, writer)
            finally:
                self._unknown.pop(writer, None)
            if let_in is not None:
                await self._lead(*let_in)

    async def _prove(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> tuple[Claim, SealedPeer] | None:
        proof = ServerProof(self._secret)
        try:
            writer.write(proof.greeting)
            frame = await asyncio.wait_for(read_frame(reader, MAX_UNPROVED), PROVE_S)
            claim, known = proof.claim(frame)
        except (OSError, EOFError, asyncio.TimeoutError, SealError) as err:
            self._drop(writer, str(err) or "it proved nothing in time")
            return None
        why = self._why_not(claim) if known else "another secret"
        verdict, seal = proof.verdict(Verdict(why, self._mine.host, os.getpid(), not known))
        with contextlib.suppress(OSError, RuntimeError):
            writer.write(verdict)
        if not known:
            self._drop(writer, "it does not know the job's secret")
            return None
        if why:
            self.on_misfit(claim, why)
            writer.close()
            return None
        watch_peer(
            writer.get_extra_info("socket"),
            self._unheard_s if claim.purpose == "control" else None,
        )
        return claim, SealedPeer(reader, writer, seal)

    def _why_not(self, claim: Claim) -> str:
        """Why a process that knows the secret is not let in."""
        mine = self._mine
        if claim.version != mine.version:
            return (
                f"it runs ds_cp {claim.version[:40]}, and rank 0 ds_cp {mine.version}: "
                "install one version on all hosts"
            )
        if claim.size != mine.size or not 0 <= claim.rank < mine.size:
            return (
                f"it is rank {claim.rank} of {claim.size}, and the job has {mine.size} ranks: "
                "another job has this port; choose another one with MASTER_PORT or comm.port"
            )
        if claim.mark != mine.mark:
            return (
                f"rank {claim.rank} on {claim.host[:80]} was started with another config than "
                "rank 0: start every rank with the same file and options"
            )
        if claim.purpose == "control":
            return self.expects(claim.rank) if self.on_control else "rank 0 has no supervisor"
        return ""

    async def _lead(self, claim: Claim, peer: SealedPeer) -> None:
        if claim.purpose == "control":
            assert self.on_control is not None
            await self.on_control(claim, peer)
        else:
            await self._serve_store(claim.rank, peer)

    async def _serve_store(self, rank: int, peer: SealedPeer) -> None:
        peers = self._stores.setdefault(rank, [])
        peers.append(peer)
        if len(peers) > MAX_STORES:
            peers[0].abort()
        try:
            while (raw := await peer.receive()) is not None:
                try:
                    reply = await self.values.answer(msgspec.msgpack.decode(raw, type=Request))
                except msgspec.MsgspecError as err:
                    reply = Reply(error=str(err)[:200])
                peer.send(msgspec.msgpack.encode(reply))
        finally:
            peers.remove(peer)
            peer.close()

    def _drop(self, writer: asyncio.StreamWriter, why: str) -> None:
        self.strangers += 1
        address = writer.get_extra_info("peername")
        self.on_stranger(str(address[0]) if address else "an unknown address", why)
        writer.close()


class DoorThread:
    """A door with an event loop of its own, for a rank 0 without a supervisor."""

    def __init__(self, door: Door) -> None:
        self.misfit = ""  # why a process of this job was not let in
        self._door = door
        self._door.on_misfit = self._on_misfit
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closing = asyncio.Event()
        self._is_open = threading.Event()
        run = partial(asyncio.run, self._serve())
        threading.Thread(target=run, name="ds_cp store", daemon=True).start()
        self._is_open.wait()

    def _on_misfit(self, claim: Claim, why: str) -> None:
        self.misfit = f"rank {claim.rank} on {claim.host[:80]} cannot join: {why}"

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        try:
            await self._door.open()
        finally:
            self._is_open.set()
        await self._closing.wait()
        self._door.close()

    def close(self) -> None:
        """Let nobody in any more, and end the store."""
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # it is over
                self._loop.call_soon_threadsafe(self._closing.set)
