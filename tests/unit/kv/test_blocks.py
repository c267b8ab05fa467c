"""The block allocator against a plain model: a state per block, and a list in order of use."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from time import perf_counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ds_cp.errors import DsCpError
from ds_cp.kv.blocks import BlockAllocator, OutOfBlocksError
from ds_cp.kv.free_list import LOOK_AT, FreeList

Home = tuple[int, int]


def runs_of(blocks: set[int]) -> list[list[int]]:
    """The maximal runs of adjacent numbers in ``blocks``."""
    runs: list[list[int]] = []
    for block in sorted(blocks):
        if runs and runs[-1][-1] == block - 1:
            runs[-1].append(block)
        else:
            runs.append([block])
    return runs


def check_choice(free: set[int], taken: tuple[int, ...], extend_from: int | None) -> None:
    """``taken`` follows the rule of FreeList.take, worked out from the bare set ``free``; removes
    the blocks from it. Holds while a size class has no more than LOOK_AT runs: then best fit and
    largest are exact, and only equal runs leave a choice."""
    left = list(taken)
    if extend_from is not None and left:
        if extend_from + 1 in free:
            while left and left[0] in free and left[0] == extend_from + 1:
                extend_from += 1
                free.remove(left.pop(0))
            assert not left or extend_from + 1 not in free, "the run right after was not used up"
        else:
            longest = max(map(len, runs_of(free)))
            skip = (longest - len(left)) // 2
            if skip > 0:
                (run,) = [run for run in runs_of(free) if left[0] in run]
                assert len(run) == longest
                assert left == run[skip : skip + len(left)], "not from the middle"
                free.difference_update(left)
                return
    while left:
        runs = runs_of(free)
        run = next(run for run in runs if left[0] in run)
        enough = [len(r) for r in runs if len(r) >= len(left)]
        assert len(run) == (min(enough) if enough else max(map(len, runs)))
        piece = run[: len(left)]
        assert left[: len(piece)] == piece, "not from its beginning, in order"
        free.difference_update(piece)
        del left[: len(piece)]


class AllocatorMachine(RuleBasedStateMachine):
    """Every call and every misuse in any order; the allocator always equals the model."""

    @initialize(capacities=st.lists(st.integers(0, 20), min_size=1, max_size=3))
    def start(self, capacities: list[int]) -> None:
        self.allocator = BlockAllocator(capacities, block_size=16)
        self.capacities = capacities
        self.count: dict[Home, int] = {}  # used
        self.lru: list[Home] = []  # cached, all ranks, least recently used first
        self.key: dict[Home, bytes] = {}
        self.keys_made = 0
        self.evictions = 0

    def all_blocks(self) -> list[Home]:
        return [(rank, block) for rank, n in enumerate(self.capacities) for block in range(n)]

    def free(self, rank: int) -> set[int]:
        return {
            block
            for r, block in self.all_blocks()
            if r == rank and (r, block) not in self.count and (r, block) not in self.lru
        }

    def cached(self, rank: int) -> list[Home]:
        return [home for home in self.lru if home[0] == rank]

    @rule(data=st.data())
    def allocate(self, data: st.DataObject) -> None:
        rank = data.draw(st.integers(0, len(self.capacities) - 1))
        free, cached = self.free(rank), self.cached(rank)
        have = len(free) + len(cached)
        n = data.draw(st.integers(0, have + 2))
        ends = [None, *(block for r, block in self.count if r == rank)]
        extend_from = data.draw(st.sampled_from(ends))
        if n > have:
            with pytest.raises(OutOfBlocksError) as caught:
                self.allocator.allocate(rank, n, extend_from)
            assert (caught.value.rank, caught.value.want, caught.value.have) == (rank, n, have)
            return
        taken = self.allocator.allocate(rank, n, extend_from)
        assert len(taken) == n
        evicted = cached[: max(0, n - len(free))]
        for home in evicted:
            self.lru.remove(home)
            del self.key[home]
        self.evictions += len(evicted)
        free.update(block for _, block in evicted)
        assert len(set(taken)) == n and set(taken) <= free, "handed out twice, or not evicted"
        check_choice(free, taken, extend_from)
        self.count.update({(rank, block): 1 for block in taken})

    @precondition(lambda self: self.count or self.lru)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        home = data.draw(st.sampled_from([*self.count, *self.lru]))
        self.allocator.share(home)
        if home in self.lru:
            self.lru.remove(home)
        self.count[home] = self.count.get(home, 0) + 1

    @precondition(lambda self: self.count)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        holders = [home for home, n in self.count.items() for _ in range(n)]
        order = data.draw(st.permutations(holders))
        homes = order[: data.draw(st.integers(0, len(order)))]
        self.allocator.release(homes)
        for home in homes:
            self.count[home] -= 1
            if not self.count[home]:
                del self.count[home]
                if home in self.key:
                    self.lru.append(home)

    @rule(data=st.data())
    def misuse(self, data: st.DataObject) -> None:
        """A good list with one entry too many anywhere is refused whole, over several ranks."""
        holders = [home for home, n in self.count.items() for _ in range(n)]
        homes = data.draw(st.permutations(holders))
        homes = homes[: data.draw(st.integers(0, len(homes)))]
        bad = [(r, b) for r, b in self.all_blocks() if (r, b) not in self.count]
        bad += [(r, n) for r, n in enumerate(self.capacities)] + [(0, -1)]
        bad += [home for home in set(homes) if homes.count(home) == self.count[home]]
        entry = data.draw(st.sampled_from(bad))
        homes.insert(data.draw(st.integers(0, len(homes))), entry)
        with pytest.raises(ValueError, match=rf"block {entry[1]}\b"):
            self.allocator.release(homes)
        if entry not in self.count:
            for call in (
                lambda: self.allocator.put(b"new", entry),
                lambda: self.allocator.move_key((0, 0), entry),
            ):
                with pytest.raises(ValueError, match=rf"block {entry[1]}\b"):
                    call()
            if entry not in self.lru:
                with pytest.raises(ValueError, match=rf"block {entry[1]} of rank {entry[0]}"):
                    self.allocator.share(entry)

    @precondition(lambda self: self.count)
    @rule(data=st.data(), again=st.booleans())
    def put(self, data: st.DataObject, again: bool) -> None:
        home = data.draw(st.sampled_from(list(self.count)))
        if again and self.key:
            key = data.draw(st.sampled_from(list(self.key.values())))
        else:
            self.keys_made += 1
            key = b"key %d" % self.keys_made
        fresh = home not in self.key and key not in self.key.values()
        assert self.allocator.put(key, home) == fresh
        if fresh:
            self.key[home] = key

    @precondition(lambda self: any(self.capacities))
    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        home = data.draw(st.sampled_from(self.all_blocks()))
        self.allocator.forget(home)
        self.key.pop(home, None)
        if home in self.lru:
            self.lru.remove(home)

    @rule(data=st.data())
    def drop_cached(self, data: st.DataObject) -> None:
        rank = data.draw(st.integers(0, len(self.capacities) - 1))
        dropped = self.cached(rank)
        assert self.allocator.drop_cached(rank) == len(dropped)
        for home in dropped:
            self.lru.remove(home)
            del self.key[home]

    @rule()
    def forget_all(self) -> None:
        assert self.allocator.forget_all() == len(self.lru)
        self.lru.clear()
        self.key.clear()

    @precondition(lambda self: self.count)
    @rule(data=st.data())
    def move_key(self, data: st.DataObject) -> None:
        source = data.draw(st.sampled_from(self.all_blocks()))
        target = data.draw(st.sampled_from(list(self.count)))
        if source in self.key and target in self.key:
            with pytest.raises(ValueError, match=f"block {target[1]} .* has a key already"):
                self.allocator.move_key(source, target)
            return
        self.allocator.move_key(source, target)
        if source in self.key:
            self.key[target] = self.key.pop(source)
            if source in self.lru:
                self.lru.remove(source)

    @invariant()
    def ledger_balances(self) -> None:
        if not hasattr(self, "allocator"):
            return
        allocator = self.allocator
        allocator.check_integrity(self.count)
        ranks = range(len(self.capacities))
        free = [len(self.free(rank)) for rank in ranks]
        cached = [len(self.cached(rank)) for rank in ranks]
        assert [allocator.num_free(rank) for rank in ranks] == free
        assert [allocator.num_cached(rank) for rank in ranks] == cached
        assert allocator.available() == [f + c for f, c in zip(free, cached, strict=True)]
        assert [allocator.num_available(rank) for rank in ranks] == allocator.available()
        used = Counter(rank for rank, _ in self.count)
        assert [allocator.num_used(rank) for rank in ranks] == [used[rank] for rank in ranks]
        for home in self.all_blocks():
            assert allocator.references(home) == self.count.get(home, 0)
        homes = {key: home for home, key in self.key.items()}
        for i in range(1, self.keys_made + 1):
            key = b"key %d" % i
            assert allocator.find(key) == homes.get(key)
        assert allocator.evictions == self.evictions

    def teardown(self) -> None:
        """Nothing has leaked or splintered: each rank gives all it has as one extent again."""
        if not hasattr(self, "allocator"):
            return
        self.allocator.release([home for home, n in self.count.items() for _ in range(n)])
        for rank, n in enumerate(self.capacities):
            self.allocator.drop_cached(rank)
            assert self.allocator.allocate(rank, n) == tuple(range(n))


TestAllocatorMachine = AllocatorMachine.TestCase
TestAllocatorMachine.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def homes(rank: int, *blocks: int) -> list[Home]:
    return [(rank, block) for block in blocks]


def with_cached(capacity: int, *order: int) -> BlockAllocator:
    """One rank, all of it used but for ``order``, cached in that order under ``b"<block>"``."""
    allocator = BlockAllocator([capacity], block_size=16)
    allocator.allocate(0, capacity)
    for block in order:
        assert allocator.put(b"%d" % block, (0, block))
    allocator.release(homes(0, *order))
    return allocator


def test_unequal_ranks_sum_up() -> None:
    allocator = BlockAllocator([2, 0, 6], block_size=64)
    assert allocator.blocks_per_rank == (2, 0, 6)
    assert allocator.capacity_tokens == 8 * 64
    assert allocator.available() == [2, 0, 6]
    assert allocator.allocate(1, 0) == ()
    with pytest.raises(OutOfBlocksError, match="rank 1 has 0 free KV blocks, 1 are needed"):
        allocator.allocate(1, 1)
    assert allocator.drop_cached(1) == 0
    assert allocator.allocate(2, 6) == (0, 1, 2, 3, 4, 5)
    allocator.check_integrity({(2, block): 1 for block in range(6)})


def test_evicts_the_least_recently_used_first_and_no_more_than_needed() -> None:
    allocator = with_cached(6, 4, 1, 3)
    allocator.release(homes(0, 5))
    assert (allocator.num_free(0), allocator.num_cached(0), allocator.num_available(0)) == (1, 3, 4)
    assert allocator.allocate(0, 1) == (5,)
    assert allocator.evictions == 0
    assert allocator.allocate(0, 2) == (1, 4) and allocator.evictions == 2
    assert allocator.find(b"4") is None and allocator.find(b"1") is None
    assert allocator.find(b"3") == (0, 3)
    with pytest.raises(OutOfBlocksError) as caught:
        allocator.allocate(0, 2)
    assert caught.value.have == 1
    assert allocator.find(b"3") == (0, 3) and allocator.evictions == 2  # nothing changed


def test_evicted_blocks_fuse_with_free_neighbours_before_any_is_taken() -> None:
    allocator = with_cached(8, 3, 0)
    allocator.release(homes(0, 2, 4, 6))  # free 2, 4, 6; the oldest cached one joins 2 and 4
    assert allocator.allocate(0, 4) == (2, 3, 4, 6)
    assert allocator.find(b"0") == (0, 0)
    allocator.release(homes(0, 4))
    assert allocator.allocate(0, 2, extend_from=3) == (4, 0)


def test_the_tail_that_is_named_first_is_evicted_first() -> None:
    """A prefix whose head is gone is of no use; one whose tail is gone still is."""
    allocator = with_cached(4, 3, 2, 1, 0)
    for left in (3, 2, 1):
        allocator.allocate(0, 1)
        assert [allocator.find(b"%d" % i) is not None for i in range(4)] == [
            i < left for i in range(4)
        ]


def test_a_hit_revives_a_cached_block_and_makes_it_the_most_recent() -> None:
    allocator = with_cached(4, 0, 1, 2)
    home = allocator.find(b"0")
    assert home == (0, 0)
    allocator.share(home)
    assert allocator.references(home) == 1 and allocator.num_cached(0) == 2
    allocator.share(home)
    allocator.release([home])
    assert allocator.references(home) == 1
    allocator.release([home])
    assert allocator.references(home) == 0 and allocator.num_cached(0) == 3
    allocator.allocate(0, 2)  # evicts 1 and 2, older than 0 now
    assert allocator.find(b"0") == (0, 0) and allocator.find(b"1") is allocator.find(b"2") is None


def test_double_release_in_one_call_hands_nothing_out_twice() -> None:
    """DeepSpeed's BlockedAllocator.free([2, 2]) gives block 2 to two owners."""
    allocator = BlockAllocator([4], block_size=16)
    allocator.allocate(0, 4)
    with pytest.raises(ValueError, match="block 2 of rank 0 is released 2 times .* 1 references"):
        allocator.release(homes(0, 2, 2))
    assert allocator.num_free(0) == 0
    allocator.share((0, 2))
    allocator.release(homes(0, 2, 2))
    with pytest.raises(ValueError, match="block 2 of rank 0 is not allocated"):
        allocator.release(homes(0, 2))
    assert allocator.allocate(0, 1) == (2,)
    with pytest.raises(OutOfBlocksError):
        allocator.allocate(0, 1)


