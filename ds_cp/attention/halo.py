"""A windowed layer's keys and values: each rank gets, in one exchange, just the blocks that its
queries can see, and attends its own while they are on the way."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ds_cp.attention.batch import BatchPlan, Block, Blocks, IndexUpload, Part, Shards
from ds_cp.attention.kernels import Call, PagedKernel
from ds_cp.attention.pages import Pages
from ds_cp.attention.spec import LayerSpec
from ds_cp.attention.state import Partial
from ds_cp.attention.visible import Rows, renumbered, visible
from ds_cp.comm.wire import Group, Prepared


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
        self._shapes: dict[object, tuple[torch.Tensor | None, torch.Tensor, Prepared]] = {}
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
        sent, arrived, exchange = self._layers_like(pages)
        if sent is not None:
            self._going.copy(pages.data[:, : pages.shape.elements], sent)
        pending = exchange.start()
        if self._own is not None:
            pending.before_work()
            kernel.paged_attention(q_THD, q_positions, pages, self._own.batch(), spec, into)
        attend: Call | None = None
        if self._away is not None:
            theirs, batch = Pages(arrived, pages.shape), self._away.batch()
            attend = kernel.attending(q_THD, q_positions, theirs, batch, spec, into)
        pending.wait()
        if attend is not None:
            attend()

    def _layers_like(self, pages: Pages) -> tuple[torch.Tensor | None, torch.Tensor, Prepared]:
        """What layers of such pages share: where blocks that go and blocks that come are, and the
        exchange."""
        found = self._shapes.get(pages.shape)
        if found is None:
            width = pages.shape.elements
            sent = pages.data.new_empty(self._going.count, width) if self._sends else None
            arrived = pages.data.new_empty(self._coming, width)
            sends = [] if sent is None else _cut(sent, self._sends)
            exchange = self._group.prepare(sends, _cut(arrived, self._recvs), self._scheme)
            found = self._shapes[pages.shape] = sent, arrived, exchange
        return found


def _cut(rows: torch.Tensor, counts: Sequence[tuple[int, int]]) -> list[tuple[int, torch.Tensor]]:
    """Each peer's stretch of ``rows``."""
    parts = torch.split(rows, [count for _, count in counts]) if counts else ()
    return [(peer, part) for (peer, _), part in zip(counts, parts, strict=True)]
