"""KV that moves from block to block, on a rank or between ranks, before a step computes."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ds_cp.comm.wire import Group
from ds_cp.kv.pool import KVPool
from ds_cp.plan import Transfer

SCHEME_MOVE = "move_kv"  # name in the ledger


def move_blocks(transfers: Sequence[Transfer], group: Group, pool: KVPool) -> None:
    """Copy blocks, here or between ranks. All sources of a batch are read before any target is
    written; a block that was written is read, or written again, in a later batch."""
    batch: list[Transfer] = []
    written: set[tuple[int, int]] = set()
    for transfer in transfers:
        if transfer.source in written or transfer.target in written:
            _move_batch(batch, group, pool)
            batch, written = [], set()
        batch.append(transfer)
        written.add(transfer.target)
    if batch:
        _move_batch(batch, group, pool)


def _move_batch(batch: Sequence[Transfer], group: Group, pool: KVPool) -> None:
    me = group.rank
    pairs: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for transfer in batch:
        (source, from_block), (target, to_block) = transfer.source, transfer.target
        if me in (source, target):
            pairs.setdefault((source, target), []).append((from_block, to_block))
    content = {
        pair: pool.get_blocks([b for b, _ in blocks])
        for pair, blocks in sorted(pairs.items())
        if pair[0] == me
    }
    sends = [(target, data) for (_, target), data in content.items() if target != me]
    elements = pool.block_elements
    recvs = [
        (source, torch.empty(len(blocks), elements, dtype=pool.dtype, device=group.device))
        for (source, target), blocks in sorted(pairs.items())
        if target == me and source != me
    ]
    if sends or recvs:
        group.exchange(sends, recvs, SCHEME_MOVE).wait()
    content.update({(source, me): data for source, data in recvs})
    for (source, target), data in content.items():
        if target == me:
            pool.put_blocks([b for _, b in pairs[source, target]], data)
