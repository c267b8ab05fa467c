"""Which ranks take a request's next tokens. Integers only; the policies are interchangeable.

``room[r]``, what the request can still store on rank r, is the rest of the blocks it holds there
plus every free block of the rank. Every policy places as long as the room of all ranks together is
enough, so a request alone in the cluster reaches the sum of all ranks' capacity whatever the
policy.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class _Ask:
    """The arguments of :func:`place`, checked, with the ring order turned to begin at ``first``.

    ``first`` is the rank of the request's newest token; for a new request the one with most room.
    """

    tokens: int
    open_slots: Sequence[int]
    free_blocks: Sequence[int]
    block_size: int
    new: bool
    room: Sequence[int]
    ring: Sequence[int]

    @property
    def first(self) -> int:
        return self.ring[0]


def place(
    policy: str,
    tokens: int,
    *,
    open_slots: Sequence[int],
    free_blocks: Sequence[int],
    block_size: int,
    last_rank: int,
    order: Sequence[int],
) -> tuple[int, ...] | None:
    """How many of ``tokens`` go to each rank, or None when all ranks together have too little room.

    ``open_slots[r]``: unused slots (tokens) in blocks that the request holds on rank r.
    ``free_blocks[r]``: free blocks of rank r. ``order``: all ranks in ring order, nearest next.
    ``last_rank``: the rank of the request's newest token, -1 for a new request, which starts on the
    rank with most room (the first in ``order`` of equals). A rank that is given n tokens needs
    ``ceil((n - open_slots[r]) / block_size)`` new blocks. Raises ValueError for an unknown policy
    or arguments that do not fit together.
    """
    if policy not in POLICIES:
        raise ValueError(f"unknown placement {policy!r}; known: {', '.join(POLICIES)}")
    ranks = len(free_blocks)
    if len(open_slots) != ranks or len(order) != ranks or set(order) != set(range(ranks)):
        raise ValueError(
            f"{len(open_slots)} open_slots, {ranks} free_blocks and order {list(order)} "
            "must name the same ranks"
        )
    if tokens < 0 or block_size < 1 or not -1 <= last_rank < ranks:
        raise ValueError(f"bad numbers: {tokens=}, {block_size=}, {last_rank=} of {ranks} ranks")
    if any(n < 0 for n in (*open_slots, *free_blocks)):
        raise ValueError(f"negative open_slots {list(open_slots)} or blocks {list(free_blocks)}")
    room = [slots + n * block_size for slots, n in zip(open_slots, free_blocks, strict=True)]
    if tokens > sum(room):
        return None
    if tokens == 0:
        return (0,) * ranks
    new = last_rank < 0
    first = max(order, key=room.__getitem__) if new else last_rank
    turn = list(order).index(first)
    ring = [*order[turn:], *order[:turn]]
    ask = _Ask(tokens, open_slots, free_blocks, block_size, new, room, ring)
    return tuple(POLICIES[policy](ask))


def place_block(
    policy: str, free_blocks: Sequence[int], last_rank: int, order: Sequence[int]
) -> int | None:
    """The rank that ``place`` gives one more block to, when nothing is open: the fast path for
    decoding requests. None when no rank has a free one."""
    first = last_rank if last_rank >= 0 else max(order, key=free_blocks.__getitem__)
    turn = order.index(first)
    ring = [rank for rank in (*order[turn:], *order[:turn]) if free_blocks[rank]]
    if not ring:
        return None
    if policy == "balanced":
        return max(ring, key=free_blocks.__getitem__)  # the first in the ring of equals
    if policy == "round_robin" and ring[0] == last_rank:
        return ring[1 % len(ring)]  # its last block is full, so this turn is the next rank's
    return ring[0]


def _fill_then_spill(ask: _Ask) -> list[int]:
    """Everything the first rank has room for, then the next in the ring.

    A new request starts where most room is, so it stays whole if any rank can hold it whole.
    """
    return _pour(ask.tokens, ask.room, ask.ring)


def _round_robin(ask: _Ask) -> list[int]:
    """One block a turn, cyclically, full ranks skipped; what is open on a rank counts as a turn."""
    counts = [0] * len(ask.room)
    left = ask.tokens
    turns = deque(r for r in ask.ring if ask.room[r])
    if not ask.new and ask.first in turns and not ask.open_slots[ask.first]:
        turns.rotate(-1)  # its last block is full, so this turn is the next rank's
    while left:
        rank = turns.popleft()
        begun = max(0, ask.open_slots[rank] - counts[rank])
        taken = min(left, begun or ask.block_size)
        counts[rank] += taken
        left -= taken
        if counts[rank] < ask.room[rank]:
            turns.append(rank)
    return counts


def _balanced(ask: _Ask) -> list[int]:
    """Open slots first (no other request can use them), then blocks so that free ones end level.

    Free blocks differ by one at most after placement between the ranks that gave any. Among equals
    the first in the ring gives first.
    """
    in_open = min(ask.tokens, sum(ask.open_slots))
    counts = _pour(in_open, ask.open_slots, ask.ring)
    left = ask.tokens - in_open
    if not left:
        return counts
    needed = -(-left // ask.block_size)
    level = _water_level(ask.free_blocks, needed)
    blocks = [max(0, free - level - 1) for free in ask.free_blocks]
    highest = [r for r in ask.ring if ask.free_blocks[r] > level]
    last_round = highest[: needed - sum(blocks)]
    for rank in last_round:
        blocks[rank] += 1
    for rank, n in enumerate(blocks):
        counts[rank] += n * ask.block_size
    counts[last_round[-1]] -= needed * ask.block_size - left  # the block that is not full
    return counts


def _pour(tokens: int, room: Sequence[int], ring: Sequence[int]) -> list[int]:
    counts = [0] * len(room)
    for rank in ring:
        counts[rank] = min(tokens, room[rank])
        tokens -= counts[rank]
    return counts


def _water_level(free: Sequence[int], needed: int) -> int:
    """The largest level with at least ``needed`` (>= 1) free blocks above it, over all ranks."""
    above = free
    while True:
        level = (sum(above) - needed) // len(above)
        higher = [n for n in above if n > level]
        if len(higher) == len(above):
            return level
        above = higher


POLICIES: Mapping[str, Callable[[_Ask], list[int]]] = MappingProxyType(
    {
        "fill_then_spill": _fill_then_spill,
        "round_robin": _round_robin,
        "balanced": _balanced,
    }
)