def test_a_bad_entry_on_another_rank_leaves_everything_as_it_was() -> None:
    allocator = BlockAllocator([3, 3], block_size=16)
    allocator.allocate(0, 3)
    held = {(0, block): 1 for block in range(3)}
    for bad, message in [
        ((1, 0), "block 0 of rank 1 is not allocated"),
        ((1, 3), r"rank 1 has no block 3 \(it has 3\)"),
        ((2, 0), "no rank 2 among 2"),
        ((-1, 0), "no rank -1 among 2"),
    ]:
        with pytest.raises(ValueError, match=message):
            allocator.release([(0, 0), bad, (0, 1)])
        allocator.check_integrity(held)
    with pytest.raises(ValueError, match="block 1 of rank 1 is not allocated"):
        allocator.share((1, 1))
    with pytest.raises(ValueError, match="no rank -1 among 2"):
        allocator.num_free(-1)


def test_put_names_one_block_by_one_key() -> None:
    allocator = BlockAllocator([4], block_size=16)
    allocator.allocate(0, 2)
    assert allocator.put(b"a", (0, 0))
    assert not allocator.put(b"a", (0, 1))  # the same content computed twice: the first stays
    assert not allocator.put(b"b", (0, 0))
    assert allocator.find(b"a") == (0, 0) and allocator.find(b"b") is None
    with pytest.raises(ValueError, match="block 2 of rank 0 is not allocated"):
        allocator.put(b"c", (0, 2))
    allocator.release(homes(0, 0, 1))
    assert (allocator.num_cached(0), allocator.num_free(0)) == (1, 3)
    with pytest.raises(ValueError, match="block 0 of rank 0 is not allocated"):
        allocator.put(b"c", (0, 0))  # cached: only a holder may give it a key


