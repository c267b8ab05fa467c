"""The free blocks of one rank, kept as runs of adjacent numbers. Integers only."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from itertools import islice

# How many runs of a size class a choice looks at: the price of a choice is then the same however
# many free runs there are.
LOOK_AT = 16


class FreeList:
    """Free blocks ``0 .. capacity - 1`` (all of them at first) as maximal runs.

    Runs are found by their start, by their end, and by size class: class c holds the runs of
    ``2 ** (c - 1)`` to ``2 ** c - 1`` blocks. No operation is linear in blocks or in runs; a call
    costs what the blocks it takes or gives cost. ``num_free``: free blocks.
    """

    def __init__(self, capacity: int) -> None:
        self.num_free = 0
        self._length_at: dict[int, int] = {}  # start -> length
        self._start_before: dict[int, int] = {}  # end (exclusive) -> start
        # Not plain dicts: the first key of one that lost its first keys is found by a linear walk.
        self._classes: list[OrderedDict[int, None]] = [
            OrderedDict() for _ in range(capacity.bit_length() + 1)
        ]
        self._occupied = 0  # bit c: class c has a run
        if capacity:
            self._insert(0, capacity)

    def take(self, n: int, extend_from: int | None = None) -> tuple[int, ...]:
        """``n <= num_free`` blocks, adjacent where possible, in the order in which to fill them.

        First the run right after the block ``extend_from`` (not free itself); without one, for a
        caller that names ``extend_from`` and so grows, from the middle of a large run. What is
        then missing comes from a short run that holds it, or else from the largest runs. Both are
        chosen among at most ``LOOK_AT`` runs of a size class.
        """
        assert 0 <= n <= self.num_free, f"{n} blocks of {self.num_free} free ones"
        taken: list[int] = []
        if n and extend_from is not None:
            if extend_from + 1 in self._length_at:
                taken += self._take_start(extend_from + 1, n)
            else:
                taken += self._take_middle(n)
        while len(taken) < n:
            missing = n - len(taken)
            start = self._short_enough(missing)
            if start is None:
                start = self._largest()
            taken += self._take_start(start, missing)
        return tuple(taken)

    def give(self, ids: Iterable[int]) -> None:
        """Free the blocks ``ids``, none free yet and none named twice (the caller knows)."""
        pending = sorted(ids)
        first = 0
        for i, block in enumerate(pending):
            if i + 1 == len(pending) or pending[i + 1] != block + 1:
                self._insert_fused(pending[first], i + 1 - first)
                first = i + 1

    def room_after(self, block: int) -> int:
        """Free blocks in the run right after ``block``."""
        return self._length_at.get(block + 1, 0)

    def unordered_runs(self) -> list[tuple[int, int]]:
        """All free runs as (start, length), in no order. Linear in runs, and quick."""
        return list(self._length_at.items())

    def runs(self) -> list[tuple[int, int]]:
        """All free runs as (start, length), ascending. Linear in runs: for checks only."""
        return sorted(self._length_at.items())

    def check(self) -> None:
        """Raise AssertionError unless all views of the runs agree. Linear in runs."""
        last_end = -1
        for start, length in self.runs():
            assert length > 0, f"empty free run at {start}"
            assert start > last_end, f"free runs overlap or touch at {start}"
            last_end = start + length
        ends = {start + length: start for start, length in self._length_at.items()}
        assert self._start_before == ends, "run ends and runs differ"
        classes = {start: c for c, members in enumerate(self._classes) for start in members}
        by_length = {start: length.bit_length() for start, length in self._length_at.items()}
        assert classes == by_length, "size classes and runs differ"
        assert sum(map(len, self._classes)) == len(classes), "a run is in two size classes"
        occupied = sum(1 << c for c, members in enumerate(self._classes) if members)
        assert self._occupied == occupied, "occupied classes and size classes differ"
        assert self.num_free == sum(self._length_at.values()), "free count is wrong"

    def _short_enough(self, n: int) -> int | None:
        """Start of a short run of at least ``n`` blocks, None when none was seen."""
        length_at = self._length_at
        own = n.bit_length()  # the one class that has both shorter and long enough runs
        best, best_length = None, 0
        for start in islice(self._classes[own], LOOK_AT):
            length = length_at[start]
            if length == n:
                return start
            if length > n and (best is None or length < best_length):
                best, best_length = start, length
        if best is not None:
            return best
        above = self._occupied >> (own + 1)
        if not above:
            return None
        lowest = own + (above & -above).bit_length()
        return min(islice(self._classes[lowest], LOOK_AT), key=length_at.__getitem__)

    def _largest(self) -> int:
        """Start of a run of the highest class: at least half as long as the largest."""
        members = self._classes[self._occupied.bit_length() - 1]
        return max(islice(members, LOOK_AT), key=self._length_at.__getitem__)

    def _take_middle(self, n: int) -> range:
        """Blocks for a request that grows but cannot grow on in place: from the middle of a large
        run, so that it can from there on and neighbours do not interleave. Empty if it is short."""
        start = self._largest()
        length = self._length_at[start]
        skip = (length - n) // 2
        if skip <= 0:
            return range(0)
        self._remove(start)
        self._insert(start, skip)
        if skip + n < length:
            self._insert(start + skip + n, length - skip - n)
        return range(start + skip, start + skip + n)

    def _take_start(self, start: int, n: int) -> range:
        """Up to ``n`` blocks from the beginning of the run at ``start``."""
        length = self._remove(start)
        if n >= length:
            return range(start, start + length)
        self._insert(start + n, length - n)
        return range(start, start + n)

    def _insert_fused(self, start: int, length: int) -> None:
        if start + length in self._length_at:
            length += self._remove(start + length)
        before = self._start_before.get(start)
        if before is not None:
            length += self._remove(before)
            start = before
        self._insert(start, length)

    def _insert(self, start: int, length: int) -> None:
        self._length_at[start] = length
        self._start_before[start + length] = start
        size_class = length.bit_length()
        self._classes[size_class][start] = None
        self._occupied |= 1 << size_class
        self.num_free += length

    def _remove(self, start: int) -> int:
        """Drop the run at ``start``; its length."""
        length = self._length_at.pop(start)
        del self._start_before[start + length]
        size_class = length.bit_length()
        members = self._classes[size_class]
        del members[start]
        if not members:
            self._occupied &= ~(1 << size_class)
        self.num_free -= length
        return length
