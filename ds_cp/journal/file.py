"""The file of a journal that is written: frames at its end, rewritten without what is dropped when
that is most of it."""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from ds_cp.journal.format import Header, Kind, Op, decode_header, encode_frame, encode_header
from ds_cp.journal.place import FRESH, NAME, Place
from ds_cp.journal.replay import Entry, Replay, frames, replay

LOOSE_BYTES = 8 << 20  # bytes of dropped operations that are never worth a rewrite
_FRAME_BYTES = 256 << 10  # bytes of operations in a frame of a rewritten file, about


class Change(NamedTuple):
    """An operation that is to be written. ``data``: what it holds, or what makes it, called by the
    writer's thread; ``size``: its bytes, about, where it is not made yet."""

    kind: Kind
    key: str
    data: bytes | Callable[[], bytes] = b""
    size: int = 0


class JournalFile:
    """The one writer of a file. Its methods raise ``OSError``; after one of ``append`` the file is
    as it was before, or ``rewrite`` makes it so."""

    def __init__(self, place: Place, found: Replay | None, header: Header) -> None:
        """``found``: what ``replay`` read of the file that is there; None begins a new one."""
        self._place = place
        self._header = header
        self._fd = -1
        kept = {} if found is None else found.entries
        self._entries = {k: Entry(e.at, e.first, e.last, e.size) for k, e in kept.items()}
        self._frames = 0 if found is None else found.frames
        self._ops = 0 if found is None else found.ops
        self.size = 0 if found is None else found.end
        self.live = sum(entry.size for entry in self._entries.values())  # bytes, about
        if found is None:
            self._begin()
            return
        self._fd = place.open(NAME, os.O_RDWR)
        if found.torn:
            os.ftruncate(self._fd, found.end)
            os.fsync(self._fd)
        if found.holes:
            self.rewrite()

    @property
    def keys(self) -> int:
        """How many keys it holds."""
        return len(self._entries)

    def __contains__(self, key: str) -> bool:
        return key in self._entries

    @property
    def is_loose(self) -> bool:
        """Whether most of it is dropped, so that it should be rewritten."""
        return self.size - self.live > max(LOOSE_BYTES, self.live)

    def append(self, groups: Sequence[Sequence[Change]]) -> int:
        """Write groups of changes, each in one frame, and sync them; how many operations that
        were."""
        entries: dict[str, Entry | None] = {}  # as they will be
        raws: list[bytes] = []
        count, now = self._ops, int(time.time())
        for group in groups:
            ops: list[Op] = []
            for change in group:
                if (op := self._op(change, entries, count, now)) is not None:
                    ops.append(op)
                    count += 1
            if ops:
                raws.append(encode_frame(ops, self._frames + len(raws), self._header.secret))
        if not raws:
            return 0
        left = memoryview(b"".join(raws))
        written = len(left)
        try:
            while left:
                left = left[os.pwrite(self._fd, left, self.size + written - len(left)) :]
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, self.size)
            raise
        os.fdatasync(self._fd)
        self.size += written
        added, self._ops = count - self._ops, count
        self._frames += len(raws)
        for key, entry in entries.items():
            old = self._entries.pop(key, None)
            self.live += (entry.size if entry else 0) - (old.size if old else 0)
            if entry is not None:
                self._entries[key] = entry
        return added

    def rewrite(self) -> None:
        """Put in its place a new file without what is dropped, and with no damage in it."""
        with open(os.dup(self._fd), "rb") as old:
            old.seek(0)
            header, begin = decode_header(old.read(1 << 17))
            fd = self._fresh()
            try:
                size, number = self._header_of(fd), 0
                for ops in self._live_ops(frames(old, begin, self.size, header.secret)):
                    raw = encode_frame(ops, number, self._header.secret)
                    number += 1
                    size += _write_all(fd, raw)
                os.fsync(fd)
                os.rename(FRESH, NAME, src_dir_fd=self._place.fd, dst_dir_fd=self._place.fd)
            except BaseException:
                os.close(fd)
                raise
        os.close(self._fd)
        self._fd, self.size, self._frames = fd, size, number
        self._place.sync()

    def close(self) -> None:
        """Close the descriptor."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _begin(self) -> None:
        fd = self._fresh()
        try:
            self.size = self._header_of(fd)
            os.fsync(fd)
            os.rename(FRESH, NAME, src_dir_fd=self._place.fd, dst_dir_fd=self._place.fd)
            self._place.sync()
        except BaseException:
            os.close(fd)
            raise
        self._fd = fd

    def _fresh(self) -> int:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(FRESH, dir_fd=self._place.fd)
        return self._place.open(FRESH, os.O_RDWR | os.O_CREAT | os.O_EXCL)

    def _header_of(self, fd: int) -> int:
        return _write_all(fd, encode_header(self._header))

    def _op(
        self, change: Change, entries: dict[str, Entry | None], number: int, now: int
    ) -> Op | None:
        """The numbered operation of a change; None where there is nothing to add to, or drop."""
        key = change.key
        entry = entries[key] if key in entries else self._entries.get(key)
        if entry is None and change.kind is not Kind.PUT:
            return None
        data = change.data if isinstance(change.data, bytes) else change.data()
        before = number if change.kind is Kind.PUT or entry is None else entry.last
        op = Op(change.kind, key, number, before, now, data)
        if change.kind is Kind.DROP:
            entries[key] = None
        elif change.kind is Kind.PUT or entry is None:
            entries[key] = Entry.of(op)
        else:
            entries[key] = entry.grown(op)
        return op

    def _live_ops(self, old: Iterator[tuple[int, int, int, list[Op]]]) -> Iterator[list[Op]]:
        """What is live, in the order of the file, in frames of their own."""
        kept: list[Op] = []
        size = 0
        for _, _, _, ops in old:
            for op in ops:
                entry = self._entries.get(op.key)
                if entry is None or not entry.first <= op.number <= entry.last:
                    continue
                kept.append(op)
                size += len(op.data)
                if size >= _FRAME_BYTES:
                    yield kept
                    kept, size = [], 0
        if kept:
            yield kept


def read_journal(place: Place) -> Replay | None:
    """What the journal of a place holds; None where there is none. Raises ``NotAJournalError``,
    ``OSError``."""
    try:
        fd = place.open(NAME, os.O_RDONLY)
    except FileNotFoundError:
        return None
    with open(fd, "rb") as file:
        return replay(file, os.fstat(fd).st_size)


def new_header(config: str, model: tuple[str, ...], tokenizer: str) -> Header:
    """The header of a new journal."""
    return Header(config, model, tokenizer, secrets.token_bytes(32))


def _write_all(fd: int, raw: bytes) -> int:
    left = memoryview(raw)
    while left:
        left = left[os.write(fd, left) :]
    return len(raw)
