"""Mode ``ring``: shards travel around the ranks, each rank folds what passes by.

pass-KV (Ring Attention, arXiv 2310.01889): keys and values travel, every rank folds each shard into
its own queries; a hop hides under the attention of the shard in hand. pass-Q (arXiv 2411.01783,
algorithms 2 to 4): queries travel, every rank attends them over its own keys, and one all-to-all
brings the partials back to the owners. Shards differ in length and may be empty: all sizes come
from the spans, which every rank knows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ds_cp.attention.kernels import Kernel
from ds_cp.attention.spec import LayerSpec, Span
from ds_cp.attention.state import Partial, merge_all
from ds_cp.attention.wireform import pack_partial, row_bytes, unpack_partial
from ds_cp.comm.ring import RingExchange
from ds_cp.comm.wire import Group
from ds_cp.layout import total

SCHEME_KV = "ring_pass_kv"
SCHEME_Q = "ring_pass_q"
SCHEME_Q_BACK = "ring_pass_q_partials"


def ring_members(items: Sequence[Span], group: Group) -> list[int]:
    """The ranks that own a query or hold a key of any item, in the group's ring order."""
    return [
        r
        for r in group.ring
        if any(total(span.q_runs[r]) or total(span.k_runs[r]) for span in items)
    ]


class RingPassKV:
    """One step's items, keys and values travelling; called once per layer."""

    def __init__(self, items: Sequence[Span], group: Group) -> None:
        self._items = list(items)
        self._group = group
        self._members = ring_members(items, group)
        self._lengths = [[total(span.k_runs[r]) for span in items] for r in range(group.size)]

    def __call__(
        self,
        q: Sequence[torch.Tensor],
        k: Sequence[torch.Tensor],
        v: Sequence[torch.Tensor],
        kernel: Kernel,
        spec: LayerSpec,
    ) -> list[Partial]:
        """Per item ``q_THD``, ``k_SGD``, ``v_SGD`` of this rank -> its queries' partial over all
        keys."""
        me = self._group.rank
        if me not in self._members:
            return [kernel(q[i], k[i], v[i], (), (), spec) for i in range(len(self._items))]
        ring = RingExchange(self._group, self._members, SCHEME_KV)
        parts: list[list[Partial]] = [[] for _ in self._items]
        shard = self._pack(k, v, spec) if ring.size > 1 else None
        pairs = list(zip(k, v, strict=True))
        for step in range(ring.size):
            origin = self._members[ring.origin(step)]
            if shard is not None and step + 1 < ring.size:
                after = self._members[ring.origin(step + 1)]
                ring.post(shard, shard.new_empty(self._elements(after, spec)))
            for i, span in enumerate(self._items):
                if q[i].shape[0] and pairs[i][0].shape[0]:
                    runs = span.q_runs[me], span.k_runs[origin]
                    parts[i].append(kernel(q[i], *pairs[i], *runs, spec))
            if step + 1 < ring.size:
                shard = ring.wait()
                pairs = self._unpack(shard, self._members[ring.origin(step + 1)], spec)
        return [
            merge_all(found) if found else kernel(q[i], k[i][:0], v[i][:0], self._mine(i), (), spec)
            for i, found in enumerate(parts)
        ]

    def _mine(self, item: int) -> tuple[tuple[int, int], ...]:
        return self._items[item].q_runs[self._group.rank]

    def _elements(self, rank: int, spec: LayerSpec) -> int:
        return 2 * sum(self._lengths[rank]) * spec.num_kv_heads * spec.head_dim

    def _pack(
        self, k: Sequence[torch.Tensor], v: Sequence[torch.Tensor], spec: LayerSpec
    ) -> torch.Tensor:
        """Items one after the other, each as K then V, heads first: ``[2, G, S, D]`` flattened."""
        if not k:
            raise ValueError("a ring of no items")
        buffer = k[0].new_empty(self._elements(self._group.rank, spec))
        at = 0
        for pair in zip(k, v, strict=True):
            for x_SGD in pair:
                size = x_SGD.numel()
                heads_first = x_SGD.transpose(0, 1)
                buffer[at : at + size].view(heads_first.shape).copy_(heads_first)
                at += size
        return buffer

    def _unpack(
        self, shard: torch.Tensor, rank: int, spec: LayerSpec
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        pairs = []
        at = 0
        for length in self._lengths[rank]:
            shape = (2, spec.num_kv_heads, length, spec.head_dim)
            size = 2 * spec.num_kv_heads * length * spec.head_dim
            both = shard[at : at + size].view(shape).transpose(1, 2)
            pairs.append((both[0], both[1]))
            at += size
        return pairs


class RingPassQ:
    """One step's items, queries travelling; called once per layer."""

    def __init__(self, items: Sequence[Span], group: Group) -> None:
        self._items = list(items)
        self._group = group
        self._members = ring_members(items, group)
        self._lengths = [[total(span.q_runs[r]) for span in items] for r in range(group.size)]
        self._holds = [[bool(total(span.k_runs[r])) for span in items] for r in range(group.size)]

    def __call__(
        self,
        q: Sequence[torch.Tensor],
        k: Sequence[torch.Tensor],
        v: Sequence[torch.Tensor],
        kernel: Kernel,
        spec: LayerSpec,
    ) -> list[Partial]:
        """Per item ``q_THD``, ``k_SGD``, ``v_SGD`` of this rank -> its queries' partial over all
        keys."""
        me = self._group.rank
        if me not in self._members:
            return [kernel(q[i], k[i], v[i], (), (), spec) for i in range(len(self._items))]
        ring = RingExchange(self._group, self._members, SCHEME_Q)
        shard = torch.cat([x.flatten(1).flatten() for x in q]) if ring.size > 1 else None
        queries = list(q)
        visits: dict[int, list[Partial]] = {}  # whose queries -> my partial per item
        for step in range(ring.size):
            origin = self._members[ring.origin(step)]
            if shard is not None and step + 1 < ring.size:
                after = self._members[ring.origin(step + 1)]
                ring.post(shard, shard.new_empty(self._elements(after, spec)))
            visits[origin] = [
                kernel(queries[i], k[i], v[i], span.q_runs[origin], span.k_runs[me], spec)
                for i, span in enumerate(self._items)
            ]
            if step + 1 < ring.size:
                shard = ring.wait()
                queries = self._unpack(shard, self._members[ring.origin(step + 1)], spec)
        return self._bring_back(visits, q, spec)

    def _elements(self, rank: int, spec: LayerSpec) -> int:
        return sum(self._lengths[rank]) * spec.num_q_heads * spec.head_dim

    def _unpack(self, shard: torch.Tensor, rank: int, spec: LayerSpec) -> list[torch.Tensor]:
        rows = shard.view(-1, spec.num_q_heads, spec.head_dim)
        return list(rows.split(self._lengths[rank]))

    def _bring_back(
        self, visits: dict[int, list[Partial]], q: Sequence[torch.Tensor], spec: LayerSpec
    ) -> list[Partial]:
        """The all-to-all: partials go to the queries' owners, which fold them in ring order."""
        me, dtype = self._group.rank, q[0].dtype
        sends, recvs = [], []
        for peer in self._members:
            if peer == me:
                continue
            theirs = [
                pack_partial(part, dtype)
                for i, part in enumerate(visits[peer])
                if self._holds[me][i] and self._lengths[peer][i]
            ]
            if theirs:
                sends.append((peer, torch.cat(theirs)))
            rows = sum(n for i, n in enumerate(self._lengths[me]) if self._holds[peer][i])
            if rows:
                shape = (rows, row_bytes(spec, dtype))
                recvs.append((peer, torch.empty(shape, dtype=torch.uint8, device=q[0].device)))
        self._group.exchange(sends, recvs, SCHEME_Q_BACK).wait()
        arrived = {
            peer: iter(
                rows.split([n for i, n in enumerate(self._lengths[me]) if self._holds[peer][i]])
            )
            for peer, rows in recvs
        }
        merged = []
        for i in range(len(self._items)):
            parts = []
            for peer in self._members:
                if peer == me:
                    if self._holds[me][i]:
                        parts.append(visits[me][i])
                elif self._holds[peer][i] and peer in arrived:
                    parts.append(unpack_partial(next(arrived[peer]), spec, dtype))
            merged.append(merge_all(parts) if parts else visits[me][i])
        return merged
