"""Bytes on the wire, counted from the spans that occur, and the rates of a cost model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ds_cp.cost import CostModel
from ds_cp.layout import positions, total
from ds_cp.worker.state import Item

LAYERS, Q_HEADS, KV_HEADS, HEAD_DIM, ELEMENT, LSE = 30, 9, 3, 64, 4, 4


def rates(num_hosts: int) -> CostModel:
    """Fixed, of the order that a 2-core CPU rank measures at start; slower links between hosts."""
    bandwidth, latency = (2.5e9, 90e-6) if num_hosts == 1 else (1.25e9, 200e-6)
    return CostModel(
        flops_per_s=50e9, bytes_per_s=bandwidth, latency_s=latency, num_layers=LAYERS,
        num_q_heads=Q_HEADS, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM, weights=134_515_008,
        element=ELEMENT,
    )  # fmt: skip


class Wire:
    """What attention sends, over all ranks and layers, for the items of one step.

    Tree, of one query row with its owner and N - 1 other ranks that hold keys: (N-1) * H*D*e out
    and (N-1) * H*(D*e+4) back, per layer. Over several hosts each row goes once to each
    other host, to the rank there that carries it for the owner; a carrier without keys counts as
    one more receiver. Rounds: one out and one back, and the same again between hosts.
    Ring pass-KV over n ranks: (n-1) * 2*G*D*e for each token of S and of the room in the last
    block; pass-Q: (n-1) * T * H*D*e out, and
    T * H*(D*e+4) back from every other holder. KV whose home is not its owner: 2*G*D*e a token.
    """

    ROW_OUT = LAYERS * Q_HEADS * HEAD_DIM * ELEMENT
    ROW_BACK = LAYERS * Q_HEADS * (HEAD_DIM * ELEMENT + LSE)
    KV = LAYERS * 2 * KV_HEADS * HEAD_DIM * ELEMENT

    def __init__(self, hosts: str) -> None:
        self.hosts = hosts

    def tree_hops(self, owner: int, holders: Iterable[int]) -> tuple[int, int]:
        """(messages each way, those of them between hosts) of one row block."""
        hosts = self.hosts
        place = [r for r, host in enumerate(hosts) if host == hosts[owner]].index(owner)
        reached, crossing = set(holders) | {owner}, 0
        for host in {hosts[r] for r in reached} - {hosts[owner]}:
            there = [r for r, name in enumerate(hosts) if name == host]
            reached.add(there[place % len(there)])
            crossing += 1
        return len(reached) - 1, crossing

    def attention(self, items: Sequence[Item]) -> tuple[int, int]:
        """(bytes, bytes between hosts of tree items) of some items of one step."""
        sent = crossed = 0
        for item in items:
            owned = {s.rank: total(s.q_runs) for s in item.shards if total(s.q_runs)}
            held = self.holders(item)
            if item.mode == "tree":
                for owner, rows in owned.items():
                    hops, crossing = self.tree_hops(owner, self.seen(item, owner))
                    sent += rows * hops * (self.ROW_OUT + self.ROW_BACK)
                    crossed += rows * crossing * (self.ROW_OUT + self.ROW_BACK)
            elif item.mode == "ring":
                around = self._ring_size(item, items)
                if item.ring_pass == "kv":
                    sent += (around - 1) * self.whole_blocks(item) * self.KV
                else:
                    sent += (around - 1) * item.count * self.ROW_OUT
                    for owner, rows in owned.items():
                        sent += rows * len(held - {owner}) * self.ROW_BACK
        return sent, crossed

    @staticmethod
    def whole_blocks(item: Item) -> int:
        """Tokens of the blocks that travel: those stored, and the room in the last one."""
        table = item.sequence.table
        return len(table.homes) * table.block_size

    def _ring_size(self, item: Item, items: Sequence[Item]) -> int:
        """Items of one span share a ring, of all ranks that own or hold something of any."""
        span = [s.rank for s in item.shards]
        members: set[int] = set()
        for other in items:
            same = (other.mode, other.ring_pass) == (item.mode, item.ring_pass)
            if same and [s.rank for s in other.shards] == span:
                members |= self.holders(other) | {s.rank for s in other.shards if total(s.q_runs)}
        return len(members)

    @staticmethod
    def holders(item: Item) -> set[int]:
        """Ranks with keys of the item while attention runs: new KV has been shipped home."""
        return {s.rank for s in item.shards if s.blocks.num_keys}

    @staticmethod
    def seen(item: Item, owner: int) -> set[int]:
        """Holders of keys that the owner's queries see: not all are before these."""
        end = max((a + n for s in item.shards if s.rank == owner for a, n in s.q_runs), default=0)
        return {s.rank for s in item.shards if len(s.blocks) and s.blocks.firsts[0] < end}

    def shipped(self, item: Item) -> int:
        """Bytes of new KV that travels from its owner to its home."""
        if not item.ships:
            return 0
        stay = sum(len(set(positions(s.q_runs)) & set(positions(s.new_runs))) for s in item.shards)
        return (item.count - stay) * self.KV

    def rounds(self, items: Sequence[Item]) -> int:
        """Exchanges that the tree items of one step need one after the other, over all layers."""
        between = inside = False
        for item in items:
            for shard in item.shards:
                if item.mode == "tree" and total(shard.q_runs):
                    hops, crossing = self.tree_hops(shard.rank, self.seen(item, shard.rank))
                    between |= crossing > 0
                    inside |= hops > crossing
        return 2 * LAYERS * (between + inside)
