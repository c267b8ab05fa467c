"""Mode ``tree``: queries are shared, keys stay where they are, partials fold up to the owners.

After "Tree Attention" (arXiv 2408.04093): the merge of partials is associative, so it may follow
the machine. Here it goes straight to the owner of each query, inside each host first and once
between hosts: one exchange to share the queries and one to bring partials back on one host, two
each over several. Nothing is reduced to ranks that do not need it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ds_cp.attention.fold import attend
from ds_cp.attention.kernels import Kernel
from ds_cp.attention.spec import KeyValues, LayerSpec, Span
from ds_cp.attention.state import Partial, merge_all
from ds_cp.attention.wireform import pack_partial, row_bytes, unpack_partial
from ds_cp.comm.tree import Key, TreeExchange
from ds_cp.comm.wire import Group
from ds_cp.layout import Runs, total

# Names in the ledger.
SCHEME_Q = "tree_q"
SCHEME_PARTIALS = "tree_partials"


class TreeAttention:
    """One step's items; called once per layer."""

    def __init__(self, items: Sequence[Span], group: Group) -> None:
        self._items = list(items)
        self._group = group
        rows = [[total(runs) for runs in span.q_runs] for span in items]
        holds = [[bool(total(runs)) for runs in span.k_runs] for span in items]
        self._tree = TreeExchange(group, rows, holds)
        self._blocks = [[key for key in self._tree.held if key[0] == i] for i in range(len(items))]
        self._runs: list[Runs] = [
            tuple(run for _, owner in keys for run in items[i].q_runs[owner])
            for i, keys in enumerate(self._blocks)
        ]
        self._counts = [
            [rows[i][owner] for _, owner in keys] for i, keys in enumerate(self._blocks)
        ]

    def __call__(
        self,
        q: Sequence[torch.Tensor],
        kv: Sequence[KeyValues],
        kernel: Kernel,
        spec: LayerSpec,
    ) -> list[Partial]:
        """Per item this rank's ``q_THD`` and keys and values -> the partial over all keys."""
        me, dtype = self._group.rank, q[0].dtype
        mine = {(i, me): x.flatten(1) for i, x in enumerate(q) if x.shape[0]}
        no_row = q[0].new_empty(0, spec.num_q_heads * spec.head_dim)
        shared = self._tree.share(mine, no_row, SCHEME_Q)
        found: dict[Key, list[tuple[int, Partial]]] = {}
        for i, keys in enumerate(self._blocks):
            if keys:
                self._attend(i, [shared[key] for key in keys], kv[i], kernel, spec, found)
        for level in range(self._tree.levels_up()):
            self._fold_up(level, found, dtype, spec)
        out = []
        for i, x in enumerate(q):
            parts = found.get((i, me))
            out.append(
                merge_all(part for _, part in parts)
                if parts
                else attend(kernel, x, kv[i].none(), self._items[i].q_runs[me], (), spec)
            )
        return out

    def _attend(
        self,
        item: int,
        blocks: list[torch.Tensor],
        kv: KeyValues,
        kernel: Kernel,
        spec: LayerSpec,
        found: dict[Key, list[tuple[int, Partial]]],
    ) -> None:
        """One kernel call for all shared queries of an item over the keys held here."""
        me = self._group.rank
        rows = blocks[0] if len(blocks) == 1 else torch.cat(blocks)
        queries = rows.view(-1, spec.num_q_heads, spec.head_dim)
        k_runs = self._items[item].k_runs[me]
        part = attend(kernel, queries, kv, self._runs[item], k_runs, spec)
        counts = self._counts[item]
        outs, lses = torch.split(part.out, counts), torch.split(part.lse, counts)
        for key, out, lse in zip(self._blocks[item], outs, lses, strict=True):
            found[key] = [(me, Partial(out, lse))]

    def _fold_up(
        self,
        level: int,
        found: dict[Key, list[tuple[int, Partial]]],
        dtype: torch.dtype,
        spec: LayerSpec,
    ) -> None:
        """Merge what is here (by rank order), send it one level up, add what arrived."""
        answers = {key: pack_partial(self._merged(parts), dtype) for key, parts in found.items()
                   if key[1] != self._group.rank}  # fmt: skip
        some = next(iter(found.values()))[0][1].out if found else None
        device = self._group.device if some is None else some.device
        no_row = torch.empty(0, row_bytes(spec, dtype), dtype=torch.uint8, device=device)
        arrived = self._tree.answer(level, answers, no_row, SCHEME_PARTIALS)
        for key, parts in arrived.items():
            theirs = [(peer, unpack_partial(rows, spec, dtype)) for peer, rows in parts]
            found[key] = sorted(found.get(key, []) + theirs, key=lambda part: part[0])

    @staticmethod
    def _merged(parts: list[tuple[int, Partial]]) -> Partial:
        return merge_all(part for _, part in parts)
