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
        self.store = store

    def move(self, plan: StepPlan) -> None:
        """Carry out the transfers of a plan. What comes back from the host for a request that does
        not compute in this step may arrive while it runs."""
        if self.store is not None:
            self.store.settle()
        if not plan.transfers:
            return
        computing = {chunk.request for chunk in plan.chunks}
        for batch in _batches(plan.transfers):
            self._move(batch, computing)

    @property
    def num_slots(self) -> int:
        """Blocks that the rank's host memory holds."""
        return self.store.num_slots if self.store is not None else 0

    @property
    def num_failed(self) -> int:
        """Blocks that could not be copied to host memory or back, since this process began."""
        return self.store.num_failed if self.store is not None else 0

    def enter(self, group: Group) -> None:
        """Go on among other ranks; blocks and slots stay."""
        self._group = group

    def close(self) -> None:
        """Give host memory back."""
        if self.store is not None:
            self.store.close()

    def _move(self, batch: Sequence[Transfer], computing: set[int]) -> None:
        me, pool = self._group.rank, self._pool
        local: list[tuple[int, int]] = []
        host: dict[tuple[bool, bool], list[tuple[int, int]]] = {}  # (to it, for later) -> copies
        out: dict[int, list[int]] = {}  # target rank -> what I send
        into: dict[int, list[int]] = {}  # source rank -> where it goes
        for transfer in batch:
            (source, number), (target, to) = transfer.source, transfer.target
            if source == target == me:
                if on_host(transfer.source) or on_host(transfer.target):
                    kind = on_host(transfer.target), computing.isdisjoint(transfer.requests)
                    host.setdefault(kind, []).append((number, to))
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
        for kind, copies in host.items():
            self._host(copies, *kind)
        if local:
            pool.put_blocks([to for _, to in local], pool.get_blocks([b for b, _ in local]))
        if pending is not None:
            pending.wait()
        for rank, content in recvs:
            pool.put_blocks(into[rank], content)

    def _host(self, copies: Sequence[tuple[int, int]], to_host: bool, later: bool) -> None:
        """Copies from my blocks to my slots, or back."""
        assert self.store is not None, "a host place without host memory"
        sources, targets = [source for source, _ in copies], [target for _, target in copies]
        if to_host:
            self.store.save(sources, list(map(host_slot, targets)))
        else:
            self.store.load(list(map(host_slot, sources)), targets, later)

    def _content(self, numbers: Sequence[int]) -> torch.Tensor:
        """My blocks and slots of these numbers, in their order."""
        if min(numbers) >= 0:
            return self._pool.get_blocks(numbers)
        assert self.store is not None, "a host place without host memory"
        if max(numbers) < 0:
            return self.store.read(list(map(host_slot, numbers)))
        return torch.cat([self._content([number]) for number in numbers])


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
