"""Hands out KV blocks, rank by rank. Integers only: a block is ``(rank, rank-local number)``."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Mapping, Sequence

from ds_cp.errors import DsCpError


class OutOfBlocksError(DsCpError):
    """``rank`` has only ``have`` free blocks, ``want`` were asked for; nothing was allocated."""

    def __init__(self, rank: int, want: int, have: int) -> None:
        super().__init__(
            f"rank {rank} has {have} free KV blocks, {want} are needed; "
            "place the rest on another rank or free a request first"
        )
        self.rank = rank
        self.want = want
        self.have = have


class BlockAllocator:
    """Free and used blocks of every rank.

    ``blocks_per_rank``: capacity of each rank in blocks (0 allowed, they may differ).
    ``block_size``: tokens in a block. No operation is linear in the number of blocks of a rank.
    """

    def __init__(self, blocks_per_rank: Sequence[int], block_size: int) -> None:
        if block_size < 1 or any(n < 0 for n in blocks_per_rank):
            raise ValueError(
                "need block_size >= 1 and blocks_per_rank >= 0, "
                f"got {block_size} and {list(blocks_per_rank)}"
            )
        self.block_size = block_size
        self.blocks_per_rank = tuple(blocks_per_rank)
        self._ranks = [_RankBlocks(rank, n) for rank, n in enumerate(self.blocks_per_rank)]

    @property
    def capacity_tokens(self) -> int:
        """What all ranks together hold when everything is free, in tokens."""
        return sum(self.blocks_per_rank) * self.block_size

    @property
    def num_free_total(self) -> int:
        return sum(blocks.num_free for blocks in self._ranks)

    def num_free(self, rank: int) -> int:
        return self._of(rank).num_free

    def num_used(self, rank: int) -> int:
        return len(self._of(rank).used)

    def allocate(self, rank: int, n: int, extend_from: int | None = None) -> tuple[int, ...]:
        """``n`` blocks of ``rank``, adjacent where possible, in the order in which to fill them.

        ``extend_from``: the caller's last block on this rank; the blocks right after it are taken
        first, or else blocks that leave room to grow on. The rest comes from the smallest free run
        that holds it, or else from the largest runs. Raises OutOfBlocksError, with nothing changed,
        when fewer than ``n`` are free.
        """
        blocks = self._of(rank)
        if n < 0:
            raise ValueError(f"cannot allocate {n} blocks on rank {rank}")
        if extend_from is not None and extend_from not in blocks.used:
            raise ValueError(f"cannot extend block {extend_from} of rank {rank}: not allocated")
        if n > blocks.num_free:
            raise OutOfBlocksError(rank, n, blocks.num_free)
        return blocks.take(n, extend_from)

    def free(self, rank: int, blocks: Sequence[int]) -> None:
        """Give ``blocks`` of ``rank`` back; checked as ``free_all`` does."""
        self.free_all({rank: blocks})

    def free_all(self, blocks: Mapping[int, Sequence[int]]) -> None:
        """Give back blocks of several ranks at once.

        The whole call is checked first: a block that does not exist, is not allocated, or is named
        twice is a ValueError that names it, and nothing is changed.
        """
        for rank, ids in blocks.items():
            self._of(rank).check_free(ids)
        for rank, ids in blocks.items():
            self._of(rank).give_back(ids)

    def check_integrity(self) -> None:
        """Raise AssertionError when free runs and used blocks do not add up to the capacity."""
        for blocks in self._ranks:
            blocks.check_integrity()

    def _of(self, rank: int) -> _RankBlocks:
        if not 0 <= rank < len(self._ranks):
            raise ValueError(f"no rank {rank} among {len(self._ranks)}")
        return self._ranks[rank]


class _RankBlocks:
    """One rank's books: the used blocks; the free runs by start and by end, so that they fuse."""

    def __init__(self, rank: int, capacity: int) -> None:
        self.rank = rank
        self.capacity = capacity
        self.num_free = 0
        self.used: set[int] = set()
        self.starts: list[int] = []  # sorted starts of the free runs
        self.length_at: dict[int, int] = {}  # start -> length
        self.start_before: dict[int, int] = {}  # end (exclusive) -> start
        if capacity:
            self._insert(0, capacity)

    def take(self, n: int, extend_from: int | None) -> tuple[int, ...]:
        """``n`` blocks; the caller has checked that so many are free."""
        taken: list[int] = []
        if n and extend_from is not None:
            if extend_from + 1 in self.length_at:
                taken += self._take_from(extend_from + 1, n)
            else:
                taken += self._take_with_room(n)
        for start in self._pick(n - len(taken)):
            taken += self._take_from(start, n - len(taken))
        self.used.update(taken)
        return tuple(taken)

    def _pick(self, n: int) -> list[int]:
        """Starts of the free runs to take ``n`` blocks from.

        The smallest run that is long enough, while none is the largest; of equals the first.
        """
        lengths = self.length_at
        picked: list[int] = []
        if n == 0:
            return picked
        if max(lengths.values()) < n:
            for start in sorted(self.starts, key=lengths.__getitem__, reverse=True):
                if n <= lengths[start]:
                    break
                picked.append(start)
                n -= lengths[start]
        left = set(self.starts).difference(picked)
        enough = [start for start in left if lengths[start] >= n]
        picked.append(min(enough, key=lambda start: (lengths[start], start)))
        return picked

    def _take_with_room(self, n: int) -> range:
        """Blocks for a request that grows but cannot grow on in place: from the middle of the
        largest free run, so that it can from there on and neighbours do not interleave."""
        start = max(self.starts, key=self.length_at.__getitem__)
        skip = (self.length_at[start] - n) // 2
        if skip <= 0:
            return range(0)
        length = self.length_at[start]
        self._remove(start)
        self._insert(start, skip)
        if skip + n < length:
            self._insert(start + skip + n, length - skip - n)
        return range(start + skip, start + skip + n)

    def _take_from(self, start: int, n: int) -> range:
        """Up to ``n`` blocks from the front of the free run that begins at ``start``."""
        length = self.length_at[start]
        n = min(n, length)
        self._remove(start)
        if n < length:
            self._insert(start + n, length - n)
        return range(start, start + n)

    def check_free(self, ids: Iterable[int]) -> None:
        seen: set[int] = set()
        for block in ids:
            if not 0 <= block < self.capacity:
                raise ValueError(f"rank {self.rank} has no block {block} (it has {self.capacity})")
            if block not in self.used:
                raise ValueError(f"block {block} of rank {self.rank} is not allocated")
            if block in seen:
                raise ValueError(f"block {block} of rank {self.rank} is named twice in one free")
            seen.add(block)

    def give_back(self, ids: Iterable[int]) -> None:
        """Free blocks that ``check_free`` has passed."""
        pending = sorted(ids)
        self.used.difference_update(pending)
        first = 0
        for i, block in enumerate(pending):
            if i + 1 == len(pending) or pending[i + 1] != block + 1:
                self._insert_fused(pending[first], i + 1 - first)
                first = i + 1

    def _insert_fused(self, start: int, length: int) -> None:
        after = start + length
        if after in self.length_at:
            length += self.length_at[after]
            self._remove(after)
        if start in self.start_before:
            before = self.start_before[start]
            length += self.length_at[before]
            self._remove(before)
            start = before
        self._insert(start, length)

    def _insert(self, start: int, length: int) -> None:
        insort(self.starts, start)
        self.length_at[start] = length
        self.start_before[start + length] = start
        self.num_free += length

    def _remove(self, start: int) -> None:
        length = self.length_at.pop(start)
        del self.start_before[start + length]
        del self.starts[bisect_left(self.starts, start)]
        self.num_free -= length

    def check_integrity(self) -> None:
        where = f"rank {self.rank}"
        assert self.starts == sorted(self.length_at), f"{where}: sorted starts and runs differ"
        ends = {start + length: start for start, length in self.length_at.items()}
        assert self.start_before == ends, f"{where}: run ends and runs differ"
        used = sorted(self.used)
        last_end = -1
        for start in self.starts:
            length = self.length_at[start]
            assert length > 0, f"{where}: empty free run at {start}"
            assert start > last_end, f"{where}: free runs overlap or touch at {start}"
            last_end = start + length
            assert last_end <= self.capacity, f"{where}: free run past the end, {last_end}"
            inside = used[bisect_left(used, start) : bisect_left(used, last_end)]
            assert not inside, f"{where}: used blocks {inside} in a free run"
        assert all(0 <= block < self.capacity for block in used), f"{where}: unknown used block"
        assert self.num_free == sum(self.length_at.values()), f"{where}: free count is wrong"
        assert self.num_free + len(self.used) == self.capacity, (
            f"{where}: {self.num_free} free + {len(self.used)} used != {self.capacity}"
        )