def test_forget_frees_a_cached_block_and_leaves_a_used_one() -> None:
    allocator = with_cached(4, 2, 1)
    allocator.forget((0, 1))
    assert allocator.find(b"1") is None
    assert (allocator.num_cached(0), allocator.num_free(0)) == (1, 1)
    allocator.share((0, 2))
    allocator.forget((0, 2))
    assert allocator.find(b"2") is None and allocator.references((0, 2)) == 1
    allocator.release(homes(0, 2))  # without a key it is not kept
    assert (allocator.num_cached(0), allocator.num_free(0)) == (0, 2)
    allocator.forget((0, 2))
    allocator.check_integrity({(0, 0): 1, (0, 3): 1})
    assert allocator.evictions == 0


def test_drop_cached_is_for_one_rank() -> None:
    allocator = BlockAllocator([2, 2], block_size=16)
    for rank in (0, 1):
        allocator.allocate(rank, 2)
        for block in (0, 1):
            allocator.put(b"%d/%d" % (rank, block), (rank, block))
        allocator.release(homes(rank, 1, 0))
    assert allocator.drop_cached(0) == 2
    assert (allocator.num_free(0), allocator.num_cached(0), allocator.num_cached(1)) == (2, 0, 2)
    assert allocator.find(b"0/1") is None and allocator.find(b"1/1") == (1, 1)
    assert allocator.evictions == 0


