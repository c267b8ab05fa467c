"""The content of a rank's host slots: blocks that the device gave away, and gets back. Callers name
the slots; a store does not know what they hold."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from ds_cp.kv.pool import KVPool
from ds_cp.log_stream import say
from ds_cp.native.memory import huge_pages

NAME = "ds_cp_kv"  # of the memory, in /proc/PID/maps


class HostStore(Protocol):
    """Slots of one block's bytes each. Content is that of whole blocks in all layers."""

    @property
    def num_slots(self) -> int:
        """Blocks that it holds."""
        ...

    @property
    def num_failed(self) -> int:
        """Copies of a block that failed, so that its content is lost."""
        ...

    def save(self, blocks: Sequence[int], slots: Sequence[int]) -> None:
        """Copy blocks of the pool into slots, before anything that is asked of the device later."""
        ...

    def load(self, slots: Sequence[int], blocks: Sequence[int], later: bool = False) -> None:
        """Copy slots into blocks of the pool. ``later``: nothing reads or writes these blocks
        before the next ``settle``, so that the copy may go on beside what the device computes."""
        ...

    def read(self, slots: Sequence[int]) -> torch.Tensor:
        """A copy of slots on the pool's device, ``[slots, block_elements]``, for another rank."""
        ...

    def settle(self) -> None:
        """What the device does from now on sees all loads."""
        ...

    def close(self) -> None:
        """Give the memory back."""
        ...


