"""What waits before a place in the queue, summed, without a walk over the queue. No torch."""

from __future__ import annotations

from bisect import bisect_left
from typing import NamedTuple

MOST = 256  # entries of one part of the backlog; a fuller one is split

Order = tuple[float, float, float]


class Load(NamedTuple):
    """What requests want: ``seats``, answers that run at once; ``work`` on prompts, in the pacer's
    unit; ``tokens`` of their answers, as expected. Whole numbers, so that sums stay exact."""

    seats: int = 0
    work: int = 0
    tokens: int = 0

    def plus(self, other: Load, sign: int = 1) -> Load:
        """The sum of both; the difference with ``sign`` -1."""
        return Load(
            self.seats + sign * other.seats,
            self.work + sign * other.work,
            self.tokens + sign * other.tokens,
        )


class Backlog:
    """Loads in order, in parts of at most ``MOST``: adding, removing, and the sum up to a place
    take some hundred steps in queues of a million."""

    def __init__(self) -> None:
        self._parts: list[list[tuple[Order, Load]]] = []
        self._sums: list[Load] = []
        self._lasts: list[Order] = []  # the last order of each part

    def add(self, order: Order, load: Load) -> None:
        """Enter a load; no other has the same ``order``."""
        at = min(bisect_left(self._lasts, order), len(self._parts) - 1)
        if at < 0:
            self._put(0, 0, [[(order, load)]])
            return
        part = self._parts[at]
        part.insert(bisect_left(part, order, key=_order_of), (order, load))
        self._sums[at] = self._sums[at].plus(load)
        self._lasts[at] = part[-1][0]
        if len(part) > MOST:
            half = len(part) // 2
            self._put(at, 1, [part[:half], part[half:]])

    def remove(self, order: Order) -> None:
        """Take the load of this ``order`` away. KeyError when there is none."""
        at = bisect_left(self._lasts, order)
        part = self._parts[at] if at < len(self._parts) else []
        place = bisect_left(part, order, key=_order_of)
        if place == len(part) or part[place][0] != order:
            raise KeyError(order)
        _, load = part.pop(place)
        if not part:
            self._put(at, 1, [])
            return
        self._sums[at] = self._sums[at].plus(load, -1)
        self._lasts[at] = part[-1][0]

    def before(self, order: Order) -> Load:
        """The sum of the loads that come before ``order``."""
        found = Load()
        for at, last in enumerate(self._lasts):
            if last >= order:
                part = self._parts[at]
                for _, load in part[: bisect_left(part, order, key=_order_of)]:
                    found = found.plus(load)
                break
            found = found.plus(self._sums[at])
        return found

    def _put(self, at: int, count: int, parts: list[list[tuple[Order, Load]]]) -> None:
        """Replace ``count`` parts from ``at`` on."""
        here = slice(at, at + count)
        self._parts[here] = parts
        self._sums[here] = [_sum(part) for part in parts]
        self._lasts[here] = [part[-1][0] for part in parts]


def _order_of(entry: tuple[Order, Load]) -> Order:
    return entry[0]


def _sum(part: list[tuple[Order, Load]]) -> Load:
    found = Load()
    for _, load in part:
        found = found.plus(load)
    return found
