"""Clocks of ranks brought together: each rank's times as rank 0's clock would give them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Ping(NamedTuple):
    """A message from rank 0 to another rank and back, in nanoseconds: when it left by rank 0's
    clock, when the other rank had it by that rank's, when it was back by rank 0's."""

    left: int
    there: int
    back: int


class Offset(NamedTuple):
    """``offset``: a rank's clock minus rank 0's at rank 0's time ``at``; ``error``: it is at most
    that far off. Nanoseconds."""

    at: int
    offset: int
    error: int


def offset_of(pings: Sequence[Ping]) -> Offset:
    """The offset by the quickest ping, as NTP takes it (RFC 5905, section 8): the message took half
    the time each way, give or take that half. 0 where that is possible: processes of one host have
    one clock."""
    best = min(pings, key=lambda ping: ping.back - ping.left)
    half = (best.back - best.left + 1) // 2
    middle = best.left + (best.back - best.left) // 2
    offset = best.there - middle
    return Offset(middle, 0 if abs(offset) <= half else offset, half)


class Clock:
    """Turns a rank's times into rank 0's, by its offset at two moments: clocks drift evenly."""

    def __init__(self, first: Offset, last: Offset) -> None:
        self._first = first
        self._began = first.at + first.offset  # by this rank's clock
        span = last.at + last.offset - self._began
        self._drift = (last.offset - first.offset) / span if span > 0 else 0.0

    def aligned(self, time: int) -> int:
        """Rank 0's time at this rank's ``time``, nanoseconds; never less for a later time."""
        since = time - self._began
        return time - self._first.offset - round(self._drift * since)
