"""The store of a job on several hosts, as torch wants it: a client of rank 0's port, which lets in
only who knows the job's secret. torch's own store lets in everybody who reaches it."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta

import msgspec

from ds_cp.comm.process_group import TorchStore
from ds_cp.errors import DsCpError
from ds_cp.link.door import Door, DoorThread
from ds_cp.link.knock import Port, knock
from ds_cp.link.values import Operation, Reply, Request
from ds_cp.topology.net import listening_address

ANSWER_S = 30.0  # seconds for rank 0 to answer what needs no waiting
WAIT_S = 0.5  # seconds that one request waits there, so that threads share the connection
PAUSE_S = 0.001  # seconds between such requests, for the others to get their turn


class JobStore(TorchStore):
    """Every method may be called from any thread. They raise ``RuntimeError``, as torch's do, when
    rank 0 is gone or a key does not come in time. ``door``: that this process keeps. Raises as
    ``knock``."""

    def __init__(self, port: Port, timeout_s: float, door: DoorThread | None = None) -> None:
        super().__init__()
        self.given_up: Callable[[], bool] = lambda: False  # whether who waits is to wait no more
        self._door = door
        self._port = port
        self._timeout_s = timeout_s
        self._knocked = knock(port)
        self._lock = threading.Lock()

    @property
    def port(self) -> int:
        """At which it is reached."""
        return self._port.port

    @property
    def misfit(self) -> str:
        """Why a process of this job could not join, where this process lets them in; or ""."""
        return "" if self._door is None else self._door.misfit

    def close(self) -> None:
        """End the connection, and the store where this process keeps it."""
        self._knocked.close()
        if self._door is not None:
            self._door.close()

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError):  # it was never there
            self.close()

    def clone(self) -> JobStore:
        """Another connection to the same store."""
        return JobStore(self._port, self._timeout_s)

    def set(self, key: str, value: bytes | str) -> None:
        """Set a key."""
        self._do("set", [key], [_raw(value)])

    def multi_set(self, keys: list[str], values: list[bytes | str]) -> None:
        """Set several keys."""
        self._do("set", keys, [_raw(value) for value in values])

    def append(self, key: str, value: bytes | str) -> None:
        """Append to the value of a key."""
        self._do("append", [key], [_raw(value)])

    def get(self, key: str) -> bytes:
        """The value of a key, once it is there."""
        return self.multi_get([key])[0]

    def multi_get(self, keys: list[str]) -> list[bytes]:
        """The values of several keys, once they are all there."""
        return self._until("get", keys, self._timeout_s)

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        """Wait until all keys are there."""
        limit = self._timeout_s
        self._until("wait", keys, min(limit, timeout.total_seconds()) if timeout else limit)

    def check(self, keys: list[str]) -> bool:
        """Whether all keys are there."""
        return self._do("check", keys).done

    def add(self, key: str, value: int) -> int:
        """Add to the number of a key, 0 at first."""
        return self._do("add", [key], amount=value).number

    def compare_set(self, key: str, expected_value: bytes | str, value: bytes | str) -> bytes:
        """Set a key where its value is the expected one; the value that it has then."""
        return self._do("compare_set", [key], [_raw(expected_value), _raw(value)]).values[0]

    def delete_key(self, key: str) -> bool:
        """Forget a key. Whether it was there."""
        return self._do("delete", [key]).number > 0

    def forget(self, prefix: str) -> int:
        """Forget all keys that begin so; how many there were."""
        return self._do("forget", [prefix]).number

    def num_keys(self) -> int:
        """How many keys there are."""
        return self._do("count", []).number

    def has_extended_api(self) -> bool:
        """Whether there are ``append``, ``multi_get``, ``multi_set``."""
        return True

    def _until(self, operation: Operation, keys: list[str], seconds: float) -> list[bytes]:
        end = time.monotonic() + seconds
        while True:
            left = max(0.0, min(WAIT_S, end - time.monotonic()))
            reply = self._do(operation, keys, wait_s=left)
            if reply.done:
                return reply.values
            if self.given_up():
                raise RuntimeError(f"{keys[0][:120]} is not waited for any more")
            if time.monotonic() >= end:
                raise RuntimeError(f"{keys[0][:120]} did not come within {seconds:g} s")
            time.sleep(PAUSE_S)

    def _do(
        self, operation: Operation, keys: list[str], values: list[bytes] | None = None,
        amount: int = 0, wait_s: float = 0.0,
    ) -> Reply:  # fmt: skip
        raw = msgspec.msgpack.encode(Request(operation, keys, values or [], amount, wait_s))
        try:
            with self._lock:
                answer = self._knocked.ask(raw, ANSWER_S + wait_s)
            reply = msgspec.msgpack.decode(answer, type=Reply)
        except (OSError, ValueError, DsCpError) as err:
            self._knocked.close()  # half an answer may be under way
            raise RuntimeError(
                f"the job's store, on {self._port}, which rank 0 keeps, is gone: {err}"
            ) from err
        if reply.error:
            raise RuntimeError(f"the job's store: {reply.error}")
        return reply


def open_job_store(
    port: Port, listen_fd: int | None, timeout_s: float, arrive_s: float
) -> JobStore:
    """The store, kept by rank 0's supervisor, or in a thread of this process where that has the
    listening socket. ``timeout_s``: for a key to come; ``arrive_s``: for rank 0. Raises as
    ``knock``."""
    door = None
    if listen_fd is not None:
        # Rank 0 reaches itself where it listens: its own name may lead elsewhere here.
        host, number = listening_address(listen_fd)
        port = replace(port, host=host, port=number)
        sock = socket.socket(fileno=os.dup(listen_fd))
        door = DoorThread(Door(sock, port.secret, port.claim))
    return JobStore(replace(port, timeout_s=arrive_s), timeout_s, door)


def _raw(value: bytes | str) -> bytes:
    return value.encode() if isinstance(value, str) else bytes(value)
