"""What one call of a kernel attends: for each request of a step its rows of queries and its blocks.

Built once a step, from plain integers, and used in every layer that sees the same keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from ds_cp.layout import Runs, total


class Block(NamedTuple):
    """One block of keys: its number in the pages, the position of its first key, and how many keys
    it holds. Key j is at position ``first + j``."""

    block: int
    first: int
    keys: int


@dataclass(frozen=True)
class Shards:
    """Where one request's tokens are in a step, known to all ranks of the group.

    ``q_runs[r]``: positions of the queries that rank r owns; ``blocks[r]``: the blocks of keys that
    rank r holds, new keys included, by rank r's own numbers. All ascend by position. Causality and
    windows follow from the positions alone.
    """

    q_runs: tuple[Runs, ...]
    blocks: tuple[tuple[Block, ...], ...]


@dataclass(frozen=True)
class Part:
    """One request's part of a call: queries at the positions ``q_runs`` over the keys in
    ``blocks``. Both ascend by position; keys that lie elsewhere are simply not there."""

    q_runs: Runs
    blocks: Sequence[Block]


class IndexUpload:
    """Index vectors of one step: collected as integers, then on the device by one copy."""

    def __init__(self) -> None:
        self._values: list[int] = []
        self._tensor: torch.Tensor | None = None

    def add(self, values: Sequence[int]) -> slice:
        """Keep ``values``; what is returned finds them again after ``send``."""
        if self._tensor is not None:
            raise RuntimeError("index vectors are added before they are sent")
        begin = len(self._values)
        self._values += values
        return slice(begin, len(self._values))

    def send(self, device: torch.device) -> None:
        """Copy everything to ``device``: one copy, from pinned memory and without waiting where
        that is another device."""
        values = torch.tensor(self._values, dtype=torch.int64)
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
        keys = [sum(block.keys for block in part.blocks) for part in self._parts]
        self._sizes = (sum(rows), max(rows, default=0), max(keys, default=0))
        self._first_row = first_row
        self._batch: PagedBatch | None = None
        flat = [block for part in self._parts for block in part.blocks]
        self._where = [
            upload.add(_starts(first_row, rows)),
            upload.add(_starts(0, [len(part.blocks) for part in self._parts])),
            upload.add([block.block for block in flat]),
            upload.add([block.first for block in flat]),
            upload.add([block.keys for block in flat]),
        ]

    def batch(self) -> PagedBatch:
        """The batch, once the upload was sent; the same one each time."""
        if self._batch is None:
            vectors = [self._upload[where] for where in self._where]
            self._batch = PagedBatch(self._parts, self._first_row, *self._sizes, *vectors)
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


def in_window(blocks: Sequence[Block], first_query: int, window: int | None) -> list[Block]:
    """The blocks that queries from position ``first_query`` on can see: all without a window."""
    if window is None:
        return list(blocks)
    return [b for b in blocks if b.first + b.keys > first_query - window + 1]


def blocks_of_runs(runs: Runs, block_size: int, number: int = 0) -> list[Block]:
    """Blocks, numbered from ``number`` on, that hold the keys at ``runs`` in storage order: each
    run begins a block of its own."""
    found: list[Block] = []
    for start, length in runs:
        for at in range(0, length, block_size):
            keys = min(block_size, length - at)
            found.append(Block(number + len(found), start + at, keys))
    return found
