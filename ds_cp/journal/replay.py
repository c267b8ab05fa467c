"""What a journal holds, read from its file: whatever happened to the bytes, for every key the
beginning of what was written to it, and never a part of an operation.

A tail that is torn is left out. Behind damage in the middle, frames that are whole are found again
by their mark and checksum, and what they add is kept where it follows what is known.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

from ds_cp.journal.format import (
    FRAME_BYTES,
    MARK,
    MAX_HEADER,
    Header,
    Kind,
    Op,
    decode_frame,
    decode_head,
    decode_header,
)

_WINDOW = 1 << 20  # bytes that are looked through at once for the next frame
SHOWN = 3  # damaged places that are named


@dataclass(eq=False)
class Entry:
    """What is kept of one key. ``at``: seconds since the epoch of its newest operation; ``first``
    and ``last``: the numbers of its ``PUT`` and of its newest operation."""

    at: int
    first: int
    last: int
    size: int = 0  # bytes in the file, about
    data: list[bytes] = field(default_factory=list)

    def grown(self, op: Op) -> Entry:
        """The same with one operation more."""
        size = self.size + op_bytes(op.key, len(op.data))
        return Entry(op.at, self.first, op.number, size, self.data)

    @classmethod
    def of(cls, put: Op) -> Entry:
        """A key that begins."""
        return cls(put.at, put.number, put.number, op_bytes(put.key, len(put.data)))


@dataclass
class Replay:
    """A journal's content. ``entries``: by key, the one that was begun last at the end; ``end``:
    bytes up to the end of the last whole frame; ``frames``: number of the next frame; ``ops``: of
    the next operation. ``holes``: damaged places before ``end``, as (first byte, bytes, frames
    lost); ``torn``: bytes behind ``end``;
    ``cut``: keys of which only a beginning is left."""

    header: Header
    entries: dict[str, Entry] = field(default_factory=dict)
    end: int = 0
    frames: int = 0
    ops: int = 0
    holes: list[tuple[int, int, int]] = field(default_factory=list)
    torn: int = 0
    cut: set[str] = field(default_factory=set)

    def notes(self) -> list[str]:
        """Lines on what was dropped; none where nothing was."""
        lines = []
        if self.torn:
            lines.append(f"its last {self.torn} bytes were not whole and are dropped")
        for first, size, frames in self.holes[:SHOWN]:
            lines.append(
                f"{size} bytes at byte {first} are damaged: {frames} records in them are lost, "
                "what was deleted in them may be there again"
            )
        if len(self.holes) > SHOWN:
            lines.append(f"and {len(self.holes) - SHOWN} more damaged places")
        if self.cut:
            named = ", ".join(sorted(self.cut)[:SHOWN])
            more = f" and {len(self.cut) - SHOWN} more" if len(self.cut) > SHOWN else ""
            lines.append(f"only a beginning is left of {named}{more}")
        return lines


def op_bytes(key: str, data: int) -> int:
    """Bytes that an operation takes in a file, about; never fewer than it does beside frames."""
    return len(key) * 4 + data + 32


def replay(file: BinaryIO, size: int, *, with_data: bool = True) -> Replay:
    """Read a journal of ``size`` bytes. ``with_data``: keep what operations hold, not only count
    it. Raises ``NotAJournalError`` for what has no whole header, ``OSError`` where it cannot be
    read."""
    file.seek(0)
    header, begin = decode_header(file.read(MAX_HEADER + 64))
    found = Replay(header, end=begin)
    for offset, length, number, ops in frames(file, begin, size, header.secret):
        if offset != found.end:
            found.holes.append((found.end, offset - found.end, number - found.frames))
        for op in ops:
            _apply(found, op, with_data)
        found.end, found.frames = offset + length, number + 1
    found.torn = size - found.end
    return found


def frames(
    file: BinaryIO, begin: int, size: int, secret: bytes
) -> Iterator[tuple[int, int, int, list[Op]]]:
    """The whole frames between two places of a file, each with its first byte, its bytes and its
    number, which grows."""
    place, least = begin, 0
    while place + FRAME_BYTES <= size:
        file.seek(place)
        raw = file.read(FRAME_BYTES)
        head = decode_head(raw)
        ops: list[Op] | None = None
        if head is not None and head.number >= least and place + FRAME_BYTES + head.size <= size:
            body = file.read(head.size)
            if len(body) == head.size:
                ops = decode_frame(raw, body, secret)
        if head is None or ops is None:
            place = _next_mark(file, place + 1, size)
            continue
        yield place, FRAME_BYTES + head.size, head.number, ops
        place, least = place + FRAME_BYTES + head.size, head.number + 1


def _next_mark(file: BinaryIO, place: int, size: int) -> int:
    while place < size:
        file.seek(place)
        window = file.read(min(_WINDOW, size - place))
        if len(window) < len(MARK):
            return size
        if (at := window.find(MARK)) >= 0:
            return place + at
        place += len(window) - len(MARK) + 1
    return size


def _apply(found: Replay, op: Op, with_data: bool) -> None:
    found.ops = max(found.ops, op.number + 1)
    entry = found.entries.get(op.key)
    if op.kind is Kind.DROP:
        found.entries.pop(op.key, None)
        found.cut.discard(op.key)
        return
    if op.kind is Kind.PUT:
        found.entries.pop(op.key, None)  # it is the newest now
        found.cut.discard(op.key)
        entry = Entry.of(op)
    elif entry is None:
        return  # its beginning is lost
    elif op.before != entry.last:
        found.cut.add(op.key)
        return
    else:
        entry = entry.grown(op)
    found.entries[op.key] = entry
    if with_data:
        entry.data.append(op.data)
