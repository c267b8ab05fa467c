"""Hands out KV blocks, rank by rank, and keeps what was computed for the next prompt that begins
the same way. Integers only: a block is ``(rank, rank-local number)``, its home."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence

from ds_cp.errors import DsCpError
from ds_cp.kv.free_list import FreeList
from ds_cp.layout import Home


class OutOfBlocksError(DsCpError):
    """``rank`` has only ``have`` blocks that are free or can be evicted, ``want`` were asked for;
    nothing was allocated."""

    def __init__(self, rank: int, want: int, have: int) -> None:
        super().__init__(
            f"rank {rank} has {have} free KV blocks, {want} are needed; "
            "place the rest on another rank or free a request first"
        )
        self.rank = rank
        self.want = want
        self.have = have


class BlockAllocator:
    """Counts the references to the blocks of every rank, and keeps cached blocks by key.

    ``blocks_per_rank``: capacity of each rank in blocks (0 allowed, they may differ).
    ``block_size``: tokens in a block.

    A block is *free*, *used* (one reference or more) or *cached* (no reference, but its content is
    known by a key, so that it can be used again; evicted least recently used first when free
    blocks run out). A key names one block. ``evictions`` counts cached blocks that ``allocate``
    had to give away, and calls ``on_evicted(key, home)`` for each; ``reuses`` those that came into
    use again. No operation is linear in the
    blocks or free runs of a rank, only in the blocks that it is about.

    A rank that does not exist, or a block that is not in the state asked for, is a ValueError that
    names it; nothing is changed then.
    """

    def __init__(
        self,
        blocks_per_rank: Sequence[int],
        block_size: int,
        on_evicted: Callable[[bytes, Home], None] | None = None,
    ) -> None:
        if block_size < 1 or any(n < 0 for n in blocks_per_rank):
            raise ValueError(
                "need block_size >= 1 and blocks_per_rank >= 0, "
                f"got {block_size} and {list(blocks_per_rank)}"
            )
        self.block_size = block_size
        self.blocks_per_rank = tuple(blocks_per_rank)
        self.evictions = 0
        self.reuses = 0
        self._on_evicted = on_evicted
        self._ranks = [_RankBlocks(n) for n in self.blocks_per_rank]
        self._home_of: dict[bytes, Home] = {}
        self._key_of: dict[Home, bytes] = {}

    @property
    def capacity_tokens(self) -> int:
        """What all ranks together hold when everything is free, in tokens."""
        return sum(self.blocks_per_rank) * self.block_size

    def num_free(self, rank: int) -> int:
        """Free blocks of ``rank``."""
        return self._of(rank).free.num_free

    def num_cached(self, rank: int) -> int:
        """Cached blocks of ``rank``."""
        return len(self._of(rank).cached)

    def num_used(self, rank: int) -> int:
        """Blocks of ``rank`` with a reference."""
        return len(self._of(rank).references)

    def num_available(self, rank: int) -> int:
        """Blocks that ``allocate`` can give: free and cached ones."""
        return self._of(rank).num_available

    def available(self) -> list[int]:
        """``num_available`` of every rank."""
        return [blocks.num_available for blocks in self._ranks]

    def free_runs(self, rank: int) -> list[tuple[int, int]]:
        """The free runs of ``rank`` as (start, length), in no order. Linear in runs."""
        return self._of(rank).free.unordered_runs()

    def references(self, home: Home) -> int:
        """How many hold the block; 0 for a free or a cached one."""
        return self._of(home[0]).references.get(home[1], 0)

    def allocate(self, rank: int, n: int, extend_from: int | None = None) -> tuple[int, ...]:
        """``n`` blocks of ``rank`` with one reference each, in the order in which to fill them.

        ``extend_from``: the caller's last block on this rank, used; the blocks right after it come
        first, or else blocks that leave room to grow on (see FreeList.take). Cached blocks
        are evicted only as far as free ones do not suffice. Raises OutOfBlocksError, with nothing
        changed, when fewer than ``n`` are available.
        """
        blocks = self._of(rank)
        if n < 0:
            raise ValueError(f"cannot allocate {n} blocks on rank {rank}")
        if extend_from is not None and extend_from not in blocks.references:
            raise ValueError(f"cannot extend block {extend_from} of rank {rank}: not allocated")
        if n > blocks.num_available:
            raise OutOfBlocksError(rank, n, blocks.num_available)
        missing = n - blocks.free.num_free
        if missing > 0:
            # Before anything is allocated, so that what was evicted fuses with its free neighbours.
            evicted = self._evict(rank, missing)
            self.evictions += missing
            if self._on_evicted is not None:
                for key, home in evicted:
                    self._on_evicted(key, home)
        taken = blocks.free.take(n, extend_from)
        for block in taken:
            blocks.references[block] = 1
        return taken

    def room_after(self, home: Home) -> int:
        """Free blocks of the same rank right after ``home``."""
        return self._of(home[0]).free.room_after(home[1])

    def share(self, home: Home) -> None:
        """One more reference to a used or cached block, which is then used."""
        rank, block = home
        blocks = self._of(rank)
        if block in blocks.references:
            blocks.references[block] += 1
        elif block in blocks.cached:
            del blocks.cached[block]
            blocks.references[block] = 1
            self.reuses += 1
        else:
            raise ValueError(f"block {block} of rank {rank} is not allocated")

    def release(self, homes: Sequence[Home]) -> None:
        """One reference less for each of ``homes`` (named twice: two less).

        At zero a block with a key becomes cached, as the most recently used so far: name the tail
        of a sequence first, and it is evicted first. One without a key becomes free. The whole
        call is checked before anything is changed.
        """
        for home, times in Counter(homes).items():
            have = self._used(home)
            if times > have:
                raise ValueError(
                    f"block {home[1]} of rank {home[0]} is released {times} times in one call "
                    f"but has {have} references"
                )
        freed: dict[int, list[int]] = {}
        for home in homes:
            rank, block = home
            blocks = self._ranks[rank]
            blocks.references[block] -= 1
            if blocks.references[block]:
                continue
            del blocks.references[block]
            if home in self._key_of:
                blocks.cached[block] = None
            else:
                freed.setdefault(rank, []).append(block)
        for rank, ids in freed.items():
            self._ranks[rank].free.give(ids)

    def put(self, key: bytes, home: Home) -> bool:
        """Name the content of a used block, for ``find``. False, with nothing changed, when the
        key names a block already or the block has a key."""
        self._used(home)
        if key in self._home_of or home in self._key_of:
            return False
        self._home_of[key] = home
        self._key_of[home] = key
        return True

    def find(self, key: bytes) -> Home | None:
        """The block (used or cached) whose content ``key`` names; ``share`` it to keep it."""
        return self._home_of.get(key)

    def forget(self, home: Home) -> None:
        """Drop the key of a block, if it has one; a cached block becomes free."""
        blocks = self._of(home[0])
        key = self._key_of.pop(home, None)
        if key is None:
            return
        del self._home_of[key]
        if home[1] in blocks.cached:
            del blocks.cached[home[1]]
            blocks.free.give((home[1],))

    def drop_cached(self, rank: int) -> int:
        """Forget all cached blocks of ``rank``; how many these were."""
        count = self.num_cached(rank)
        self._evict(rank, count)
        return count

    def forget_rank(self, rank: int) -> int:
        """Drop the keys of all blocks of ``rank``, whose content is gone; how many cached ones
        became free. Linear in keys."""
        freed = self.drop_cached(rank)
        for home in [home for home in self._key_of if home[0] == rank]:
            self.forget(home)
        return freed

    def forget_all(self) -> int:
        """Drop the keys of all blocks; how many cached ones became free."""
        freed = sum(self.drop_cached(rank) for rank in range(len(self._ranks)))
        self._home_of.clear()
        self._key_of.clear()
        return freed

    def move_key(self, source: Home, target: Home) -> None:
        """The key of ``source``, if it has one, now names ``target``, a used block without a key
        that holds the same content. A cached source becomes free."""
        self._of(source[0])
        self._used(target)
        key = self._key_of.get(source)
        if key is None:
            return
        if target in self._key_of:
            raise ValueError(f"block {target[1]} of rank {target[0]} has a key already")
        self.forget(source)
        self.put(key, target)

    def check_integrity(self, references: Mapping[Home, int] | None = None) -> None:
        """Raise AssertionError unless every block is in exactly one state, keys and blocks name
        each other, and (when given) ``references``, holders by block, are the counts. Linear."""
        cached: set[Home] = set()
        counts: dict[Home, int] = {}
        for rank, blocks in enumerate(self._ranks):
            blocks.check(rank, self.blocks_per_rank[rank])
            cached |= {(rank, block) for block in blocks.cached}
            counts |= {(rank, block): n for block, n in blocks.references.items()}
        named = {home: key for key, home in self._home_of.items()}
        assert len(named) == len(self._home_of), "two keys name one block"
        assert named == self._key_of, "keys of blocks and blocks of keys differ"
        assert cached <= named.keys(), f"cached without a key: {sorted(cached - named.keys())}"
        stray = named.keys() - counts.keys() - cached
        assert not stray, f"free blocks with a key: {sorted(stray)}"
        if references is not None:
            differ = sorted(
                home
                for home in counts.keys() | references.keys()
                if counts.get(home, 0) != references.get(home, 0)
            )
            some = {home: (counts.get(home, 0), references.get(home, 0)) for home in differ[:8]}
            assert not differ, f"{len(differ)} blocks: (references, holders) differ: {some}"

    def _of(self, rank: int) -> _RankBlocks:
        if not 0 <= rank < len(self._ranks):
            raise ValueError(f"no rank {rank} among {len(self._ranks)}")
        return self._ranks[rank]

    def _used(self, home: Home) -> int:
        """The references of a used block; ValueError for any other."""
        rank, block = home
        have = self._of(rank).references.get(block, 0)
        if not have:
            capacity = self.blocks_per_rank[rank]
            if not 0 <= block < capacity:
                raise ValueError(f"rank {rank} has no block {block} (it has {capacity})")
            raise ValueError(f"block {block} of rank {rank} is not allocated")
        return have

    def _evict(self, rank: int, n: int) -> list[tuple[bytes, Home]]:
        """Free the ``n`` least recently used cached blocks of ``rank``; their keys and homes, in
        that order."""
        blocks = self._ranks[rank]
        evicted = [blocks.cached.popitem(last=False)[0] for _ in range(n)]
        found = [(self._key_of.pop((rank, block)), (rank, block)) for block in evicted]
        for key, _ in found:
            del self._home_of[key]
        blocks.free.give(evicted)
        return found


class _RankBlocks:
    """One rank's blocks by state."""

    def __init__(self, capacity: int) -> None:
        self.free = FreeList(capacity)
        self.references: dict[int, int] = {}  # used block -> holders, at least 1
        self.cached: OrderedDict[int, None] = OrderedDict()  # least recently used first

    @property
    def num_available(self) -> int:
        return self.free.num_free + len(self.cached)

    def check(self, rank: int, capacity: int) -> None:
        self.free.check()
        assert all(n >= 1 for n in self.references.values()), f"rank {rank}: used, no reference"
        single = [(block, 1) for block in (*self.references, *self.cached)]
        end = 0
        for start, length in sorted([*self.free.runs(), *single]):
            assert start >= end, f"block {start} of rank {rank} is in two states"
            assert start == end, f"block {end} of rank {rank} is in no state"
            end = start + length
        assert end == capacity, f"rank {rank}: blocks up to {end} known, it has {capacity}"
