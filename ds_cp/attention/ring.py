"""Mode ``ring``: shards travel around the ranks, each rank folds the shard in hand.

pass-KV (Ring Attention, arXiv 2310.01889): keys and values travel, every rank folds each shard into
its own queries; a hop hides under the attention of the shard in hand. pass-Q (arXiv 2411.01783,
algorithms 2 to 4): queries travel, every rank attends them over its own keys, and one all-to-all
brings the partials back to the owners. Shards differ in length and may be empty: all sizes come
from the spans, which every rank knows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ds_cp.attention.fold import attend
from ds_cp.attention.kernels import Kernel
from ds_cp.attention.spec import KeyValues, LayerSpec, Span
from ds_cp.attention.state import Partial, merge_all
from ds_cp.attention.wireform import pack_partial, row_bytes, unpack_partial
from ds_cp.comm.ring import RingExchange
from ds_cp.comm.wire import Group
from ds_cp.layout import total

# Names in the ledger.
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
        kv: Sequence[KeyValues],
        kernel: Kernel,
        spec: LayerSpec,
    ) -> list[Partial]:
        """Per item this rank's ``q_THD`` and keys and values -> the partial over all keys."""
        me = self._group.rank
        if me not in self._members:
            return [
                attend(kernel, q[i], kv[i].none(), (), (), spec) for i in range(len(self._items))
            ]
        ring = RingExchange(self._group, self._members, SCHEME_KV)
        parts: list[list[Partial]] = [[] for _ in self._items]
        shard = self._pack(kv, spec) if ring.size > 1 else None
        held = list(kv)
        for step in range(ring.size):
            origin = self._members[ring.origin(step)]
            if shard is not None and step + 1 < ring.size:
                after = self._members[ring.origin(step + 1)]
                ring.post(shard, shard.new_empty(self._elements(after, spec)))
            for i, span in enumerate(self._items):
                if q[i].shape[0] and held[i].num_tokens:
                    runs = span.q_runs[me], span.k_runs[origin]
                    parts[i].append(attend(kernel, q[i], held[i], *runs, spec))
            if step + 1 < ring.size:
                shard = ring.wait()
                held = self._unpack(shard, self._members[ring.origin(step + 1)], spec)
        return [
            merge_all(found)
            if found
            else attend(kernel, q[i], kv[i].none(), self._mine(i), (), spec)
            for i, found in enumerate(parts)
        ]

    def _mine(self, item: int) -> tuple[tuple[int, int], ...]:
        return self._items[item].q_runs[self._group.rank]

    def _elements(self, rank: int, spec: LayerSpec) -> int:
        return 2 * sum(self._lengths[rank]) * spec.num_kv_heads * spec.head_dim

    def _pack(self, kv: Sequence[KeyValues], spec: LayerSpec) -> torch.Tensor:
        """Items one after the other, each as ``[2, G, S, D]`` (K, then V) flattened."""
        buffer = kv[0].pieces[0][0].new_empty(self._elements(self._group.rank, spec))
        at = 0
        for item in kv:
            shape = (2, spec.num_kv_heads, item.num_tokens, spec.head_dim)
            both = buffer[at : at + math.prod(shape)].view(shape)
            begin = 0
            for k_SGD, v_SGD in item.pieces:
                end = begin + k_SGD.shape[0]
                both[0, :, begin:end] = k_SGD.transpose(0, 1)
                both[1, :, begin:end] = v_SGD.transpose(0, 1)
                begin = end
            at += math.prod(shape)
        return buffer

    def _unpack(self, shard: torch.Tensor, rank: int, spec: LayerSpec) -> list[KeyValues]:
        items = []
        at = 0
        for length in self._lengths[rank]:
            shape = (2, spec.num_kv_heads, length, spec.head_dim)
            both = shard[at : at + math.prod(shape)].view(shape).transpose(1, 2)
            items.append(KeyValues(((both[0], both[1]),)))
            at += math.prod(shape)
        return items


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
        kv: Sequence[KeyValues],
        kernel: Kernel,
        spec: LayerSpec,
    ) -> list[Partial]:
        """Per item this rank's ``q_THD`` and keys and values -> the partial over all keys."""
        me = self._group.rank
        if me not in self._members:
            return [
                attend(kernel, q[i], kv[i].none(), (), (), spec) for i in range(len(self._items))
            ]
        ring = RingExchange(self._group, self._members, SCHEME_Q)
        shard = torch.cat([x.flatten(1).flatten() for x in q]) if ring.size > 1 else None
        queries = list(q)
        visits: dict[int, list[Partial]] = {}  # owner of the queries -> my partial per item
        for step in range(ring.size):
            origin = self._members[ring.origin(step)]
            if shard is not None and step + 1 < ring.size:
                after = self._members[ring.origin(step + 1)]
                ring.post(shard, shard.new_empty(self._elements(after, spec)))
            visits[origin] = [
                attend(kernel, queries[i], kv[i], span.q_runs[origin], span.k_runs[me], spec)
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
        return list(torch.split(rows, self._lengths[rank]))

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
                torch.split(
                    rows, [n for i, n in enumerate(self._lengths[me]) if self._holds[peer][i]]
                )
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
