"""KV that moves from block to block, on a rank or between ranks, or to host memory and back, before
a step computes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch

from ds_cp.comm.wire import Group
from ds_cp.kv.host_store import HostStore
from ds_cp.kv.pool import KVPool
from ds_cp.layout import Home, host_slot, on_host
from ds_cp.plan import StepPlan, Transfer

SCHEME_MOVE = "move_kv"  # name in the ledger


class BlockMover:
    """One rank's part in the transfers of plans. ``store``: the rank's host slots, None without."""

    def __init__(self, group: Group, pool: KVPool, store: HostStore | None) -> None:
        self._group = group
        self._pool = pool
        self._store = store

    def move(self, plan: StepPlan) -> None:
        """Carry out the transfers of a plan. What comes back from the host for a request that does
        not compute in this step may arrive while it runs."""
        if self._store is not None:
            self._store.settle()
        computing = {chunk.request for chunk in plan.chunks}
        for batch in _batches(plan.transfers):
            self._move(batch, computing)

    def close(self) -> None:
        """Give host memory back."""
        if self._store is not None:
            self._store.close()

    def _move(self, batch: Sequence[Transfer], computing: set[int]) -> None:
        me, pool = self._group.rank, self._pool
        local: list[tuple[int, int]] = []
        out: dict[int, list[int]] = {}  # target rank -> what I send
        into: dict[int, list[int]] = {}  # source rank -> where it goes
        for transfer in batch:
            (source, number), (target, to) = transfer.source, transfer.target
            if source == target == me:
                if on_host(transfer.source) or on_host(transfer.target):
                    self._host(number, to, computing.isdisjoint(transfer.requests))
                else:
                    local.append((number, to))
            elif source == me:
                out.setdefault(target, []).append(number)
            elif target == me:
                into.setdefault(source, []).append(to)
        sends = [(rank, self._content(numbers)) for rank, numbers in sorted(out.items())]
        elements = pool.block_elements
        recvs = [
            (rank, torch.empty(len(blocks), elements, dtype=pool.dtype, device=self._group.device))
            for rank, blocks in sorted(into.items())
        ]
        pending = self._group.exchange(sends, recvs, SCHEME_MOVE) if sends or recvs else None
        if local:
            pool.put_blocks([to for _, to in local], pool.get_blocks([b for b, _ in local]))
        if pending is not None:
            pending.wait()
        for rank, content in recvs:
            pool.put_blocks(into[rank], content)

    def _host(self, source: int, target: int, later: bool) -> None:
        """One copy between my blocks and my slots."""
        assert self._store is not None, "a host place without host memory"
        if target < 0:
            self._store.save([source], [host_slot(target)])
        else:
            self._store.load([host_slot(source)], [target], later)

    def _content(self, numbers: Sequence[int]) -> torch.Tensor:
        """My blocks and slots of these numbers, in their order."""
        if min(numbers) >= 0:
            return self._pool.get_blocks(numbers)
        rows = [
            self._pool.get_blocks([number]) if number >= 0 else self._read(host_slot(number))
            for number in numbers
        ]
        return torch.cat(rows)

    def _read(self, slot: int) -> torch.Tensor:
        assert self._store is not None, "a host place without host memory"
        return self._store.read([slot])


def _batches(transfers: Iterable[Transfer]) -> Iterator[list[Transfer]]:
    """The transfers in order, cut so that within a batch no place is written that another reads or
    writes: the copies of a batch can be made in any order. The same cuts on every rank."""
    batch: list[Transfer] = []
    read: set[Home] = set()
    written: set[Home] = set()
    for transfer in transfers:
        source, target = transfer.source, transfer.target
        if source in written or target in written or target in read:
            yield batch
            batch, read, written = [], set(), set()
        batch.append(transfer)
        read.add(source)
        written.add(target)
    if batch:
        yield batch
