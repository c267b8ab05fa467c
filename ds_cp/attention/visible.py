"""Which blocks some queries can see, and rows as a step's modes pick them: integers before layers
run, views and index vectors then."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from typing import TypeVar

import torch

from ds_cp.attention.batch import Blocks, IndexUpload, Shards
from ds_cp.attention.kernels import Merge, PagedKernel
from ds_cp.attention.spec import LayerSpec
from ds_cp.layout import Runs

P = TypeVar("P")
T = TypeVar("T")
Make = Callable[[Sequence[Shards], int | None], P]  # a plan of some items under one window
Plans = dict[int | None, tuple[P, ...]]  # window -> plans, called one after the other
NO_BLOCKS = Blocks()


def visible(blocks: Blocks, q_runs: Runs, window: int | None) -> Blocks:
    """The ``blocks`` in which some query at ``q_runs`` sees a key. Both ascend by position."""
    if not blocks or not q_runs:
        return NO_BLOCKS
    if window is None:
        end = sum(q_runs[-1])
        return blocks if blocks.firsts[-1] < end else blocks.within(0, end)
    stretches: list[tuple[int, int]] = []  # indices, begin and end
    for start, length in q_runs:
        begin, end = blocks.where(start - window + 1, start + length)
        if stretches:
            begin = max(begin, stretches[-1][1])
        if begin < end:
            stretches.append((begin, end))
    parts = [blocks[begin:end] for begin, end in stretches]
    return parts[0] if len(parts) == 1 else Blocks(block for part in parts for block in part)


def sees(blocks: Blocks, q_runs: Runs, window: int | None) -> bool:
    """Whether ``visible`` would find any; quick where the queries come after all keys."""
    if not blocks or not q_runs:
        return False
    if window is None:
        return blocks.firsts[0] < sum(q_runs[-1])
    if blocks.firsts[-1] <= q_runs[0][0]:
        return blocks.firsts[-1] + blocks.keys[-1] > q_runs[0][0] - window + 1
    return bool(visible(blocks, q_runs, window))


def renumbered(blocks: Blocks, begin: int) -> Blocks:
    """The same blocks, numbered from ``begin`` on, as they lie after they have travelled."""
    moved = blocks[:]
    moved.numbers = array("q", range(begin, begin + len(blocks)))
    return moved


def by_window(windows: Iterable[int | None], items: Iterable[Shards], make: Make[P]) -> Plans[P]:
    """A plan over all ``items`` for each of ``windows``; those that hide nothing of any item share
    the one for None. For plans under which an item's result is the same with either. All ranks
    come to the same, because all know the items."""
    items = list(items)
    end = max(map(_end, items), default=0)
    made: dict[int | None, P] = {}
    plans: Plans[P] = {}
    for window in windows:
        kind = None if window is None or window >= end else window
        if kind not in made:
            made[kind] = make(items, kind)
        plans[window] = (made[kind],)
    return plans


def by_item(windows: Iterable[int | None], items: Sequence[Shards], make: Make[P]) -> Plans[P]:
    """The plans for each of ``windows`` where what an item gets depends on its plan: items of which
    a window hides nothing are in the one for None, the others in the one for the window. So an
    item's plan, and with it the order in which its partials are folded, follows from the item
    alone. Each plan has all items, so that rows stay; those of the other one have no blocks."""
    ends = [_end(item) for item in items]
    made: dict[tuple[int | None, tuple[bool, ...]], P] = {}
    plans: Plans[P] = {}

    def plan(kind: int | None, has: tuple[bool, ...]) -> P:
        if (kind, has) not in made:
            some = [item if there else _emptied(item)
                    for item, there in zip(items, has, strict=True)]  # fmt: skip
            made[kind, has] = make(some, kind)
        return made[kind, has]

    for window in windows:
        whole = tuple(window is None or end <= window for end in ends)
        found = [plan(None, whole)] if any(whole) or window is None else []
        if not all(whole):
            found.append(plan(window, tuple(not one for one in whole)))
        plans[window] = tuple(found)
    return plans


def _end(item: Shards) -> int:
    """The position behind the item's last query."""
    return max((sum(runs[-1]) for runs in item.q_runs if runs), default=0)


def _emptied(item: Shards) -> Shards:
    return Shards(item.q_runs, (NO_BLOCKS,) * len(item.blocks))


def alike(peers: Sequence[T], which: Callable[[T], object], kernel: PagedKernel) -> list[list[T]]:
    """``peers`` in their order, those that follow one another and answer the same rows (``which``)
    together where the kernel merges several answers at once."""
    if not getattr(kernel, "stacks", False):
        return [[peer] for peer in peers]
    return [list(some) for _, some in groupby(peers, key=which)]


class Rows:
    """Some rows of a tensor in a given order: a stretch is a view of it, others are an index
    vector."""

    def __init__(self, rows: Sequence[int], upload: IndexUpload) -> None:
        self.count = len(rows)
        self._upload = upload
        stretch = bool(rows) and all(row == rows[0] + i for i, row in enumerate(rows))
        self._stretch = slice(rows[0], rows[-1] + 1) if stretch else None
        self._where = slice(0, 0) if stretch else upload.add(rows)

    def of(self, x: torch.Tensor) -> torch.Tensor:
        """These rows of ``x``, contiguous."""
        if self._stretch is not None:
            return x[self._stretch].contiguous()
        return x.index_select(0, self._upload[self._where])

    def copy(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """Copy these rows of ``x`` to ``out``."""
        if self._stretch is not None:
            out.copy_(x if self.count == len(x) else x[self._stretch])
        else:
            torch.index_select(x, 0, self._upload[self._where], out=out)

    def merging(
        self, packed: torch.Tensor, dtype: torch.dtype, spec: LayerSpec, kernel: PagedKernel
    ) -> Merge:
        """Merges ``packed``, a row on the wire for each, with out in ``dtype``, into these rows of
        a partial."""
        first = self._stretch
        rows = self._upload[self._where] if first is None else first.start
        return kernel.merging(packed, dtype, rows, spec.num_q_heads, spec.v_dim)