def test_a_key_moves_with_the_content() -> None:
    allocator = BlockAllocator([2, 2], block_size=16)
    allocator.allocate(0, 2)
    allocator.allocate(1, 2)
    allocator.put(b"a", (0, 0))
    allocator.move_key((0, 0), (1, 1))
    assert allocator.find(b"a") == (1, 1)
    allocator.move_key((0, 1), (1, 1))  # the source has no key: nothing to move
    assert allocator.find(b"a") == (1, 1)
    allocator.release([(0, 0), (1, 1)])
    assert (allocator.num_free(0), allocator.num_cached(1)) == (1, 1)
    allocator.move_key((1, 1), (1, 0))  # from a cached block, which is then free
    assert allocator.find(b"a") == (1, 0)
    assert (allocator.num_free(1), allocator.num_cached(1)) == (1, 0)
    allocator.put(b"b", (0, 1))
    with pytest.raises(ValueError, match="block 0 of rank 1 has a key already"):
        allocator.move_key((0, 1), (1, 0))
    with pytest.raises(ValueError, match="block 1 of rank 1 is not allocated"):
        allocator.move_key((0, 1), (1, 1))
    assert allocator.find(b"b") == (0, 1)
    allocator.check_integrity({(0, 1): 1, (1, 0): 1})


