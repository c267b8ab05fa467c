"""One way to start a request, and the arithmetic of room by which ways are found. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ds_cp.layout import Home, on_host
from ds_cp.scheduler.reasons import SpanReason


@dataclass(frozen=True)
class Offer:
    """One way to start a request now. ``found``: cached blocks that hold its first tokens, or the
    places where they are on the host; ``new``: blocks to allocate per rank; ``workers``: the ranks
    that compute; ``copy_to``: the rank to which found blocks of other ranks are copied, -1 to share
    them where they are; ``why``: on them."""

    found: list[Home]
    new: Sequence[int]
    workers: tuple[int, ...]
    copy_to: int = -1
    why: SpanReason = SpanReason.NO_ROOM


def on_device(homes: Sequence[Home]) -> int:
    """How many of ``homes`` are blocks, not places on the host."""
    return len(homes) - sum(map(on_host, homes))


def only(rank: int, blocks: int, num_ranks: int) -> list[int]:
    """``blocks`` on one rank, none on the others."""
    return [blocks if r == rank else 0 for r in range(num_ranks)]


def ranks_with_room(
    order: Sequence[int], room: Sequence[int], need: int, want: int, preferred: set[int]
) -> set[int]:
    """``want`` ranks, or as many more as it takes to hold ``need`` blocks; the preferred, then the
    roomiest first, of equals as in ``order``. Empty when all together have too little."""
    ranked = sorted(
        (rank for rank in order if room[rank]),
        key=lambda rank: (rank not in preferred, -room[rank]),
    )
    chosen: set[int] = set()
    have = 0
    for rank in ranked:
        if len(chosen) >= want and have >= need:
            break
        chosen.add(rank)
        have += room[rank]
    return chosen if have >= need else set()
