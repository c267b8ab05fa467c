"""Python's side of ``native/src/shared_memory.cpp``: one group's channel on one host."""

from __future__ import annotations

import ctypes
import struct
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from typing import Any

import torch

from ds_cp.native import Library

TOKEN = 16  # bytes by which those who open a channel know that it is theirs
MAX_MEMBERS = 64
DONE, SILENT, GONE, CLOSED, DIFFERENT, BROKEN, INTERRUPTED, SHUT = range(8)


@lru_cache
def _packer(messages: int) -> struct.Struct:
    """Of each message: peer, whether it is sent, address, bytes."""
    return struct.Struct("=" + messages * "qqQQ")


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
    free: Any


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
        get("ds_cp_shm_post", [pointer, i64, c.c_char_p, i64], i64),
        get("ds_cp_shm_wait", [pointer, i64, i64], i32),
        get("ds_cp_shm_pump", [pointer], i64),
        get("ds_cp_shm_lost", [pointer, pointer], i32),
        get("ds_cp_shm_culprit", [pointer, pointer, pointer], i32),
        get("ds_cp_shm_close", [pointer]),
        get("ds_cp_shm_free", [pointer]),
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


@dataclass(frozen=True, eq=False)
class Messages:
    """What one exchange moves, as the native code takes it; the tensors that it moves."""

    packed: bytes
    count: int
    tensors: object

    @classmethod
    def of(
        cls, sends: Sequence[tuple[int, torch.Tensor]], recvs: Sequence[tuple[int, torch.Tensor]]
    ) -> Messages:
        """``sends`` and ``recvs``: pairs of (member, contiguous CPU tensor)."""
        fields: list[int] = []
        for peer, t in recvs:
            fields += (peer, 0, t.data_ptr(), t.nbytes)
        for peer, t in sends:
            fields += (peer, 1, t.data_ptr(), t.nbytes)
        count = len(fields) // 4
        return cls(_packer(count).pack(*fields), count, (sends, recvs))


class Channel:
    """A seat in a channel.

    ``fd``: the channel's memory, of ``shape.nbytes``, which is mapped and need not stay open;
    ``me``: this member's index; ``pidfds``: of every member's process, -1 for me; ``look_s``: the
    most that a wait looks before it sleeps; ``make``: this seat is the first, and makes the channel
    of zeroed memory. Raises ``ValueError`` when the memory is not this channel or cannot be mapped.
    """

    def __init__(
        self, library: Library, fd: int, shape: Shape, me: int, token: bytes,
        pidfds: Sequence[int], look_s: float, make: bool,
    ) -> None:  # fmt: skip
        if len(token) != TOKEN or len(pidfds) != shape.members:
            raise ValueError("a channel's token has 16 bytes, and each member a pidfd")
        self._calls = _calls(library)
        self.ring_bytes = shape.ring_bytes
        nbytes = shape.nbytes(library)
        memory: int | None = self._calls.map(fd, nbytes)
        if memory is None:
            raise ValueError(f"{nbytes} bytes cannot be mapped")
        if make:
            self._calls.format(memory, shape.members, shape.ring_bytes, token)
        lives = (ctypes.c_int * len(pidfds))(*pidfds)
        self._handle: int | None = self._calls.open(
            memory, shape.members, me, shape.ring_bytes, token, lives, round(look_s * 1e9)
        )
        if self._handle is None:
            self._calls.unmap(memory, nbytes)
            raise ValueError("the memory is not the channel that was asked for")
        # When no call can be under way: each of them refers to this object.
        weakref.finalize(self, self._calls.free, self._handle).atexit = False
        self._numbers = count(1)  # of exchanges
        self._kept: dict[int, object] = {}  # tensors of exchanges that are not through

    def post(
        self, sends: Sequence[tuple[int, torch.Tensor]], recvs: Sequence[tuple[int, torch.Tensor]]
    ) -> int:
        """``start`` of messages that are packed now."""
        return self.start(Messages.of(sends, recvs))

    def start(self, messages: Messages) -> int:
        """Start an exchange. Returns its number, to ``wait`` for, or 0 when it is through already.
        Raises ``ChannelError``.

        The tensors are kept until the exchange is through, or, after an error, the channel closed.
        After an error here nothing is moved any more.
        """
        number = next(self._numbers)
        self._kept[number] = messages  # before: a signal's handler may raise after the call
        left: int = self._calls.post(self._handle, number, messages.packed, messages.count)
        if left < 0:
            raise self._error(-left)
        if not left:
            self._kept.pop(number, None)
        return left

    def wait(self, number: int, limit_s: float) -> bool:
        """Wait for an exchange; False when a signal may have come first, at least every 50 ms: wait
        again, for what is left. Raises ``ChannelError``."""
        reason = self._calls.wait(self._handle, number, int(limit_s * 1e9))
        if reason == DONE:
            self._kept.pop(number, None)
            return True
        if reason == INTERRUPTED:
            return False
        raise self._error(reason)

    def pump(self) -> int:
        """Move what can be moved; the messages that still wait to be sent. Raises
        ``ChannelError``."""
        left: int = self._calls.pump(self._handle)
        if left < 0:
            raise self._error(-left)
        return left

    def lost(self) -> int | None:
        """A member whose process has ended or that has closed the channel, else None. Raises
        ``ChannelError`` when this one has."""
        who = ctypes.c_int(-1)
        found: int = self._calls.lost(self._handle, ctypes.byref(who))
        if found < 0:
            raise self._error(-found)
        return who.value if found else None

    def close(self) -> None:
        """Leave the channel: every member that waits for this one wakes. May be called twice, and
        while another thread is in a call, which then raises ``ChannelError`` as all later ones."""
        self._calls.close(self._handle)
        self._kept.clear()

    def _error(self, reason: int) -> ChannelError:
        if reason == SHUT:
            return ChannelError(SHUT, -1)
        expected, found = ctypes.c_uint64(), ctypes.c_uint64()
        peer = self._calls.culprit(self._handle, ctypes.byref(expected), ctypes.byref(found))
        return ChannelError(reason, peer, expected.value, found.value)