class FileStore:
    """Slots in a file without a name, for a pool in CPU memory: in the memory of this process's
    user (memfd), or on the disk of ``folder``. Nobody else can open it, and it is gone with the
    process. On a disk all of it is allocated at once, so that a full one is known at start; memory
    is taken as slots are first written.

    ``later``: the file is made when it is first used, by whatever process has been forked by then,
    which shares none with the others. Raises ``OSError`` when there is no such room. A disk that
    fails later says so once, and costs the requests that want what it lost, not the job: their
    blocks are filled with NaN, which ends them with an error and takes the blocks out of the prefix
    cache, as any logits do that are not finite. What comes back from a disk other than it went
    there is lost too: a sum is kept of each slot there. In memory there is none, as there is none
    of the pool.
    """

    def __init__(
        self, pool: KVPool, num_slots: int, folder: str | None = None, later: bool = False
    ) -> None:
        self.num_slots = num_slots
        self._folder = folder
        self._pool = pool
        self._nbytes = pool.block_elements * pool.dtype.itemsize
        self._lost: set[int] = set()  # slots whose last write failed
        self._sums: dict[int, int] | None = None if folder is None else {}  # of slots on a disk
        self.num_failed = 0
        self._fd = -1
        if not later:
            self._open()

    def _open(self) -> None:
        self._fd = _unnamed_file(self._folder)
        try:
            size = self.num_slots * self._nbytes
            if self._folder is not None and size:
                os.posix_fallocate(self._fd, 0, size)
        except BaseException:
            self.close()
            raise

    def save(self, blocks: Sequence[int], slots: Sequence[int]) -> None:
        """As ``HostStore``."""
        for block, slot in zip(blocks, slots, strict=True):
            row = self._pool.block(block)
            if self._whole(os.pwrite, _bytes(row), slot):
                self._lost.discard(slot)
                if self._sums is not None:
                    self._sums[slot] = _sum(row)
            else:
                self._lost.add(slot)

    def load(self, slots: Sequence[int], blocks: Sequence[int], later: bool = False) -> None:
        """As ``HostStore``; done when it returns."""
        for slot, block in zip(slots, blocks, strict=True):
            self._fill(self._pool.block(block), slot)

    def read(self, slots: Sequence[int]) -> torch.Tensor:
        """As ``HostStore``."""
        found = torch.empty(len(slots), self._pool.block_elements, dtype=self._pool.dtype)
        for row, slot in zip(found, slots, strict=True):
            self._fill(row, slot)
        return found

    def _fill(self, row: torch.Tensor, slot: int) -> None:
        """``row`` becomes what the slot holds, NaN where that is lost."""
        if slot in self._lost or not self._whole(_pread, _bytes(row), slot):
            row.fill_(float("nan"))
        elif self._sums is not None and self._sums.get(slot) != _sum(row):
            self._failed(slot, "it is not what was written there")
            row.fill_(float("nan"))

    def settle(self) -> None:
        """Every load is done."""

    def close(self) -> None:
        """Close the file, which ends it."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _whole(self, move: _Move, view: memoryview, slot: int) -> bool:
        """Move all bytes of ``view``, of which the system may do fewer at once; whether it did."""
        done = 0
        try:
            if self._fd < 0:
                self._open()
            while done < self._nbytes:
                count = move(self._fd, view[done:], slot * self._nbytes + done)
                if not count:
                    raise OSError(f"the file ends before slot {slot} does")
                done += count
        except OSError as err:
            self._failed(slot, str(err))
            return False
        return True

    def _failed(self, slot: int, why: str) -> None:
        self.num_failed += 1
        if self.num_failed == 1:
            say(
                f"warning: host memory cannot move block {slot} of {self.num_slots} "
                f"({self._nbytes} bytes): {why}; requests whose beginning it has lost end with an "
                "error, and it is used no more; set another kv_cache.host_folder and start again"
            )


class _Move(Protocol):
    """``os.pwrite``, or the same that reads."""

    def __call__(self, fd: int, view: memoryview, offset: int, /) -> int: ...


def _pread(fd: int, view: memoryview, offset: int) -> int:
    return os.preadv(fd, [view], offset)


def _bytes(row: torch.Tensor) -> memoryview:
    """The memory of one contiguous row."""
    return row.view(torch.uint8).numpy().data


def _sum(row: torch.Tensor) -> int:
    """The sum of a row's words of 8 bytes, modulo 2^64: another one for any word that differs, and
    most likely for several."""
    content = row.view(torch.uint8)
    whole = content.numel() // 8 * 8
    words = content[:whole].view(torch.int64).sum() if whole else torch.zeros((), dtype=torch.int64)
    return int(words + content[whole:].sum(dtype=torch.int64))


def _unnamed_file(folder: str | None) -> int:
    """A file that no folder lists. Its descriptor is not inherited."""
    if folder is None and hasattr(os, "memfd_create"):
        return os.memfd_create(NAME, os.MFD_CLOEXEC)
    with tempfile.TemporaryFile(dir=folder, prefix=NAME) as file:
        return os.dup(file.fileno())


class PinnedStore:
    """Slots in page-locked memory, for a pool on a CUDA device. Copies go on a stream of their own,
    in the order in which they are asked for, after what the device was given before them. The
    device waits for none that it saves, since it gathers the blocks first, and for a load unless
    that may be ``later``.

    Raises ``OSError`` or ``RuntimeError`` when there is no such room, or it cannot be locked.
    """

    def __init__(self, pool: KVPool, num_slots: int) -> None:
        self.num_slots = num_slots
        self.num_failed = 0
        self._pool = pool
        # Exactly as large as it has to be: torch's own allocator of such memory rounds up to the
        # next power of two.
        nbytes = num_slots * pool.block_elements * pool.dtype.itemsize
        memory = torch.frombuffer(huge_pages(nbytes), dtype=pool.dtype)
        self._cuda: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        failed = int(self._cuda.cudaHostRegister(memory.data_ptr(), nbytes, 0))
        if failed:
            raise MemoryError(f"{nbytes} bytes of host memory cannot be page-locked ({failed})")
        self._data = memory.view(num_slots, pool.block_elements)
        self._stream = torch.cuda.Stream(pool.device)  # type: ignore[no-untyped-call]
        self._is_loading = False  # copies to the device for which its own stream has not waited

    def save(self, blocks: Sequence[int], slots: Sequence[int]) -> None:
        """As ``HostStore``."""
        content = self._pool.get_blocks(blocks)
        self._begin()
        with torch.cuda.stream(self._stream):
            for row, slot in zip(content, slots, strict=True):
                self._data[slot].copy_(row, non_blocking=True)
        content.record_stream(self._stream)

    def load(self, slots: Sequence[int], blocks: Sequence[int], later: bool = False) -> None:
        """As ``HostStore``."""
        self._begin()
        with torch.cuda.stream(self._stream):
            for slot, block in zip(slots, blocks, strict=True):
                self._pool.block(block).copy_(self._data[slot], non_blocking=True)
        self._is_loading = True
        if not later:
            self.settle()

    def read(self, slots: Sequence[int]) -> torch.Tensor:
        """As ``HostStore``."""
        found = torch.empty(
            len(slots), self._pool.block_elements, dtype=self._pool.dtype, device=self._pool.device
        )
        self._begin()
        with torch.cuda.stream(self._stream):
            for row, slot in zip(found, slots, strict=True):
                row.copy_(self._data[slot], non_blocking=True)
        self._is_loading = True
        self.settle()
        return found

    def settle(self) -> None:
        """As ``HostStore``."""
        if self._is_loading:
            torch.cuda.current_stream(self._pool.device).wait_stream(self._stream)
            self._is_loading = False

    def close(self) -> None:
        """Unlock the memory once copies are done."""
        if len(self._data):
            self._stream.synchronize()
            self._cuda.cudaHostUnregister(self._data.data_ptr())
            self._data = self._data.new_empty(0, self._pool.block_elements)

    def _begin(self) -> None:
        self._stream.wait_stream(torch.cuda.current_stream(self._pool.device))


def open_store(pool: KVPool, num_slots: int, folder: str | None, later: bool = False) -> HostStore:
    """The store for a pool's device. Raises ``OSError`` or ``RuntimeError`` when its memory cannot
    be had."""
    if pool.device.type == "cuda":
        return PinnedStore(pool, num_slots)
    return FileStore(pool, num_slots, folder, later)
