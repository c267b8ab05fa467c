"""The books of host memory: which slot of which rank holds a block that the device gave away.
Integers only."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

from ds_cp.layout import Home, host_place, host_slot


class HostTier:
    """Names the content of host slots by key, as ``BlockAllocator`` does that of blocks.

    ``slots_per_rank``: slots of each rank, of one block each (0 allowed). A slot is *free* or
    *kept* (a key names its content; the least recently used is given away when free ones run out).
    A kept slot is *due* while its content still lies in the block that was given away: it is copied
    just before that block is written (``spill``). Whoever wants a place for later ``lease``s it;
    such a slot is neither given away nor free until it is given back, though its key may go.

    A key that is here is not in the allocator: the caller drops it when the device has it again.
    ``spilled``: contents that were to be copied here; ``lost``: kept ones that were given away.
    ``retired``: ranks whose host memory has failed, which get nothing more to keep.
    ``step``: of the plan in the making, set by the caller, so that ``rewind`` knows what it did.
    """

    def __init__(self, slots_per_rank: Sequence[int]) -> None:
        if any(n < 0 for n in slots_per_rank):
            raise ValueError(f"need slots_per_rank >= 0, got {list(slots_per_rank)}")
        self.slots_per_rank = tuple(slots_per_rank)
        self.spilled = 0
        self.lost = 0
        self.step = 0
        self.retired: set[int] = set()
        self._changed: dict[Home, int] = {}  # kept place -> step that last kept or copied it
        # The lowest slot last, to be taken first; kept places by key, least recently used first.
        self._free = [list(range(n - 1, -1, -1)) for n in self.slots_per_rank]
        self._kept: list[OrderedDict[Home, bytes]] = [OrderedDict() for _ in self.slots_per_rank]
        self._place_of: dict[bytes, Home] = {}
        self._leases: dict[Home, int] = {}  # place -> how many wait for it
        self._due: dict[Home, Home] = {}  # block -> the place that its content is due at
        self._block_of: dict[Home, Home] = {}  # the same, place -> block

    def num_used(self, rank: int) -> int:
        """Slots of ``rank`` that are not free."""
        return self.slots_per_rank[rank] - len(self._free[rank])

    @property
    def num_due(self) -> int:
        """Slots whose content is still in its old block."""
        return len(self._due)

    def num_leased(self, rank: int) -> int:
        """Slots of ``rank`` that somebody waits for."""
        return sum(place[0] == rank for place in self._leases)

    def keep(self, key: bytes, block: Home) -> bool:
        """Give the content of ``block``, which the device gives away and which ``key`` names, a
        slot of the same rank; it is due. False where there is no slot for it."""
        if key in self._place_of:
            return False
        place = self._take(block[0])
        if place is None:
            return False
        assert block not in self._due, f"block {block} is due already"
        self._place_of[key] = place
        self._kept[block[0]][place] = key
        self._changed[place] = self.step
        self._due[block], self._block_of[place] = place, block
        return True

    def _take(self, rank: int) -> Home | None:
        """A slot: a free one, else the least recently used that nobody waits for."""
        if rank in self.retired:
            return None
        if self._free[rank]:
            return host_place(rank, self._free[rank].pop())
        place = next((p for p in self._kept[rank] if p not in self._leases), None)
        if place is not None:
            self.drop(self._kept[rank][place])
            self.lost += 1
            self._free[rank].pop()  # the one that was just freed
        return place

    def spill(self, block: Home) -> Home | None:
        """``block`` is about to be written: the place to which its content is copied before that,
        None when nothing is due."""
        place = self._due.pop(block, None)
        if place is not None:
            del self._block_of[place]
            self._changed[place] = self.step
            self.spilled += 1
        return place

    def find(self, key: bytes) -> Home | None:
        """The place whose content ``key`` names; ``lease`` it to keep it."""
        return self._place_of.get(key)

    def source(self, place: Home) -> Home:
        """Where the content of a kept or leased place lies now: there, or in its old block."""
        return self._block_of.get(place, place)

    def lease(self, place: Home) -> None:
        """Have a kept place stay until it is given back; it is the most recently used one."""
        kept = self._kept[place[0]]
        if place not in kept:
            raise ValueError(f"slot {host_slot(place[1])} of rank {place[0]} is not kept")
        kept.move_to_end(place)
        self._leases[place] = self._leases.get(place, 0) + 1

    def give_back(self, place: Home) -> None:
        """End a lease. A slot without a key becomes free with the last one."""
        self._leases[place] -= 1
        if not self._leases[place]:
            del self._leases[place]
            if place not in self._kept[place[0]]:
                self._release(place)

    def drop(self, key: bytes) -> None:
        """Forget what ``key`` names, if it is here: the device has it again, or nobody wants it."""
        place = self._place_of.pop(key, None)
        if place is None:
            return
        del self._kept[place[0]][place]
        if place not in self._leases:
            self._release(place)

    def empty_rank(self, rank: int) -> int:
        """Forget all that is kept on ``rank``; how many slots that were."""
        keys = list(self._kept[rank].values())
        for key in keys:
            self.drop(key)
        return len(keys)

    def retire(self, rank: int) -> None:
        """Keep nothing on ``rank`` any more: its host memory has failed."""
        self.retired.add(rank)
        self.empty_rank(rank)

    def num_usable(self, rank: int) -> int:
        """Slots of ``rank`` that hold something or may."""
        return self.num_used(rank) if rank in self.retired else self.slots_per_rank[rank]

    def clear(self) -> int:
        """Forget everything; how many slots that were."""
        return sum(self.empty_rank(rank) for rank in range(len(self.slots_per_rank)))

    def rewind(self, step: int) -> int:
        """Plans after ``step`` count as not carried out: forget what they kept, whose content may
        never have been computed, or copied here; how many slots that were."""
        keys = [
            key for kept in self._kept for place, key in kept.items() if self._changed[place] > step
        ]
        for key in keys:
            self.drop(key)
        return len(keys)

    def _release(self, place: Home) -> None:
        del self._changed[place]
        block = self._block_of.pop(place, None)
        if block is not None:
            del self._due[block]
        self._free[place[0]].append(host_slot(place[1]))

    def check_integrity(
        self, leases: dict[Home, int], on_device: Callable[[bytes], Home | None]
    ) -> None:
        """Raise AssertionError unless every slot is in one state, ``leases`` are the leases, and no
        key that is here is on the device. Linear in slots."""
        assert self._leases == leases, f"leases {self._leases}, holders {leases}"
        for rank, count in enumerate(self.slots_per_rank):
            free = {host_place(rank, slot) for slot in self._free[rank]}
            assert len(free) == len(self._free[rank]), f"rank {rank}: a slot is free twice"
            kept = set(self._kept[rank])
            leased = {place for place in self._leases if place[0] == rank}
            assert not free & (kept | leased), f"rank {rank}: a free slot is in use"
            every = {host_place(rank, slot) for slot in range(count)}
            assert free | kept | leased == every, f"rank {rank}: slots in no state"
        named = {key: place for kept in self._kept for place, key in kept.items()}
        assert named == self._place_of, "keys of slots and slots of keys differ"
        both = [key for key in named if on_device(key) is not None]
        assert not both, f"{len(both)} keys are on the device and on the host"
        assert {place: block for block, place in self._due.items()} == self._block_of
        used = set(named.values()) | self._leases.keys()
        assert self._block_of.keys() <= used, "a free slot is due"
        assert self._changed.keys() == used, "slots in use and their steps differ"
        assert all(block[0] == place[0] for block, place in self._due.items())