def test_growth_stays_one_extent_while_the_next_block_is_free() -> None:
    allocator = BlockAllocator([10], block_size=16)
    mine = list(allocator.allocate(0, 3))
    other = allocator.allocate(0, 1)
    allocator.release(homes(0, *other))
    for _ in range(4):
        mine += allocator.allocate(0, 1, extend_from=mine[-1])
    assert mine == list(range(7))


def test_a_short_run_after_the_last_block_is_used_before_others() -> None:
    allocator = BlockAllocator([13], block_size=16)
    allocator.allocate(0, 13)
    allocator.release(homes(0, 2, 3, 6, 7, 8, 10, 11))
    assert allocator.allocate(0, 4, extend_from=1) == (2, 3, 10, 11)  # 10: the best fit for two


def test_room_after_is_the_free_run_right_after_a_block() -> None:
    allocator = BlockAllocator([10, 4], 16)
    first = allocator.allocate(0, 10)
    assert [allocator.room_after((0, block)) for block in (0, 9)] == [0, 0]
    allocator.release([(0, block) for block in first[3:6]])
    assert [allocator.room_after((0, block)) for block in (1, 2, 6)] == [0, 3, 0]
    assert allocator.room_after((1, 1)) == 0, "in the midst of a free run: none begins there"
    with pytest.raises(ValueError, match="no rank 2"):
        allocator.room_after((2, 0))


