"""Queries go to the ranks that hold keys which they see, partials come back: what mode tree does,
and ring pass-Q for windowed layers.

All items' queries for one peer travel in one message, and so do the partials that it sends back.
What is asked of this rank is answered by one kernel call over its pages; its own queries are
attended while the others are on the way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ds_cp.attention.batch import BatchPlan, IndexUpload, Part, Shards
from ds_cp.attention.kernels import Call, Merge, PagedKernel
from ds_cp.attention.pages import Pages
from ds_cp.attention.spec import LayerSpec
from ds_cp.attention.state import NEG_INF, Partial, empty_partial
from ds_cp.attention.visible import Rows, alike, sees, visible
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
        self, level: _Level, group: Group, schemes: tuple[str, str], like: torch.Tensor,
        spec: LayerSpec, arrived: torch.Tensor, part: Partial, kernel: PagedKernel,
    ) -> None:  # fmt: skip
        """``arrived``: queries of others; ``part``: what is found for them; ``like``: queries of
        such layers."""
        self._asked = {peer.which: peer for peer in level.asks}
        self._queries = {
            which: like.new_empty(peer.count, *like.shape[1:])
            for which, peer in self._asked.items()
        }
        going = [(peer.rank, self._queries[peer.which]) for peer in level.asks]
        here = slice(level.begin, level.end)
        self._ask = group.prepare(going, _cut(arrived[here], level.asked_by), schemes[0])
        packed = new_rows(level.end - level.begin, spec, like.dtype, like)
        found = Partial(part.out[here], part.lse[here])
        self._pack = kernel.packing(found, like.dtype, packed) if level.asked_by else None
        coming: list[Message] = []
        self._mine: list[Merge] = []  # by rank: of the rows that are mine in answers
        self._carried: list[Call] = []  # and of the others
        for peers in alike(level.asks, lambda peer: peer.which, kernel):
            peer, number = peers[0], len(peers)
            rows = new_rows(number * peer.count, spec, like.dtype, like)
            answers = rows.view(number, peer.count, rows.shape[1])
            coming += [(p.rank, answer) for p, answer in zip(peers, answers, strict=True)]
            rows, cut = answers if number > 1 else answers[0], peer.own.count
            if cut:
                mine = rows[..., :cut, :]
                self._mine.append(peer.own.merging(mine, like.dtype, spec, kernel))
            if peer.carried.count:
                others = rows[..., cut:, :]
                merge = peer.carried.merging(others, like.dtype, spec, kernel)
                self._carried.append(merge(part))
        self._back = group.prepare(_cut(packed, level.asked_by), coming, schemes[1])

    def ask(self, q_THD: torch.Tensor, arrived: torch.Tensor) -> Pending:
        """Send queries to whom I ask; those of who asks me come into ``arrived``."""
        for which, queries in self._queries.items():
            self._asked[which].copy(q_THD, arrived, queries)
        return self._ask.start()

    def answer(self, into: Partial) -> None:
        """Send who asks me what was found; merge what I am answered, by rank, into ``into`` and
        into what was found for those that I carry."""
        if self._pack is not None:
            self._pack()
        pending = self._back.start()
        merges = [merge(into) for merge in self._mine]
        pending.wait()
        for merge in (*merges, *self._carried):
            merge()


class _Layers(NamedTuple):
    """What all layers of one shape share: queries of others that arrive, what is found for them,
    the messages of both levels."""

    arrived: torch.Tensor
    part: Partial
    between: _Wires | None
    inside: _Wires


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
        self._shapes: dict[object, _Layers] = {}

    def __call__(
        self,
        q_THD: torch.Tensor,
        q_positions: torch.Tensor,
        pages: Pages,
        kernel: PagedKernel,
        spec: LayerSpec,
        into: Partial,
    ) -> None:
        """As in ``Mode``. What comes after a wait is made ready before it."""
        arrived, part, between, inside = self._layers_like(q_THD, spec, kernel)
        if between is not None:
            between.ask(q_THD, arrived).wait()
        pending = inside.ask(q_THD, arrived)
        if self._own is not None:
            pending.before_work()
            kernel.paged_attention(q_THD, q_positions, pages, self._own.batch(), spec, into)
        attend: Call | None = None
        if self._arriving:
            part.out.zero_()
            part.lse.fill_(NEG_INF)
        if self._asked is not None:
            at = self._upload[self._asked_at]
            attend = kernel.attending(arrived, at, pages, self._asked.batch(), spec, part)
        pending.wait()
        if attend is not None:
            attend()
        inside.answer(into)
        if between is not None:
            between.answer(into)

    def _layers_like(self, q_THD: torch.Tensor, spec: LayerSpec, kernel: PagedKernel) -> _Layers:
        dtype, heads = q_THD.dtype, spec.num_q_heads
        shape = kernel, heads, spec.head_dim, spec.v_dim, dtype
        found = self._shapes.get(shape)
        if found is None:
            arrived = q_THD.new_empty(self._arriving, heads, spec.head_dim)
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            part = empty_partial(self._arriving, heads, spec.v_dim, q_THD.device, wide)

            def wires(level: _Level) -> _Wires:
                return _Wires(level, self._group, self._schemes, q_THD, spec, arrived, part, kernel)

            between = None if self._between is None else wires(self._between)
            found = self._shapes[shape] = _Layers(arrived, part, between, wires(self._inside))
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
