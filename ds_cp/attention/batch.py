"""What one call of a kernel attends: for each request of a step its rows of queries and its blocks.

Built once a step, from plain integers, and used in every layer that sees the same keys.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch

from ds_cp.layout import Block, Blocks, Runs, total

__all__ = [
    "BatchPlan", "Block", "Blocks", "IndexUpload", "PagedBatch", "Part", "Shards",
    "blocks_of_runs", "in_window", "make_batch",
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


class IndexUpload:
    """Index vectors of one step: collected as integers, then on the device by one copy."""

    def __init__(self) -> None:
        self._values = array("q")
        self._tensor: torch.Tensor | None = None

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
        self._sizes = (sum(rows), max(rows, default=0), max(keys, default=0))
        self._first_row = first_row
        self._batch: PagedBatch | None = None
        blocks = [part.blocks for part in self._parts]
        self._where = [
            upload.add(_starts(first_row, rows)),
            upload.add(_starts(0, [len(some) for some in blocks])),
            upload.add_all(some.numbers for some in blocks),
            upload.add_all(some.firsts for some in blocks),
            upload.add_all(some.keys for some in blocks),
        ]

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
