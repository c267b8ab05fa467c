"""Between a supervisor and its worker: typed frames over a local socket, never pickled."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from typing import Any

import msgspec

from ds_cp.errors import EngineDeadError
from ds_cp.facts import Facts
from ds_cp.plan import MAX_PLAN_BYTES, Outcome, Plan, encode_plan
from ds_cp.topology.job import Job

GENERATION_BYTES = 4  # before a plan
LIMIT = MAX_PLAN_BYTES + GENERATION_BYTES  # bytes of the largest frame


class WorkerSpec(msgspec.Struct, frozen=True):
    """The first message to a worker. ``job``: the fields of ``Job`` without its socket;
    ``listen_fd``: the inherited descriptor of rank 0's store socket, or -1; ``folder``: for the
    worker's temporary files, removed by the supervisor however the worker ends; ``orders_fd``: the
    inherited socket for orders (``serve.orders``), or -1 where the loss of a peer ends the worker;
    ``waits``: a ``Take`` comes when it is to take the place of one that has died; ``forks_fd``: the
    inherited socket of the fork server that it is to leave behind, or -1."""

    config: dict[str, Any]
    job: dict[str, Any]
    listen_fd: int
    supervisor_pid: int
    folder: str
    orders_fd: int = -1
    waits: bool = False
    forks_fd: int = -1


class Take(msgspec.Struct, frozen=True):
    """The worker is to take the place of one that has died. ``facts``: of the start."""

    facts: Facts


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """The worker can run plans."""

    facts: Facts
    summary: tuple[str, ...]


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """The worker ends with an error; ``exit_code`` is what the command line returns.
    ``cause_known``: it is more than the loss of a peer."""

    exit_code: int
    message: str
    cause_known: bool = True

    def named(self, job: Job) -> str:
        """The message, with the rank."""
        if self.message.startswith("rank "):
            return self.message
        return f"rank {job.rank} on {job.host}: {self.message}"


class Result(msgspec.Struct, frozen=True, tag="result"):
    """The outcome of one plan, and what this rank has sent so far: (bytes, exchanges) by scheme."""

    outcome: Outcome
    sent: dict[str, tuple[int, int]]


class Interrupted(msgspec.Struct, frozen=True, tag="interrupted"):
    """Rank 0's worker has left the groups of this generation; of its plans, those without a result
    will have none."""

    generation: int
    cause: str


class Resumed(msgspec.Struct, frozen=True, tag="resumed"):
    """All ranks have met in this generation, but for those that are ``away``. ``born``: of each,
    the first generation of its process, before which it held no KV."""

    generation: int
    born: tuple[int, ...]
    away: tuple[int, ...] = ()

    def lost_since(self, generation: int) -> list[int]:
        """Ranks that hold nothing of what they held in an earlier generation."""
        return [rank for rank, born in enumerate(self.born) if born > generation]


FromWorker = Ready | Failed | Result | Interrupted | Resumed


@dataclass(frozen=True)
class Channel:
    """One end of the socket."""

    sock: socket.socket

    def send(self, message: msgspec.Struct) -> None:
        """Send one message. Raises ``EngineDeadError`` when the other process has ended."""
        self._send_raw(msgspec.msgpack.encode(message))

    def _send_raw(self, raw: bytes) -> None:
        try:
            self.sock.sendall(len(raw).to_bytes(4, "little") + raw)
        except OSError as err:
            raise EngineDeadError(
                f"the process on the other side is gone ({err.strerror})"
            ) from err

    def send_plan(self, plan: Plan, generation: int) -> None:
        """Send a plan for the ranks as they met in ``generation``. Raises as ``send``."""
        self._send_raw(generation.to_bytes(GENERATION_BYTES, "little") + encode_plan(plan))

    def receive_plan(self) -> tuple[bytes, int]:
        """The next plan as it was encoded, and its generation. Raises as ``receive``."""
        raw = self.receive_bytes()
        return raw[GENERATION_BYTES:], int.from_bytes(raw[:GENERATION_BYTES], "little")

    def receive(self, kind: Any) -> Any:
        """The next message, decoded as ``kind``. Raises ``EngineDeadError`` when the other process
        has ended, or the frame is longer than ``LIMIT`` or no such message."""
        raw = self.receive_bytes()
        try:
            return msgspec.msgpack.decode(raw, type=kind)
        except msgspec.MsgspecError as err:
            raise EngineDeadError(f"the process on the other side makes no sense ({err})") from err

    def receive_bytes(self) -> bytes:
        """The next message as it was sent, to be decoded elsewhere. ``EngineDeadError`` as in
        ``receive``."""
        size = int.from_bytes(self._exactly(4), "little")
        if size > LIMIT:
            raise EngineDeadError(f"a frame of {size} bytes is above the limit {LIMIT}")
        return self._exactly(size)

    def _exactly(self, size: int) -> bytes:
        parts = bytearray()
        while len(parts) < size:
            try:
                chunk = self.sock.recv(min(size - len(parts), 1 << 20))
            except OSError as err:
                raise EngineDeadError(f"the process on the other side is gone ({err})") from err
            if not chunk:
                raise EngineDeadError("the process on the other side has ended")
            parts += chunk
        return bytes(parts)
