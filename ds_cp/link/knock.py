"""A process comes to the port of its job: it connects, proves itself, and has the other side prove
itself."""

from __future__ import annotations

import asyncio
import socket
import time
from dataclasses import dataclass, field

from ds_cp.errors import CommError, LaunchError
from ds_cp.link.peer import SealedPeer, read_frame, watch_peer
from ds_cp.link.seal import (
    HEAD,
    MAX_FRAME,
    MAX_UNPROVED,
    Claim,
    ClientProof,
    RefusedError,
    Seal,
    SealError,
    Verdict,
    size_of,
)

RETRY_S = 0.1  # seconds between tries to connect


@dataclass(frozen=True)
class Port:
    """Where a job meets: the address of rank 0's host, and the job's secret, empty for none.
    ``claim``: who this process is; ``timeout_s``: seconds that rank 0 may start later;
    ``unheard_s``: seconds without an answer of the other system after which a connection has
    ended, None for as long as the system thinks."""

    host: str
    port: int
    secret: bytes = field(repr=False)
    claim: Claim
    timeout_s: float
    unheard_s: float | None = None

    def __str__(self) -> str:
        return f"{self.host} port {self.port}"


class Knocked:
    """A connection to rank 0 that is let in. Raises ``OSError`` when it breaks, ``SealError`` for
    what was not sent by the other side."""

    def __init__(self, sock: socket.socket, seal: Seal, verdict: Verdict) -> None:
        self.sock = sock
        self.seal = seal
        self.host, self.pid = verdict.host, verdict.pid

    def ask(self, payload: bytes, timeout_s: float) -> bytes:
        """Send one message and wait for its answer. ``TimeoutError`` when that does not come."""
        self.sock.settimeout(timeout_s)
        self.sock.sendall(self.seal.close_over(payload))
        return self.seal.open(_frame(self.sock, MAX_FRAME))

    def close(self) -> None:
        """End the connection."""
        self.sock.close()


def knock(port: Port) -> Knocked:
    """Connect to rank 0, which may start later.

    Raises ``CommError`` when nobody listens there in time; ``LaunchError`` when what listens is
    not rank 0 of this job, or does not let this process in: another secret, another config.
    """
    end = time.monotonic() + port.timeout_s
    last: Exception = TimeoutError("it is not there")
    while True:
        try:
            return _try(port, max(0.05, end - time.monotonic()))
        except (RefusedError, SealError) as err:
            raise _not_let_in(port, err) from None
        except OSError as err:
            last = err
        if time.monotonic() + RETRY_S >= end:
            raise _not_reached(port, last) from last
        time.sleep(RETRY_S)


async def knock_async(port: Port) -> tuple[SealedPeer, Verdict]:
    """As ``knock``, in an event loop."""
    end = time.monotonic() + port.timeout_s
    last: Exception = TimeoutError("it is not there")
    while True:
        try:
            return await asyncio.wait_for(_try_async(port), max(0.05, end - time.monotonic()))
        except (RefusedError, SealError) as err:
            raise _not_let_in(port, err) from None
        except (OSError, EOFError, asyncio.TimeoutError) as err:
            last = err
        if time.monotonic() + RETRY_S >= end:
            raise _not_reached(port, last) from last
        await asyncio.sleep(RETRY_S)


async def _try_async(port: Port) -> tuple[SealedPeer, Verdict]:
    reader, writer = await asyncio.open_connection(port.host, port.port, limit=4 * MAX_UNPROVED)
    try:
        watch_peer(writer.get_extra_info("socket"), port.unheard_s)
        proof = ClientProof(port.secret, port.claim)
        writer.write(proof.answer(await read_frame(reader, MAX_UNPROVED)))
        verdict, seal = proof.verdict(await read_frame(reader, MAX_UNPROVED))
        return SealedPeer(reader, writer, seal), verdict
    except BaseException:
        writer.transport.abort()
        raise


def _try(port: Port, timeout_s: float) -> Knocked:
    sock = socket.create_connection((port.host, port.port), timeout_s)
    try:
        watch_peer(sock, port.unheard_s)
        proof = ClientProof(port.secret, port.claim)
        sock.sendall(proof.answer(_frame(sock, MAX_UNPROVED)))
        verdict, seal = proof.verdict(_frame(sock, MAX_UNPROVED))
        sock.settimeout(None)
        return Knocked(sock, seal, verdict)
    except BaseException:
        sock.close()
        raise


def _frame(sock: socket.socket, limit: int) -> bytes:
    return _exactly(sock, size_of(_exactly(sock, HEAD), limit))


def _exactly(sock: socket.socket, size: int) -> bytes:
    found = bytearray()
    while len(found) < size:
        chunk = sock.recv(size - len(found))
        if not chunk:
            raise ConnectionResetError("the other side has closed the connection")
        found += chunk
    return bytes(found)


def _not_reached(port: Port, last: Exception) -> CommError:
    why = getattr(last, "strerror", None) or str(last) or type(last).__name__
    return CommError(
        f"rank {port.claim.rank} did not reach rank 0 on {port} within {port.timeout_s:g} s: {why}"
    )


def _not_let_in(port: Port, err: RefusedError | SealError) -> LaunchError:
    if isinstance(err, SealError):
        return LaunchError(
            f"what listens on {port} is not rank 0 of this job: {err}. Another program has the "
            "port, or ranks run other versions of ds_cp: choose another port with MASTER_PORT or "
            "comm.port, and install one version on all hosts"
        )
    if not err.secret:
        return LaunchError(f"rank 0 on {port} does not take rank {port.claim.rank}: {err}")
    mine = "a secret" if port.secret else "none"
    return LaunchError(
        f"what listens on {port} does not share the job's secret with rank {port.claim.rank} "
        f"(which has {mine}): give every rank the same DS_CP_JOB_SECRET or comm.secret_file; if "
        "another job has this port, choose another one with MASTER_PORT or comm.port"
    )