def test_the_shortest_run_that_holds_the_request_is_taken() -> None:
    for lengths in [(7, 6), (6, 7), (9, 6), (15, 8)]:
        allocator = BlockAllocator([40], block_size=16)
        allocator.allocate(0, 40)
        for start, length in zip((0, 20), lengths, strict=True):
            allocator.release(homes(0, *range(start, start + length)))
        start = 20 * lengths.index(min(lengths))
        assert allocator.allocate(0, 5) == tuple(range(start, start + 5))


def test_neighbours_that_grow_side_by_side_keep_long_extents() -> None:
    """Two requests that take single blocks in turn do not interleave block by block."""
    allocator = BlockAllocator([256], block_size=16)
    held = [list(allocator.allocate(0, 20)), list(allocator.allocate(0, 20))]
    for _ in range(40):
        for blocks in held:
            blocks += allocator.allocate(0, 1, extend_from=blocks[-1])
    for blocks in held:
        assert len(runs_of(set(blocks))) <= 3


def test_what_does_not_fit_in_one_run_comes_in_few_pieces() -> None:
    allocator = BlockAllocator([100], block_size=16)
    allocator.allocate(0, 100)
    allocator.release(homes(0, *range(0, 20), *range(30, 60), *range(70, 80), 90, 92, 94))
    taken = allocator.allocate(0, 45)
    assert taken == (*range(30, 60), *range(0, 15))
    assert allocator.allocate(0, 1) == (90,)  # single holes are used up before longer runs


def test_a_fit_beyond_the_bounded_look_is_still_a_fit() -> None:
    """More runs of one size class than are looked at, all but the last too short."""
    runs = FreeList(100 * (LOOK_AT + 3))
    runs.take(runs.num_free)
    for i in range(LOOK_AT + 2):
        runs.give(range(100 * i, 100 * i + 33))
    runs.give(range(100 * (LOOK_AT + 2), 100 * (LOOK_AT + 2) + 99))
    assert runs.take(40) == tuple(range(100 * (LOOK_AT + 2), 100 * (LOOK_AT + 2) + 40))
    runs.check()
    assert len(set(runs.take(runs.num_free))) == 33 * (LOOK_AT + 2) + 59
    assert runs.num_free == 0 and runs.runs() == []


def test_nothing_walks_over_the_blocks() -> None:
    """A trillion blocks: any walk over them would never end."""
    allocator = BlockAllocator([10**12, 10**12], block_size=64)
    first = allocator.allocate(0, 3)
    second = allocator.allocate(0, 3)
    allocator.release(homes(0, *first))
    assert allocator.allocate(0, 2, extend_from=second[-1]) == (6, 7)
    allocator.release(homes(0, *second, 6, 7))
    assert allocator.available() == [10**12, 10**12]
    allocator.check_integrity({})


