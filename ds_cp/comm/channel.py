"""Python's side of ``native/src/shared_memory.cpp``: one group's channel on one host."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ds_cp.native import Library

TOKEN = 16  # bytes by which those who open a channel know that it is theirs
MAX_MEMBERS = 64
DONE, SILENT, GONE, CLOSED, DIFFERENT, BROKEN, INTERRUPTED, SHUT = range(8)
_MESSAGE = struct.Struct("=qqQQ")  # peer, whether it is sent, address, bytes


class ChannelError(Exception):
    """Why an exchange did not end. ``reason``: one of the numbers above; ``peer``: the member."""

    def __init__(self, reason: int, peer: int, expected: int = 0, found: int = 0) -> None:
        self.reason = reason
        self.peer = peer
        self.expected = expected
        self.found = found
        super().__init__(f"reason {reason}, member {peer}")


@dataclass(frozen=True)
class _Calls:
    """The functions of the native library, as it exports them."""

    size: Any
    map: Any
    unmap: Any
    format: Any
    open: Any
    post: Any
    wait: Any
    pump: Any
    lost: Any
    culprit: Any
    close: Any


def _calls(library: Library) -> _Calls:
    c = ctypes
    pointer, i32, i64, u64 = c.c_void_p, c.c_int, c.c_int64, c.c_uint64
    get = library.function
    return _Calls(
        get("ds_cp_shm_bytes", [i32, u64], u64),
        get("ds_cp_shm_map", [i32, u64], pointer),
        get("ds_cp_shm_unmap", [pointer, u64]),
        get("ds_cp_shm_format", [pointer, i32, u64, c.c_char_p]),
        get("ds_cp_shm_open", [pointer, i32, i32, u64, c.c_char_p, pointer, i64], pointer),
        get("ds_cp_shm_post", [pointer, c.c_char_p, i64], i64),
        get("ds_cp_shm_wait", [pointer, i64, i64], i32),
        get("ds_cp_shm_pump", [pointer], i64),
        get("ds_cp_shm_lost", [pointer, pointer], i32),
        get("ds_cp_shm_culprit", [pointer, pointer, pointer], i32),
        get("ds_cp_shm_close", [pointer]),
    )


@dataclass(frozen=True)
class Shape:
    """A channel of ``members`` (2 to 64), with ``ring_bytes`` (whole pages) from each to each."""

    members: int
    ring_bytes: int

    def nbytes(self, library: Library) -> int:
        """Bytes of its memory; they are claimed as they are touched. ``ValueError`` when there is
        no such channel."""
        size = int(_calls(library).size(self.members, self.ring_bytes))
        if not size:
            raise ValueError(f"no channel of {self.members} members and {self.ring_bytes} bytes")
        return size


class Channel:
    """A seat in a channel.

    ``fd``: the channel's memory, of ``shape.nbytes``, which is mapped and need not stay open;
    ``me``: this member's index; ``pidfds``: of every member's process, -1 for me; ``spin_s``: how
    long a wait looks before it sleeps; ``make``: this seat is the first, and makes the channel of
    zeroed memory. Raises ``ValueError`` when the memory is not this channel or cannot be mapped.
    """

    def __init__(
        self, library: Library, fd: int, shape: Shape, me: int, token: bytes,
        pidfds: Sequence[int], spin_s: float, make: bool,
    ) -> None:  # fmt: skip
        if len(token) != TOKEN or len(pidfds) != shape.members:
            raise ValueError("a channel's token has 16 bytes, and each member a pidfd")
        self._calls = _calls(library)
        self._nbytes = shape.nbytes(library)
        self._memory: int | None = self._calls.map(fd, self._nbytes)
        if self._memory is None:
            raise ValueError(f"{self._nbytes} bytes cannot be mapped")
        if make:
            self._calls.format(self._memory, shape.members, shape.ring_bytes, token)
        lives = (ctypes.c_int * len(pidfds))(*pidfds)
        self._handle: int | None = self._calls.open(
            self._memory, shape.members, me, shape.ring_bytes, token, lives, round(spin_s * 1e9)
        )
        if self._handle is None:
            self._unmap()
            raise ValueError("the memory is not the channel that was asked for")
        self._kept: dict[int, object] = {}  # tensors of exchanges that are not through
        self._failed: list[object] = []  # of those that failed as they were posted

    def post(
        self, sends: Sequence[tuple[int, torch.Tensor]], recvs: Sequence[tuple[int, torch.Tensor]]
    ) -> int:
        """Start an exchange of (member, contiguous CPU tensor) pairs. Returns its number, to
        ``wait`` for, or 0 when it is through already. Raises ``ChannelError``.

        The tensors are kept until the exchange is through, or, after an error, the channel closed:
        until then other calls may go on to read and write them.
        """
        packed = [_MESSAGE.pack(peer, 0, t.data_ptr(), t.nbytes) for peer, t in recvs]
        packed += [_MESSAGE.pack(peer, 1, t.data_ptr(), t.nbytes) for peer, t in sends]
        number: int = self._calls.post(self._open(), b"".join(packed), len(packed))
        if number < 0:
            self._failed.append((sends, recvs))
            raise self._error(-number)
        if number:
            self._kept[number] = (sends, recvs)
        return number

    def wait(self, number: int, limit_s: float) -> bool:
        """Wait for an exchange; False when a signal came first. Raises ``ChannelError``."""
        reason = self._calls.wait(self._open(), number, round(limit_s * 1e9))
        if reason == DONE:
            del self._kept[number]
            return True
        if reason == INTERRUPTED:
            return False
        raise self._error(reason)

    def pump(self) -> int:
        """Move what can be moved; the messages that still wait to be sent. Raises
        ``ChannelError``."""
        left: int = self._calls.pump(self._open())
        if left < 0:
            raise self._error(-left)
        return left

    def lost(self) -> int | None:
        """A member whose process has ended or that has closed the channel, else None."""
        who = ctypes.c_int(-1)
        return who.value if self._calls.lost(self._open(), ctypes.byref(who)) else None

    def close(self) -> None:
        """Leave the channel: every member that waits for this one wakes. May be called twice, and
        while another thread waits, which then raises ``ChannelError``."""
        handle, self._handle = self._handle, None
        if handle is None:
            return
        self._calls.close(handle)
        self._kept.clear()
        self._failed.clear()
        self._unmap()

    def _open(self) -> int:
        if self._handle is None:
            raise ChannelError(SHUT, -1)
        return self._handle

    def _error(self, reason: int) -> ChannelError:
        if self._handle is None:
            return ChannelError(SHUT, -1)
        expected, found = ctypes.c_uint64(), ctypes.c_uint64()
        peer = self._calls.culprit(self._handle, ctypes.byref(expected), ctypes.byref(found))
        return ChannelError(reason, peer, expected.value, found.value)

    def _unmap(self) -> None:
        memory, self._memory = self._memory, None
        if memory is not None:
            self._calls.unmap(memory, self._nbytes)
