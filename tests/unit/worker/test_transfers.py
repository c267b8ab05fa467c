"""Blocks and host slots after random transfers: as if these were carried out one after the other,
on every rank, though batches travel together."""

from __future__ import annotations

import random
from typing import Any

import torch

from ds_cp.attention import LayerSpec
from ds_cp.comm.pending import Pending
from ds_cp.kv.host_store import FileStore
from ds_cp.kv.pool import KVPool
from ds_cp.layout import Home, host_place, on_host
from ds_cp.plan import StepPlan, Transfer
from ds_cp.worker.transfers import BlockMover

BLOCKS, SLOTS = 5, 4
SPEC = LayerSpec(2, 1, 8, 0.5)


class Wire:
    """What ranks send each other, in order: rank by rank, as a test that is one process runs them.
    A rank that has to wait for a later one gets its content when that has sent it."""

    def __init__(self) -> None:
        self.sent: dict[tuple[int, int], list[torch.Tensor]] = {}


class OneGroup:
    """A rank's view: it sends at once, and receives when it waits."""

    device = torch.device("cpu")

    def __init__(self, wire: Wire, rank: int) -> None:
        self.wire, self.rank = wire, rank

    def exchange(self, sends: Any, recvs: Any, scheme: str) -> Pending:
        for peer, content in sends:
            self.wire.sent.setdefault((self.rank, peer), []).append(content.clone())

        def arrive() -> None:
            for peer, buffer in recvs:
                buffer.copy_(self.wire.sent[peer, self.rank].pop(0))

        return Pending(arrive, scheme)


class Rank:
    def __init__(self, wire: Wire, rank: int, folder: str | None) -> None:
        self.pool = KVPool([SPEC], BLOCKS, 2, torch.float32, torch.device("cpu"))
        self.store = FileStore(self.pool, SLOTS, folder)
        self.mover = BlockMover(OneGroup(wire, rank), self.pool, self.store)  # type: ignore[arg-type]
        content = torch.arange(BLOCKS).float()[:, None] + 100 * rank
        self.pool.put_blocks(range(BLOCKS), content.expand(-1, self.pool.block_elements))
        self.store.save(range(SLOTS), range(SLOTS))

    def value(self, number: int) -> float:
        rows = self.pool.get_blocks([number]) if number >= 0 else self.store.read([-1 - number])
        assert (rows == rows[0, 0]).all(), "half a block"
        return float(rows[0, 0])


def draw_transfers(draw: random.Random, ranks: int) -> list[Transfer]:
    def place(rank: int, host: bool) -> Home:
        return host_place(rank, draw.randrange(SLOTS)) if host else (rank, draw.randrange(BLOCKS))

    found = []
    while len(found) < draw.randint(1, 12):
        source = place(draw.randrange(ranks), draw.random() < 0.4)
        to_host = not on_host(source) and draw.random() < 0.5
        target = place(source[0] if to_host else draw.randrange(ranks), to_host)
        if source != target:
            found.append(Transfer((), 0, source, target))
    return found


def one_after_the_other(transfers: list[Transfer], held: dict[Home, float]) -> None:
    for transfer in transfers:
        held[transfer.target] = held[transfer.source]


def test_one_rank() -> None:
    for seed in range(40):
        draw = random.Random(seed)
        rank = Rank(Wire(), 0, None)
        numbers = range(-SLOTS, BLOCKS)
        held = {(0, number): rank.value(number) for number in numbers}
        for _ in range(3):
            transfers = draw_transfers(draw, 1)
            rank.mover.move(StepPlan(1, transfers=tuple(transfers)))
            one_after_the_other(transfers, held)
            assert {(0, number): rank.value(number) for number in numbers} == held, seed
        rank.mover.close()


def test_a_block_comes_back_to_another_rank() -> None:
    """From a slot, and from a block, in one message."""
    wire = Wire()
    ranks = [Rank(wire, rank, None) for rank in (0, 1)]
    plan = StepPlan(1, transfers=(
        Transfer((), 0, (0, 1), (1, 0)),
        Transfer((7,), 0, host_place(0, 3), (1, 4)),
        Transfer((7,), 0, (0, 2), (1, 3)),
    ))  # fmt: skip
    for rank in ranks:
        rank.mover.move(plan)
    assert [ranks[1].value(n) for n in range(BLOCKS)] == [1.0, 101.0, 102.0, 2.0, 3.0]
    assert [ranks[0].value(n) for n in range(-SLOTS, BLOCKS)] == [3, 2, 1, 0, 0, 1, 2, 3, 4]
    assert not any(wire.sent.values())
    for rank in ranks:
        rank.mover.close()