def fragmented(capacity: int) -> Callable[[], None]:
    """A request that comes and goes while single blocks are free; most of them were allocated."""
    allocator = BlockAllocator([capacity], block_size=16)
    allocator.allocate(0, capacity)
    allocator.release(homes(0, *range(0, capacity, 2)))
    allocator.allocate(0, capacity * 2 // 5)

    def turn() -> None:
        mine = allocator.allocate(0, 2)
        mine += allocator.allocate(0, 1, extend_from=mine[-1])
        allocator.release(homes(0, *mine))

    return turn


def just_too_short(capacity: int) -> Callable[[], None]:
    """Many free runs of four blocks; a request for seven, of the same size class, fits in none."""
    allocator = BlockAllocator([capacity], block_size=16)
    allocator.allocate(0, capacity)
    allocator.release(homes(0, *(block for block in range(capacity) if block % 5)))

    def turn() -> None:
        allocator.release(homes(0, *allocator.allocate(0, 7)))

    return turn


def all_cached(capacity: int) -> Callable[[], None]:
    """A request that hits one block and evicts another, after most cached ones were evicted."""
    allocator = with_cached(capacity, *range(0, capacity, 2), *range(1, capacity, 2))
    allocator.allocate(0, capacity * 4 // 5)
    recent = [b"%d" % block for block in range(capacity)][-3:]
    made = 0

    def turn() -> None:
        nonlocal made
        made += 1
        home = allocator.find(recent[-1])
        assert home is not None
        allocator.share(home)
        (block,) = allocator.allocate(0, 1)
        recent.append(b"new %d" % made)
        assert allocator.put(recent[-1], (0, block))
        allocator.release([(0, block), home])
        allocator.available()

    return turn


@pytest.mark.parametrize("world", [fragmented, just_too_short, all_cached])
def test_a_call_costs_the_same_with_100_times_the_blocks(
    world: Callable[[int], Callable[[], None]],
) -> None:
    """Linear work would cost 100 times as much; the best of many short timings ignores noise."""
    turns = {capacity: world(capacity) for capacity in (1_000, 100_000)}
    best = dict.fromkeys(turns, float("inf"))
    for _ in range(60):
        for capacity, turn in turns.items():
            start = perf_counter()
            for _ in range(20):
                turn()
            best[capacity] = min(best[capacity], perf_counter() - start)
    assert best[100_000] < 4 * best[1_000], best


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda a: a._ranks[0].references.update({0: 1}), "block 0 of rank 0 is in two states"),
        (lambda a: a._ranks[0].references.pop(1), "block 1 of rank 0 is in no state"),
        (lambda a: a._ranks[0].references.pop(3), "blocks up to 3 known, it has 4"),
        (lambda a: a._ranks[0].references.update({4: 1}), "blocks up to 5 known, it has 4"),
        (lambda a: a._ranks[0].references.update({1: 0}), "used, no reference"),
        (lambda a: a._ranks[0].cached.update({1: None}), "block 1 of rank 0 is in two states"),
        (lambda a: a._ranks[0].free._length_at.update({0: 2}), "run ends and runs differ"),
        (lambda a: a._ranks[0].free._classes[1].clear(), "size classes and runs differ"),
        (lambda a: setattr(a._ranks[0].free, "_occupied", 0), "occupied classes"),
        (lambda a: setattr(a._ranks[0].free, "num_free", 2), "free count is wrong"),
        (lambda a: a._home_of.pop(b"2"), "keys of blocks and blocks of keys differ"),
        (lambda a: a._home_of.update({b"x": (0, 2)}), "two keys name one block"),
        (lambda a: (a._home_of.clear(), a._key_of.clear()), r"cached without a key: \[\(0, 2\)\]"),
        (
            lambda a: (a._home_of.update({b"x": (0, 0)}), a._key_of.update({(0, 0): b"x"})),
            r"free blocks with a key: \[\(0, 0\)\]",
        ),
        (lambda a: a.share((0, 1)), r"differ: \{\(0, 1\): \(2, 1\)\}"),
        (lambda a: a.share((0, 2)), r"differ: \{\(0, 2\): \(1, 0\)\}"),
    ],
)
def test_check_integrity_sees_damage(
    damage: Callable[[BlockAllocator], object], message: str
) -> None:
    allocator = with_cached(4, 2)
    allocator.release(homes(0, 0))
    held = {(0, 1): 1, (0, 3): 1}  # 0 free, 2 cached
    allocator.check_integrity(held)
    damage(allocator)
    with pytest.raises(AssertionError, match=message):
        allocator.check_integrity(held)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="got 0 and"):
        BlockAllocator([4], block_size=0)
    with pytest.raises(ValueError, match=r"\[4, -1\]"):
        BlockAllocator([4, -1], block_size=16)
    allocator = with_cached(4, 1)
    allocator.release(homes(0, 0))
    with pytest.raises(ValueError, match="-1 blocks"):
        allocator.allocate(0, -1)
    for block in (0, 1):  # free, cached
        with pytest.raises(ValueError, match=f"block {block} of rank 0: not allocated"):
            allocator.allocate(0, 1, extend_from=block)
    assert issubclass(OutOfBlocksError, DsCpError)
