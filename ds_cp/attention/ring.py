"""Mode ``ring``: shards travel around the ranks, each rank folds the shard in hand.

pass-KV (Ring Attention, arXiv 2310.01889): whole blocks of keys and values travel, every rank folds
each shard into its own queries. The next hop is posted before the shard in hand is attended: NCCL
and gloo move it meanwhile. Through shared memory the computing thread copies by itself: ``post``
what the ring of the pair takes (``comm/shared_memory.py``), ``wait`` the rest, so there a hop costs
its copies and only the waiting for the peer is hidden. pass-Q (arXiv 2411.01783, algorithms 2 to
4): queries travel, every rank attends them over its own keys, and one all-to-all brings the
partials back to the owners. Shards differ in length and may be empty: all sizes come from what
every rank knows. Items of which a layer's window hides something go no round in it: each rank is
sent, or asks for, just what its queries see, in one exchange.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ds_cp.attention.asking import Asking
from ds_cp.attention.batch import BatchPlan, IndexUpload, Part, Shards
from ds_cp.attention.halo import Halo
from ds_cp.attention.kernels import Merge, PagedKernel
from ds_cp.attention.mode import Mode
from ds_cp.attention.pages import Pages
from ds_cp.attention.spec import LayerSpec
from ds_cp.attention.state import Partial
from ds_cp.attention.visible import Rows, alike, by_item, renumbered, visible
from ds_cp.attention.wireform import new_rows
from ds_cp.comm.ring import RingExchange
from ds_cp.comm.tree import TreeRoutes
from ds_cp.comm.wire import Group, Prepared
from ds_cp.layout import positions, total

# Names in the ledger.
SCHEME_KV = "ring_pass_kv"
SCHEME_Q = "ring_pass_q"
SCHEME_Q_BACK = "ring_pass_q_partials"


def ring_members(items: Sequence[Shards], group: Group) -> list[int]:
    """The ranks that own a query or hold a key of any item that has keys, in the group's ring
    order."""
    some = [item for item in items if any(item.blocks)]
    return [r for r in group.ring if any(item.q_runs[r] or item.blocks[r] for item in some)]


class RingPassKV:
    """One step's items, keys and values travelling; called once per layer.

    My rows of the items follow one another from ``first_row`` on in the step's queries;
    ``windows``: the distinct ones of the model's layers.
    """

    def __init__(
        self,
        items: Sequence[Shards],
        group: Group,
        first_row: int,
        windows: Sequence[int | None],
        upload: IndexUpload,
    ) -> None:
        def plan(some: Sequence[Shards], window: int | None) -> Mode:
            if window is None:
                return _BlocksRound(some, group, first_row, upload)
            return Halo(some, group, first_row, window, upload, SCHEME_KV)

        self._plans = by_item(windows, items, plan)

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
        for plan in self._plans[spec.window]:
            plan(q_THD, q_positions, pages, kernel, spec, into)


class RingPassQ:
    """One step's items, queries travelling; called once per layer. Arguments as in
    ``RingPassKV``."""

    def __init__(
        self,
        items: Sequence[Shards],
        group: Group,
        first_row: int,
        windows: Sequence[int | None],
        upload: IndexUpload,
    ) -> None:
        def plan(some: Sequence[Shards], window: int | None) -> Mode:
            if window is None:
                return _QueriesRound(some, group, first_row, upload)
            names = SCHEME_Q, SCHEME_Q_BACK
            return Asking(some, group, first_row, window, upload, TreeRoutes(), names)

        self._plans = by_item(windows, items, plan)

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
        for plan in self._plans[spec.window]:
            plan(q_THD, q_positions, pages, kernel, spec, into)


class _BlocksRound:
    """Every member's blocks pass every member. The next hop is under way before the shard in hand
    is attended; two buffers take turns, and my own shard is attended where it lies."""

    def __init__(
        self, items: Sequence[Shards], group: Group, first_row: int, upload: IndexUpload
    ) -> None:
        me = group.rank
        self._group = group
        self._members = ring_members(items, group)
        self._counts = [sum(len(item.blocks[r]) for item in items) for r in range(group.size)]
        self._going = Rows([n for item in items for n in item.blocks[me].numbers], upload)
        self._plans: dict[int, BatchPlan] = {}  # whose shard -> my rows over it
        self._buffers: dict[object, tuple[torch.Tensor, torch.Tensor]] = {}
        for origin in self._members if any(item.q_runs[me] for item in items) else ():
            if not self._counts[origin]:
                continue
            parts, at = [], 0
            for item in items:
                blocks = item.blocks[origin]
                if origin != me:  # as they lie in the shard that travels
                    blocks = renumbered(blocks, at)
                at += len(blocks)
                parts.append(Part(item.q_runs[me], visible(blocks, item.q_runs[me], None)))
            if any(part.blocks for part in parts):
                self._plans[origin] = BatchPlan(parts, first_row, upload)

    def __call__(
        self,
        q_THD: torch.Tensor,
        q_positions: torch.Tensor,
        pages: Pages,
        kernel: PagedKernel,
        spec: LayerSpec,
        into: Partial,
    ) -> None:
        if self._group.rank not in self._members:
            return
        ring = RingExchange(self._group, self._members, SCHEME_KV)
        held, spare = pages, pages.data
        if ring.size > 1:
            mine, spare = self._pair(pages)
            shard = mine[: self._counts[self._group.rank]]
            self._going.copy(pages.data[:, : pages.shape.elements], shard)
        for step in range(ring.size):
            last = step + 1 == ring.size
            if not last:
                after = self._counts[self._members[ring.origin(step + 1)]]
                ring.post(shard, spare[:after])
            plan = self._plans.get(self._members[ring.origin(step)])
            if plan is not None:
                kernel.paged_attention(q_THD, q_positions, held, plan.batch(), spec, into)
            if not last:
                mine, spare, shard = spare, mine, ring.wait()
                held = Pages(shard, pages.shape)

    def _pair(self, pages: Pages) -> tuple[torch.Tensor, torch.Tensor]:
        """Two buffers for the largest shard, one pair for all layers of a shape."""
        kind = pages.shape
        if kind not in self._buffers:
            most = max(self._counts[r] for r in self._members)
            both = pages.data.new_empty(2, most, pages.shape.elements)
            self._buffers[kind] = both[0], both[1]
        return self._buffers[kind]


class _Layers(NamedTuple):
    """What all layers of one shape share: two buffers for queries that pass, the rows on the wire
    for each origin, their exchange, and what merges those that come back."""

    spare: torch.Tensor
    packed: dict[int, torch.Tensor]
    back: Prepared
    merges: list[Merge]


class _QueriesRound:
    """Every member's queries visit every member; partials return to the owners in one exchange."""

    def __init__(
        self, items: Sequence[Shards], group: Group, first_row: int, upload: IndexUpload
    ) -> None:
        me = group.rank
        self._group = group
        self._upload = upload
        self._members = ring_members(items, group)
        # Queries of items without keys stay where they are.
        going = [item for item in items if any(item.blocks)]
        counts = [[total(item.q_runs[r]) for item in going] for r in range(group.size)]
        holds = [[bool(item.blocks[r]) for item in going] for r in range(group.size)]
        own = [total(item.q_runs[me]) for item in items]
        goes = [any(item.blocks) for item in items]
        self._counts = [sum(rows) for rows in counts]
        self._own = Rows(_rows_where(own, goes, first_row), upload)
        self._plans: dict[int, BatchPlan] = {}  # whose queries -> these over my blocks
        self._places: dict[int, slice] = {}
        self._answers: dict[int, Rows] = {}  # owner -> its rows that I can answer
        self._back: dict[int, Rows] = {}  # holder -> my rows that it answers
        self._held: dict[int, list[bool]] = {}  # and of which items these are
        self._shapes: dict[object, _Layers] = {}
        for peer in self._members:
            if self._counts[peer] and any(item.blocks[me] for item in going):
                asked, begin = (items, first_row) if peer == me else (going, 0)
                parts = [Part(item.q_runs[peer], item.blocks[me]) for item in asked]
                self._plans[peer] = BatchPlan(parts, begin, upload)
            if peer == me:
                continue
            places = [p for item in going for p in positions(item.q_runs[peer])]
            self._places[peer] = upload.add(places)
            self._answers[peer] = Rows(_rows_where(counts[peer], holds[me], 0), upload)
            held = self._held[peer] = [bool(item.blocks[peer]) for item in items]
            self._back[peer] = Rows(_rows_where(own, held, first_row), upload)

    def __call__(
        self,
        q_THD: torch.Tensor,
        q_positions: torch.Tensor,
        pages: Pages,
        kernel: PagedKernel,
        spec: LayerSpec,
        into: Partial,
    ) -> None:
        if self._group.rank not in self._members:
            return
        ring = RingExchange(self._group, self._members, SCHEME_Q)
        shard = self._own.of(q_THD) if ring.size > 1 else q_THD
        spare, packed, back, merges = self._layers_like(q_THD, spec, kernel)
        for step in range(ring.size):
            origin = self._members[ring.origin(step)]
            last = step + 1 == ring.size
            if not last:
                after = self._counts[self._members[ring.origin(step + 1)]]
                ring.post(shard, spare[step % 2][:after])
            plan = self._plans.get(origin)
            if plan is not None and step == 0:
                kernel.paged_attention(q_THD, q_positions, pages, plan.batch(), spec, into)
            elif plan is not None and origin in packed:
                at = self._upload[self._places[origin]]
                part = kernel.paged_attention(shard, at, pages, plan.batch(), spec)
                answers = self._answers[origin]
                part = Partial(answers.of(part.out), answers.of(part.lse))
                kernel.packing(part, q_THD.dtype, packed[origin])()
            if not last:
                shard = ring.wait()
        pending = back.start()
        ready = [merge(into) for merge in merges]
        pending.wait()
        for merge in ready:
            merge()

    def _layers_like(self, q_THD: torch.Tensor, spec: LayerSpec, kernel: PagedKernel) -> _Layers:
        dtype = q_THD.dtype
        shape = kernel, spec.num_q_heads, spec.head_dim, spec.v_dim, dtype
        found = self._shapes.get(shape)
        if found is None:
            most = max(self._counts[r] for r in self._members) if len(self._members) > 1 else 0
            spare = q_THD.new_empty(2, most, *q_THD.shape[1:])

            def rows(some: dict[int, Rows]) -> dict[int, torch.Tensor]:
                return {r: new_rows(x.count, spec, dtype, q_THD) for r, x in some.items()}

            packed = rows({r: x for r, x in self._answers.items() if r in self._plans and x.count})
            arriving, merges = [], []
            holders = [r for r, x in self._back.items() if x.count]
            for peers in alike(holders, lambda r: self._held[r], kernel):
                mine, number = self._back[peers[0]], len(peers)
                flat = new_rows(number * mine.count, spec, dtype, q_THD)
                answers = flat.view(number, mine.count, flat.shape[1])
                arriving += list(zip(peers, answers, strict=True))
                stack = answers if number > 1 else answers[0]
                merges.append(mine.merging(stack, dtype, spec, kernel))
            back = self._group.prepare(list(packed.items()), arriving, SCHEME_Q_BACK)
            found = self._shapes[shape] = _Layers(spare, packed, back, merges)
        return found


def _rows_where(counts: Sequence[int], holds: Sequence[bool], begin: int) -> list[int]:
    """Of rows that lie item by item from ``begin`` on, those of the items that are held."""
    rows: list[int] = []
    for count, held in zip(counts, holds, strict=True):
        if held:
            rows += range(begin, begin + count)
        begin += count
    return rows
