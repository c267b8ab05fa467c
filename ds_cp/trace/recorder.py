"""Spans of one rank in a bounded buffer of fixed-size records."""

from __future__ import annotations

import struct
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import IntEnum
from typing import NamedTuple

import msgspec

RECORD = struct.Struct("<qqqiHHB")  # ``Record``, in its order
MAX_NAMES = 4096  # different names of one rank; what comes later is called OTHER
OTHER = "other"


class Kind(IntEnum):
    """What a span is."""

    STEP = 0  # number: the step's
    MODEL = 1  # the model's forward call
    LAYER = 2  # attention of a layer, all of it; number: the layer's
    MODE = 3  # a mode's part in a layer
    ATTEND = 4  # a kernel's attention
    FOLD = 5  # partials packed or merged
    STORE = 6  # keys and values written
    POST = 7  # an exchange is started; value: bytes that this rank sends; number: the exchange's
    WAIT = 8  # the rest of that exchange
    SUM = 9  # a collective; value: bytes
    HOST = 10  # blocks copied to host memory or back; value: bytes; number: blocks


class Record(NamedTuple):
    """A span: nanoseconds of this rank's clock, and as ``Kind`` says. ``name`` and ``mode`` are
    indices of names; mode 0 is none."""

    begin: int
    end: int
    value: int
    number: int
    name: int
    mode: int
    kind: int


class Recording(msgspec.Struct, frozen=True):
    """What one rank has recorded, without the records. ``steps``: (number, first record) of each
    step that was kept, in order; ``left_out``: steps that found no room, the last ones."""

    names: tuple[str, ...]
    steps: tuple[tuple[int, int], ...]
    left_out: int


class Recorder:
    """Keeps the spans of whole steps, up to ``limit`` records; the steps after that are counted.

    Used by one thread. ``mode``: name of the mode whose spans come now, "" for none.
    """

    def __init__(self, limit: int) -> None:
        self._most = limit * RECORD.size  # bytes
        self._records = bytearray()
        self._steps: list[tuple[int, int]] = []
        self._left_out = 0
        self._names: dict[str, int] = {"": 0, OTHER: 1}
        self._open = False  # within a step that may still be kept
        self._exchanges = 0
        self._mode = 0

    @property
    def now(self) -> int:
        """Nanoseconds."""
        return time.perf_counter_ns()

    def add(
        self, kind: Kind, name: str, begin: int, value: int = 0, number: int = 0,
        end: int | None = None,
    ) -> None:  # fmt: skip
        """A span from ``begin`` to ``end``, or now. Nothing outside steps, or beyond the limit."""
        if len(self._records) >= self._most:
            self._open = False
        if self._open:
            self._records += RECORD.pack(
                begin, time.perf_counter_ns() if end is None else end, value, number,
                self._name(name), self._mode, kind,
            )  # fmt: skip

    def next_exchange(self) -> int:
        """The number of a new exchange."""
        self._exchanges = self._exchanges % (2**31 - 1) + 1
        return self._exchanges

    @contextmanager
    def span(self, kind: Kind, name: str, number: int = 0) -> Iterator[None]:
        """Around what the span covers."""
        begin = time.perf_counter_ns()
        try:
            yield
        finally:
            self.add(kind, name, begin, number=number)

    @contextmanager
    def in_mode(self, name: str) -> Iterator[None]:
        """Around a mode's part in a layer."""
        before, self._mode = self._mode, self._name(name)
        try:
            with self.span(Kind.MODE, name):
                yield
        finally:
            self._mode = before

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around a step. When its records find no room, or it fails, none of them is kept; and
        after one that found no room no other step is."""
        first = len(self._records) // RECORD.size
        self._open = not self._left_out
        kept = False
        begin = time.perf_counter_ns()
        try:
            yield
            self.add(Kind.STEP, "step", begin, number=number)
            kept = self._open
        finally:
            self._open = False
            if kept:
                self._steps.append((number, first))
            else:
                del self._records[first * RECORD.size :]
                self._left_out += 1

    def _name(self, text: str) -> int:
        found = self._names.get(text)
        if found is None:
            if len(self._names) >= MAX_NAMES:
                return 1
            found = self._names[text] = len(self._names)
        return found

    def recording(self) -> tuple[Recording, bytearray]:
        """What there is so far, and its records one after the other: the buffer itself, which may
        have hundreds of megabytes."""
        names = tuple(self._names)
        return Recording(names, tuple(self._steps), self._left_out), self._records


def records_of(data: bytes | bytearray, first: int, last: int) -> Iterator[Record]:
    """The records ``first`` to ``last - 1`` of ``Recorder.recording``."""
    for fields in RECORD.iter_unpack(memoryview(data)[first * RECORD.size : last * RECORD.size]):
        yield Record(*fields)


def common_end(recordings: Sequence[Recording]) -> int:
    """The last step that every rank has kept; -1 when there is none."""
    return min((r.steps[-1][0] if r.steps else -1 for r in recordings), default=-1)


def end_of(recording: Recording, last_step: int, total: int) -> int:
    """How many of ``total`` records belong to steps up to ``last_step``."""
    return next((first for number, first in recording.steps if number > last_step), total)
