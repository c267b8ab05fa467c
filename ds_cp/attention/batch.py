"""What one call of a kernel attends: for each request of a step its rows of queries and its blocks.

Built once a step, from plain integers, and used in every layer that sees the same keys.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from ds_cp.layout import Block, Blocks, Runs, total

__all__ = [
    "BatchPlan", "Block", "Blocks", "IndexUpload", "PagedBatch", "Part", "Shards",
    "Room", "blocks_of_runs", "in_window", "make_batch", "parts_with_room",
]  # fmt: skip


@dataclass(frozen=True)
class Shards:
    """Where one request's tokens are in a step, known to all ranks of the group.

    ``q_runs[r]``: positions of the queries that rank r owns; ``blocks[r]``: the blocks of keys that
    rank r holds, new keys included, by rank r's own numbers. All ascend by position. Causality and
    windows follow from the positions alone.
    """

    q_runs: tuple[Runs, ...]
    blocks: tuple[Blocks, ...]


@dataclass(frozen=True)
class Part:
    """One request's part of a call: queries at the positions ``q_runs`` over the keys in
    ``blocks``. Both ascend by position; keys that lie elsewhere are simply not there."""

    q_runs: Runs
    blocks: Blocks


class Room(NamedTuple):
    """What each batch of a step gets room for, whatever it holds: ``keys``, counted from the first
    to the last one that a request has here, and their blocks of ``block_size``. Each request has
    one row at most."""

    keys: int
    block_size: int


class IndexUpload:
    """Index vectors of one step: collected as integers, then on the device by one copy.

    ``room``: batches are padded to it, so that the vectors of a later step with the same requests
    have the same places, which a captured graph reads (``ds_cp/worker/span_graph.py``).
    """

    def __init__(self, room: Room | None = None) -> None:
        self.room = room
        self._values = array("q")
        self._tensor: torch.Tensor | None = None
        self._plans: list[BatchPlan] = []  # those with room

    def add(self, values: Iterable[int]) -> slice:
        """Keep ``values``; what is returned finds them again after ``send``."""
        if self._tensor is not None:
            raise RuntimeError("index vectors are added before they are sent")
        begin = len(self._values)
        self._values.extend(values)
        return slice(begin, len(self._values))

    def add_all(self, vectors: Iterable[array[int]]) -> slice:
        """``add`` of several vectors, one behind the other."""
        begin = len(self._values)
        for values in vectors:
            self.add(values)
        return slice(begin, len(self._values))

    def send(self, device: torch.device) -> None:
        """Copy everything to ``device``: one copy, from pinned memory and without waiting where
        that is another device."""
        values = torch.frombuffer(self._values or array("q", [0]), dtype=torch.int64)
        if device.type == "cuda":
            values = values.pin_memory().to(device, non_blocking=True)
        self._tensor = values

    def __len__(self) -> int:
        """How many integers there are."""
        return len(self._values)

    def take(self, other: IndexUpload, count: int) -> None:
        """Overwrite the first ``count`` numbers, where they are, with those of ``other``. Both were
        sent."""
        self[slice(0, count)].copy_(other[slice(0, count)])

    def keep(self, plan: BatchPlan) -> None:
        """``plan`` has room."""
        self._plans.append(plan)

    def forget(self) -> None:
        """Batches with room are made anew: what kernels derived from their numbers is dropped."""
        for plan in self._plans:
            plan.forget()

    def __getitem__(self, where: slice) -> torch.Tensor:
        if self._tensor is None:
            raise RuntimeError("index vectors are read after they are sent")
        return self._tensor[where]


@dataclass(frozen=True, eq=False)
class PagedBatch:
    """n requests over one set of pages.

    Request i has the rows ``q_starts[i] .. q_starts[i + 1]`` of the queries and the entries
    ``block_starts[i] .. block_starts[i + 1]`` of ``blocks``, ``firsts`` and ``keys`` (all int64, on
    the device of the pages). Rows before ``q_starts[0]`` and from ``q_starts[n]`` on belong to no
    request of the call. Every slot of a named block is finite, also one that is no key.

    ``parts``: the same as integers, for what is planned on the host; ``max_rows``, ``max_keys``: of
    one request; ``derived``: where a kernel keeps what it computes once a step.
    """

    parts: tuple[Part, ...]
    first_row: int
    num_rows: int
    max_rows: int
    max_keys: int
    q_starts: torch.Tensor
    block_starts: torch.Tensor
    blocks: torch.Tensor
    firsts: torch.Tensor
    keys: torch.Tensor
    derived: dict[object, object] = field(default_factory=dict)


class BatchPlan:
    """A ``PagedBatch`` before its index vectors are on the device. ``first_row``: the row of the
    queries at which the first part begins; parts follow one another."""

    def __init__(self, parts: Sequence[Part], first_row: int, upload: IndexUpload) -> None:
        self._parts = tuple(parts)
        self._upload = upload
        rows = [total(part.q_runs) for part in self._parts]
        keys = [part.blocks.num_keys for part in self._parts]
        blocks = [part.blocks for part in self._parts]
        longest, spare = max(keys, default=0), 0
        if upload.room is not None:
            longest, size = upload.room
            spare = longest // size + len(blocks) - sum(map(len, blocks))
            self._parts = parts_with_room(len(blocks), longest, size)
            upload.keep(self)
        padding = array("q", [0]) * spare
        self._sizes = (sum(rows), max(rows, default=0), longest)
        self._first_row = first_row
        self._batch: PagedBatch | None = None
        self._where = [
            upload.add(_starts(first_row, rows)),
            upload.add(_starts(0, [len(some) for some in blocks])),
            upload.add_all([*(some.numbers for some in blocks), padding]),
            upload.add_all([*(some.firsts for some in blocks), padding]),
            upload.add_all([*(some.keys for some in blocks), padding]),
        ]
        assert spare >= 0, "more blocks than there is room for"

    def batch(self) -> PagedBatch:
        """The batch, once the upload was sent; the same one each time."""
        if self._batch is None:
            starts, block_starts, blocks, firsts, keys = (self._upload[x] for x in self._where)
            self._batch = PagedBatch(
                self._parts,
                self._first_row,
                *self._sizes,
                starts,
                block_starts,
                blocks,
                firsts,
                keys,
            )
        return self._batch

    def forget(self) -> None:
        """``batch`` makes another one."""
        self._batch = None


def _starts(begin: int, lengths: Sequence[int]) -> list[int]:
    found = [begin]
    for length in lengths:
        found.append(found[-1] + length)
    return found


def make_batch(parts: Sequence[Part], device: torch.device, first_row: int = 0) -> PagedBatch:
    """The batch of ``parts``, for one that stands alone."""
    upload = IndexUpload()
    plan = BatchPlan(parts, first_row, upload)
    upload.send(device)
    return plan.batch()


def parts_with_room(rows: int, keys: int, block_size: int) -> tuple[Part, ...]:
    """Parts that say how much a captured batch has room for, not what is in it: one row each,
    ``keys`` keys together. Cut at multiples of any size up to ``MARGIN`` of
    ``ds_cp.worker.decode_graph``, no batch of so many rows and keys gives more pieces."""
    one = Blocks([Block(0, 0, block_size)])
    all_keys = Blocks([Block(0, 0, block_size), Block(0, keys - block_size, block_size)])
    return (Part(((keys - 1, 1),), all_keys), *[Part(((0, 1),), one)] * (rows - 1))


def in_window(blocks: Blocks, first_query: int, window: int | None) -> Blocks:
    """The blocks that queries from position ``first_query`` on can see: all without a window."""
    if window is None:
        return blocks
    return blocks.within(first_query - window + 1, 1 << 62)


def blocks_of_runs(runs: Runs, block_size: int) -> Blocks:
    """Blocks that hold the keys at ``runs`` in storage order, numbered from 0 on: each run begins a
    block of its own. Ascending by position, whatever the order of the runs."""
    found: list[Block] = []
    for start, length in runs:
        for at in range(0, length, block_size):
            found.append(Block(len(found), start + at, min(block_size, length - at)))
    return Blocks(sorted(found, key=lambda block: block.first))
