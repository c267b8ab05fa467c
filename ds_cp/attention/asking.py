"""Queries go to the ranks that hold keys which they see, partials come back: what mode tree does,
and ring pass-Q for windowed layers.

All items' queries for one peer travel in one message, and so do the partials that it sends back.
What is asked of this rank is answered by one kernel call over its pages; its own queries are
attended while the others are on the way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ds_cp.attention.batch import BatchPlan, IndexUpload, Part, Shards
from ds_cp.attention.kernels import PagedKernel
from ds_cp.attention.pages import Pages
from ds_cp.attention.spec import LayerSpec
from ds_cp.attention.state import Partial, empty_partial
from ds_cp.attention.visible import Rows, sees, visible
from ds_cp.attention.wireform import new_rows, pack_partial, unpack_partial
from ds_cp.comm.tree import Ask, RowBlock, TreeRoutes
from ds_cp.comm.wire import Group, Message
from ds_cp.layout import positions, total

Count = tuple[int, int]  # (peer, rows)


@dataclass(frozen=True)
class _Peer:
    """Rows that I send to a peer and that it answers: mine, then those that I carry for others."""

    rank: int
    own: Rows
    carried: Rows

    @property
    def count(self) -> int:
        """Rows that it answers."""
        return self.own.count + self.carried.count

    def fold(
        self, found: Partial, mine: Partial, others: Partial | None, kernel: PagedKernel
    ) -> None:
        """Merge its answers into my rows and into those that I carry (``others``, None when there
        are none)."""
        if others is None or not self.carried.count:
            self.own.fold(mine, found, kernel)
            return
        cut = self.own.count
        if cut:
            self.own.fold(mine, Partial(found.out[:cut], found.lse[:cut]), kernel)
        self.carried.fold(others, Partial(found.out[cut:], found.lse[cut:]), kernel)


class Asking:
    """One step's items under one window; called once per layer that has it. ``schemes``: names in
    the ledger, of queries and of partials."""

    def __init__(
        self,
        items: Sequence[Shards],
        group: Group,
        first_row: int,
        window: int | None,
        upload: IndexUpload,
        routes: TreeRoutes,
        schemes: tuple[str, str],
    ) -> None:
        me = group.rank
        self._group = group
        self._scheme_q, self._scheme_back = schemes
        blocks = row_blocks(items, group.size, window)
        route = routes.find(blocks, group.hosts, me)
        self._between = route.between

        def mine_of(item: int, owner: int) -> Part:
            runs = items[item].q_runs[owner]
            return Part(runs, visible(items[item].blocks[me], runs, window))

        own = [mine_of(i, me) for i in range(len(items))]
        self._own = BatchPlan(own, first_row, upload) if any(p.blocks for p in own) else None
        asked = [mine_of(blocks[i].item, blocks[i].owner) for i in route.arriving]
        self._asked = BatchPlan(asked, 0, upload) if any(p.blocks for p in asked) else None
        self._asked_at = upload.add([p for part in asked for p in positions(part.q_runs)])
        self._upload = upload
        self._arriving = route.rows_in(route.arriving)

        def own_rows(indices: Sequence[int]) -> Rows:
            return Rows([first_row + row for row in route.own_rows(indices)], upload)

        def carried_rows(indices: Sequence[int]) -> Rows:
            return Rows(route.arriving_rows(indices), upload)

        none = Rows((), upload)
        self._away = [_Peer(r, own_rows(found), none) for r, found in route.away.items()]
        self._inside = [
            _Peer(r, own_rows(route.own.get(r, ())), carried_rows(route.passed_on.get(r, ())))
            for r in route.inside
        ]

        def counts(ask: Ask) -> list[Count]:
            return [(peer, route.rows_in(found)) for peer, found in ask.items()]

        self._carried, self._asked_by = counts(route.carried), counts(route.asked)
        self._num_carried = route.rows_in(i for found in route.carried.values() for i in found)

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
        dtype = q_THD.dtype
        asked = q_THD.new_empty(self._arriving, spec.num_q_heads, spec.head_dim)
        carried, close = asked[: self._num_carried], asked[self._num_carried :]
        if self._between:
            sends = [(peer.rank, peer.own.of(q_THD)) for peer in self._away]
            self._group.exchange(sends, _cut(carried, self._carried), self._scheme_q).wait()
        pending = None
        if self._inside or self._asked_by:
            sends = [(peer.rank, _rows_for(peer, q_THD, asked)) for peer in self._inside]
            pending = self._group.exchange(sends, _cut(close, self._asked_by), self._scheme_q)
        if self._own is not None:
            kernel.paged_attention(q_THD, q_positions, pages, self._own.batch(), spec, into)
        if pending is not None:
            pending.wait()
        part: Partial | None
        if self._asked is not None:
            at = self._upload[self._asked_at]
            part = kernel.paged_attention(asked, at, pages, self._asked.batch(), spec)
        elif self._arriving:
            part = empty_partial(len(asked), spec.num_q_heads, spec.v_dim, asked.device)
        else:
            part = None  # nobody asks this rank: it only asks

        def back(answers: Sequence[Count], begin: int, peers: Sequence[_Peer]) -> None:
            """Send rows of ``part`` from ``begin`` on back to who asked, fold what ``peers``
            answer, by rank."""
            if not answers and not peers:
                return
            sends: list[Message] = []
            if part is not None and answers:
                end = begin + sum(count for _, count in answers)
                packed = pack_partial(Partial(part.out[begin:end], part.lse[begin:end]), dtype)
                sends = _cut(packed, answers)
            recvs = [(peer.rank, new_rows(peer.count, spec, dtype, q_THD)) for peer in peers]
            self._group.exchange(sends, recvs, self._scheme_back).wait()
            for peer, (_, rows) in zip(peers, recvs, strict=True):
                found = unpack_partial(rows, spec, dtype)
                peer.fold(found, into, part, kernel)

        back(self._asked_by, self._num_carried, self._inside)
        if self._between:
            back(self._carried, 0, self._away)


def row_blocks(items: Sequence[Shards], size: int, window: int | None) -> tuple[RowBlock, ...]:
    """Every owner's rows of every item with the ranks that hold a key which they see, by (owner,
    item)."""
    found = []
    for item, shards in enumerate(items):
        holders = [r for r in range(size) if shards.blocks[r]]
        for owner in range(size):
            if runs := shards.q_runs[owner]:
                seen = tuple(r for r in holders if sees(shards.blocks[r], runs, window))
                found.append(RowBlock(item, owner, total(runs), seen))
    return tuple(sorted(found, key=lambda block: (block.owner, block.item)))


def _rows_for(peer: _Peer, q_THD: torch.Tensor, arrived: torch.Tensor) -> torch.Tensor:
    if not peer.carried.count:
        return peer.own.of(q_THD)
    if not peer.own.count:
        return peer.carried.of(arrived)
    return torch.cat([peer.own.of(q_THD), peer.carried.of(arrived)])


def _cut(rows: torch.Tensor, counts: Sequence[Count]) -> list[Message]:
    """Each peer's stretch of ``rows``."""
    if len(counts) == 1:
        return [(counts[0][0], rows)]
    parts = torch.split(rows, [count for _, count in counts]) if counts else ()
    return [(peer, part) for (peer, _), part in zip(counts, parts, strict=True)]
