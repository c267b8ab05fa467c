"""New tokens whose home is not their owner: their keys and values travel there once."""

from __future__ import annotations

import torch

from ds_cp.attention import PagedKernel, Pages
from ds_cp.attention.batch import IndexUpload
from ds_cp.comm.wire import Group
from ds_cp.layout import Runs, overlap, positions
from ds_cp.worker.state import Item

SCHEME_SHIP = "ship_kv"  # name in the ledger
EMPTY: Runs = ()  # no position


class Shipment:
    """One item of a step, one message per pair of ranks and layer. ``begin``: my first row of the
    item in the flat batch. Index vectors go into ``upload``."""

    def __init__(
        self, item: Item, begin: int, group: Group, block_size: int, upload: IndexUpload
    ) -> None:
        self._group, self._upload = group, upload
        me, table = group.rank, item.sequence.table
        mine = item.shard(me)
        owned = mine.q_runs if mine else EMPTY
        homes = mine.new_runs if mine else EMPTY
        row_of = {p: begin + i for i, p in enumerate(positions(owned))}

        def rows(runs: Runs) -> slice:
            return upload.add(row_of[p] for p in positions(runs))

        def places(runs: Runs) -> tuple[slice, slice]:
            slots = [table.slot(p)[1] for p in positions(runs)]
            return (
                upload.add(slot // block_size for slot in slots),
                upload.add(slot % block_size for slot in slots),
            )

        self._out: list[tuple[int, slice]] = []  # peer, my rows
        self._in: list[tuple[int, tuple[slice, slice]]] = []  # peer, my blocks and places
        self._stay: list[tuple[slice, tuple[slice, slice]]] = []  # my rows, my blocks and places
        for shard in item.shards:
            going, coming = overlap(owned, shard.new_runs), overlap(shard.q_runs, homes)
            if shard.rank == me:
                if going:
                    self._stay.append((rows(going), places(going)))
                continue
            if going:
                self._out.append((shard.rank, rows(going)))
            if coming:
                self._in.append((shard.rank, places(coming)))

    def run(
        self, k_TGD: torch.Tensor, v_TGD: torch.Tensor, pages: Pages, kernel: PagedKernel
    ) -> None:
        """Send, store what stays, then store what arrives. ``k_TGD``, ``v_TGD``: of all my rows."""
        upload, shape = self._upload, pages.shape
        cut = shape.num_kv_heads * shape.k_dim
        width = cut + shape.num_kv_heads * shape.v_dim
        sends = [
            (peer, torch.cat([k_TGD[upload[at]].flatten(1), v_TGD[upload[at]].flatten(1)], dim=1))
            for peer, at in self._out
        ]
        recvs = [
            (peer, k_TGD.new_empty(blocks.stop - blocks.start, width))
            for peer, (blocks, _) in self._in
        ]
        pending = self._group.exchange(sends, recvs, SCHEME_SHIP)
        for at, (blocks, places) in self._stay:
            rows = upload[at]
            kernel.write(pages, k_TGD[rows], v_TGD[rows], upload[blocks], upload[places])
        pending.wait()
        for (_, (blocks, places)), (_, both) in zip(self._in, recvs, strict=True):
            k = both[:, :cut].view(len(both), shape.num_kv_heads, shape.k_dim)
            v = both[:, cut:].view(len(both), shape.num_kv_heads, shape.v_dim)
            kernel.write(pages, k, v, upload[blocks], upload[places])
