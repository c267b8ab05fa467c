"""A windowed layer's keys and values: each rank gets, in one exchange, just the blocks that its
queries can see, and attends its own while they are on the way."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ds_cp.attention.batch import BatchPlan, Block, Blocks, IndexUpload, Part, Shards
from ds_cp.attention.kernels import PagedKernel
from ds_cp.attention.pages import Pages
from ds_cp.attention.spec import LayerSpec
from ds_cp.attention.state import Partial
from ds_cp.attention.visible import Rows, renumbered, visible
from ds_cp.comm.wire import Group


class Halo:
    """One step's items under one window; called once per layer that has it."""

    def __init__(
        self,
        items: Sequence[Shards],
        group: Group,
        first_row: int,
        window: int,
        upload: IndexUpload,
        scheme: str,
    ) -> None:
        me = group.rank
        self._group = group
        self._scheme = scheme
        peers = [r for r in range(group.size) if r != me]
        self._sends: list[tuple[int, int]] = []  # peer, blocks for it
        going: list[int] = []
        for peer in peers:
            begin = len(going)
            for item in items:
                going += visible(item.blocks[me], item.q_runs[peer], window).numbers
            if len(going) > begin:
                self._sends.append((peer, len(going) - begin))
        self._recvs: list[tuple[int, int]] = []  # peer, blocks from it
        arriving: list[list[Block]] = [[] for _ in items]
        at = 0
        for peer in peers:
            begin = at
            for found, item in zip(arriving, items, strict=True):
                theirs = visible(item.blocks[peer], item.q_runs[me], window)
                found += renumbered(theirs, at)
                at += len(theirs)
            if at > begin:
                self._recvs.append((peer, at - begin))
        self._going = Rows(going, upload)
        self._coming = at
        own = [
            Part(item.q_runs[me], visible(item.blocks[me], item.q_runs[me], window))
            for item in items
        ]
        away = [
            Part(item.q_runs[me], Blocks(sorted(found, key=lambda block: block.first)))
            for found, item in zip(arriving, items, strict=True)
        ]
        self._own = BatchPlan(own, first_row, upload) if any(p.blocks for p in own) else None
        self._away = BatchPlan(away, first_row, upload) if at else None

    def __call__(
        self,
        q_THD: torch.Tensor,
        q_positions: torch.Tensor,
        pages: Pages,
        kernel: PagedKernel,
        spec: LayerSpec,
        into: Partial,
    ) -> None:
        """As in ``Mode``."""
        pending, arrived = None, None
        if self._sends or self._recvs:
            width = pages.shape.elements
            blocks = pages.data.new_empty(0, width)
            if self._sends:
                blocks = self._going.of(pages.data[:, :width])
            arrived = pages.data.new_empty(self._coming, width)
            sends = _cut(blocks, self._sends)
            pending = self._group.exchange(sends, _cut(arrived, self._recvs), self._scheme)
        if self._own is not None:
            kernel.paged_attention(q_THD, q_positions, pages, self._own.batch(), spec, into)
        if pending is not None:
            pending.wait()
        if self._away is not None and arrived is not None:
            theirs = Pages(arrived, pages.shape)
            kernel.paged_attention(q_THD, q_positions, theirs, self._away.batch(), spec, into)


def _cut(rows: torch.Tensor, counts: Sequence[tuple[int, int]]) -> list[tuple[int, torch.Tensor]]:
    """Each peer's stretch of ``rows``."""
    parts = torch.split(rows, [count for _, count in counts]) if counts else ()
    return [(peer, part) for (peer, _), part in zip(counts, parts, strict=True)]
