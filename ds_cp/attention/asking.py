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
from ds_cp.attention.wireform import new_rows
from ds_cp.comm.tree import Ask, RowBlock, TreeRoutes
from ds_cp.comm.wire import Group, Message, Pending
from ds_cp.layout import positions, total

Count = tuple[int, int]  # (peer, rows)


@dataclass(frozen=True)
class _Peer:
    """Rows that I send to a peer and that it answers: mine, then those that I carry for others.
    ``which``: alike for peers that get the same rows."""

    rank: int
    which: object
    own: Rows
    carried: Rows

    @property
    def count(self) -> int:
        """Rows that it answers."""
        return self.own.count + self.carried.count

    def copy(self, mine: torch.Tensor, others: torch.Tensor, out: torch.Tensor) -> None:
        """Copy the rows of ``mine`` and ``others`` (those that I carry) to ``out``."""
        cut = self.own.count
        if not self.carried.count:
            self.own.copy(mine, out)
            return
        if cut:
            self.own.copy(mine, out[:cut])
        self.carried.copy(others, out[cut:])

    def fold(
        self, packed: torch.Tensor, dtype: torch.dtype, mine: Partial, others: Partial | None,
        kernel: PagedKernel,
    ) -> None:  # fmt: skip
        """Merge its answers into my rows and into those that I carry (``others``, None when there
        are none)."""
        if others is None or not self.carried.count:
            self.own.fold(mine, packed, dtype, kernel)
            return
        cut = self.own.count
        self.own.fold(mine, packed[:cut], dtype, kernel)
        self.carried.fold(others, packed[cut:], dtype, kernel)


@dataclass(frozen=True)
class _Level:
    """Between hosts or inside one: whom I ask, and who asks me, for the rows ``begin .. end - 1``
    of those that arrive here."""

    asks: Sequence[_Peer]
    asked_by: Sequence[Count]
    begin: int
    end: int


class _Wires:
    """One level's messages in the layers of one shape: memory and exchanges, the same for each of
    them. A layer waits for all of them before the next one begins."""

    def __init__(
        self, level: _Level, group: Group, q_THD: torch.Tensor, arrived: torch.Tensor,
        spec: LayerSpec, schemes: tuple[str, str],
    ) -> None:  # fmt: skip
        self._level, self._dtype = level, q_THD.dtype

        def rows(count: int) -> torch.Tensor:
            return new_rows(count, spec, q_THD.dtype, q_THD)

        self._asked = {peer.which: peer for peer in level.asks}
        self._queries = {
            which: q_THD.new_empty(peer.count, *q_THD.shape[1:])
            for which, peer in self._asked.items()
        }
        self._packed = rows(level.end - level.begin)
        self._answers = [rows(peer.count) for peer in level.asks]
        going = [(peer.rank, self._queries[peer.which]) for peer in level.asks]
        coming = _cut(arrived[level.begin : level.end], level.asked_by)
        self._ask = group.prepare(going, coming, schemes[0])
        found = [(p.rank, x) for p, x in zip(level.asks, self._answers, strict=True)]
        self._back = group.prepare(_cut(self._packed, level.asked_by), found, schemes[1])

    def ask(self, q_THD: torch.Tensor, arrived: torch.Tensor) -> Pending:
        """Send queries to whom I ask; those of who asks me come into ``arrived``."""
        for which, queries in self._queries.items():
            self._asked[which].copy(q_THD, arrived, queries)
        return self._ask.start()

    def answer(self, part: Partial | None, into: Partial, kernel: PagedKernel) -> None:
        """Send who asks me its rows of ``part``; merge what I am answered, by rank, into ``into``
        and into the rows of ``part`` that I carry."""
        level = self._level
        if part is not None and level.asked_by:
            mine = part
            if len(part.out) != len(self._packed):
                at = slice(level.begin, level.end)
                mine = Partial(part.out[at], part.lse[at])
            kernel.pack(mine, self._dtype, self._packed)
        self._back.start().wait()
        for peer, rows in zip(level.asks, self._answers, strict=True):
            peer.fold(rows, self._dtype, into, part, kernel)


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
        self._schemes = schemes
        blocks = row_blocks(items, group.size, window)
        route = routes.find(blocks, group.hosts, me)

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

        def counts(ask: Ask) -> list[Count]:
            return [(peer, route.rows_in(found)) for peer, found in ask.items()]

        none = Rows((), upload)
        away = [_Peer(r, found, own_rows(found), none) for r, found in route.away.items()]
        inside = []
        for r in route.inside:
            mine, others = route.own.get(r, ()), route.passed_on.get(r, ())
            inside.append(_Peer(r, (mine, others), own_rows(mine), carried_rows(others)))
        carried = route.rows_in(i for found in route.carried.values() for i in found)
        self._between = _Level(away, counts(route.carried), 0, carried) if route.between else None
        self._inside = _Level(inside, counts(route.asked), carried, self._arriving)
        self._shapes: dict[object, tuple[torch.Tensor, _Wires | None, _Wires]] = {}

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
        arrived, between, inside = self._wires(q_THD, spec)
        if between is not None:
            between.ask(q_THD, arrived).wait()
        pending = inside.ask(q_THD, arrived)
        if self._own is not None:
            kernel.paged_attention(q_THD, q_positions, pages, self._own.batch(), spec, into)
        pending.wait()
        part: Partial | None
        if self._asked is not None:
            at = self._upload[self._asked_at]
            part = kernel.paged_attention(arrived, at, pages, self._asked.batch(), spec)
        elif self._arriving:
            part = empty_partial(self._arriving, spec.num_q_heads, spec.v_dim, arrived.device)
        else:
            part = None  # nobody asks this rank: it only asks
        inside.answer(part, into, kernel)
        if between is not None:
            between.answer(part, into, kernel)

    def _wires(
        self, q_THD: torch.Tensor, spec: LayerSpec
    ) -> tuple[torch.Tensor, _Wires | None, _Wires]:
        """Of layers of that shape: where queries of others arrive, and both levels' messages."""
        shape = spec.num_q_heads, spec.head_dim, spec.v_dim, q_THD.dtype
        found = self._shapes.get(shape)
        if found is None:
            arrived = q_THD.new_empty(self._arriving, spec.num_q_heads, spec.head_dim)

            def wires(level: _Level) -> _Wires:
                return _Wires(level, self._group, q_THD, arrived, spec, self._schemes)

            between = None if self._between is None else wires(self._between)
            found = self._shapes[shape] = arrived, between, wires(self._inside)
        return found


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


def _cut(rows: torch.Tensor, counts: Sequence[Count]) -> list[Message]:
    """Each peer's stretch of ``rows``."""
    if len(counts) == 1:
        return [(counts[0][0], rows)]
    parts = torch.split(rows, [count for _, count in counts]) if counts else ()
    return [(peer, part) for (peer, _), part in zip(counts, parts, strict=True)]
