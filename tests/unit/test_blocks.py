"""The block allocator against a model that is only a set of free numbers per rank."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ds_cp.errors import DsCpError
from ds_cp.kv import BlockAllocator, OutOfBlocksError


def free_runs(free: set[int]) -> list[list[int]]:
    """The maximal runs of adjacent numbers in ``free``."""
    runs: list[list[int]] = []
    for block in sorted(free):
        if runs and runs[-1][-1] == block - 1:
            runs[-1].append(block)
        else:
            runs.append([block])
    return runs


def naive_allocate(free: set[int], n: int, extend_from: int | None) -> list[int]:
    """The rule of ``allocate``, worked out from the bare set; takes the blocks out of ``free``."""
    taken: list[int] = []
    if extend_from is not None:
        while len(taken) < n and extend_from + 1 + len(taken) in free:
            taken.append(extend_from + 1 + len(taken))
    if extend_from is not None and n and not taken:  # growth away from home leaves room both ways
        largest = sorted(free_runs(free), key=lambda run: (-len(run), run[0]))[0]
        skip = (len(largest) - n) // 2
        if skip > 0:
            taken = largest[skip : skip + n]
    free.difference_update(taken)
    while len(taken) < n:
        missing = n - len(taken)
        runs = free_runs(free)
        enough = [run for run in runs if len(run) >= missing]
        if enough:
            chosen = sorted(enough, key=lambda run: (len(run), run[0]))[0][:missing]
        else:
            chosen = sorted(runs, key=lambda run: (-len(run), run[0]))[0]
        taken += chosen
        free.difference_update(chosen)
    return taken


class AllocatorMachine(RuleBasedStateMachine):
    """Allocate, extend, free and misuse in any order; the books always equal the model's."""

    @initialize(capacities=st.lists(st.integers(0, 24), min_size=1, max_size=4))
    def start(self, capacities: list[int]) -> None:
        self.allocator = BlockAllocator(capacities, block_size=16)
        self.capacities = capacities
        self.free = [set(range(n)) for n in capacities]
        self.held: list[tuple[int, tuple[int, ...]]] = []

    def used(self) -> list[tuple[int, int]]:
        return [(rank, block) for rank, blocks in self.held for block in blocks]

    @rule(data=st.data())
    def allocate(self, data: st.DataObject) -> None:
        rank = data.draw(st.integers(0, len(self.capacities) - 1))
        have = len(self.free[rank])
        n = data.draw(st.integers(0, have + 2))
        choices: list[int | None] = [None, *(b for r, b in self.used() if r == rank)]
        extend_from = data.draw(st.sampled_from(choices))
        if n > have:
            with pytest.raises(OutOfBlocksError) as caught:
                self.allocator.allocate(rank, n, extend_from)
            assert (caught.value.rank, caught.value.want, caught.value.have) == (rank, n, have)
            return
        blocks = self.allocator.allocate(rank, n, extend_from)
        assert not {(rank, block) for block in blocks} & set(self.used()), "handed out twice"
        assert list(blocks) == naive_allocate(self.free[rank], n, extend_from)
        self.held.append((rank, blocks))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def free_one(self, data: st.DataObject) -> None:
        rank, blocks = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        order = data.draw(st.permutations(blocks))
        self.allocator.free(rank, order)
        self.free[rank].update(blocks)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def free_part(self, data: st.DataObject) -> None:
        i = data.draw(st.integers(0, len(self.held) - 1))
        rank, blocks = self.held[i]
        kept = data.draw(st.integers(0, len(blocks)))
        self.allocator.free(rank, blocks[kept:])
        self.free[rank].update(blocks[kept:])
        self.held[i] = (rank, blocks[:kept])

    @rule()
    def free_everything(self) -> None:
        by_rank: dict[int, list[int]] = {}
        for rank, block in self.used():
            by_rank.setdefault(rank, []).append(block)
        self.allocator.free_all(by_rank)
        self.held = []
        self.free = [set(range(n)) for n in self.capacities]
        # nothing has leaked or splintered: each rank gives all it has as one extent again
        for rank, n in enumerate(self.capacities):
            assert self.allocator.allocate(rank, n) == tuple(range(n))
            self.allocator.free(rank, range(n))

    @rule(data=st.data())
    def misuse(self, data: st.DataObject) -> None:
        """A good list with one bad entry anywhere is refused whole, over several ranks too."""
        good = data.draw(st.lists(st.sampled_from(self.used()), unique=True)) if self.used() else []
        rank = data.draw(st.integers(0, len(self.capacities) - 1))
        bad = [-1, self.capacities[rank], *self.free[rank], *(b for r, b in good if r == rank)]
        entry = data.draw(st.sampled_from(bad))
        call: dict[int, list[int]] = {}
        for r, block in good:
            call.setdefault(r, []).append(block)
        mine = call.setdefault(rank, [])
        mine.insert(data.draw(st.integers(0, len(mine))), entry)
        with pytest.raises(ValueError, match=f"block {entry}"):
            self.allocator.free_all(call)

    @invariant()
    def books_balance(self) -> None:
        if not hasattr(self, "allocator"):
            return
        self.allocator.check_integrity()
        for rank, free in enumerate(self.free):
            assert self.allocator.num_free(rank) == len(free)
            assert self.allocator.num_used(rank) == self.capacities[rank] - len(free)
        assert self.allocator.num_free_total == sum(map(len, self.free))


TestAllocatorMachine = AllocatorMachine.TestCase
TestAllocatorMachine.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def test_unequal_ranks_sum_up() -> None:
    allocator = BlockAllocator([2, 0, 6], block_size=64)
    assert allocator.blocks_per_rank == (2, 0, 6)
    assert allocator.capacity_tokens == 8 * 64
    assert allocator.num_free_total == 8
    with pytest.raises(OutOfBlocksError, match="rank 1 has 0 free KV blocks, 1 are needed"):
        allocator.allocate(1, 1)
    assert allocator.allocate(2, 6) == (0, 1, 2, 3, 4, 5)


def test_double_free_in_one_call_hands_nothing_out_twice() -> None:
    """DeepSpeed's BlockedAllocator.free([2, 2]) gives block 2 to two owners."""
    allocator = BlockAllocator([4], block_size=16)
    allocator.allocate(0, 4)
    with pytest.raises(ValueError, match="block 2 of rank 0 is named twice"):
        allocator.free(0, [2, 2])
    assert allocator.num_free(0) == 0
    allocator.free(0, [2])
    with pytest.raises(ValueError, match="block 2 of rank 0 is not allocated"):
        allocator.free(0, [2])
    assert allocator.allocate(0, 1) == (2,)
    with pytest.raises(OutOfBlocksError):
        allocator.allocate(0, 1)


def test_ids_of_ranks_are_separate() -> None:
    allocator = BlockAllocator([3, 3], block_size=16)
    allocator.allocate(0, 3)
    with pytest.raises(ValueError, match="block 0 of rank 1 is not allocated"):
        allocator.free(1, [0])
    with pytest.raises(ValueError, match="no rank -1 among 2"):
        allocator.num_free(-1)


def test_growth_stays_one_extent_while_the_next_block_is_free() -> None:
    allocator = BlockAllocator([10], block_size=16)
    mine = list(allocator.allocate(0, 3))
    other = allocator.allocate(0, 1)
    allocator.free(0, other)
    for _ in range(4):
        mine += allocator.allocate(0, 1, extend_from=mine[-1])
    assert mine == list(range(7))


def test_a_short_run_after_the_last_block_is_used_before_others() -> None:
    allocator = BlockAllocator([12], block_size=16)
    allocator.allocate(0, 12)
    allocator.free_all({0: [2, 3, 6, 7, 8, 10]})
    assert allocator.allocate(0, 4, extend_from=1) == (2, 3, 6, 7)
    assert allocator.allocate(0, 1) == (8,)  # runs {8} and {10}: equal, the first


def test_nothing_is_linear_in_the_number_of_blocks() -> None:
    """A trillion blocks: any walk over them would never end."""
    allocator = BlockAllocator([10**12, 10**12], block_size=64)
    first = allocator.allocate(0, 3)
    second = allocator.allocate(0, 3)
    allocator.free(0, first)
    assert allocator.allocate(0, 2, extend_from=second[-1]) == (6, 7)
    allocator.free_all({0: [*second, 6, 7]})
    assert allocator.num_free_total == 2 * 10**12
    allocator.check_integrity()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda books: books.used.add(0), r"used blocks \[0\] in a free run"),
        (lambda books: books.used.discard(1), "used != 4"),
        (lambda books: books.length_at.update({0: 2}), "runs differ"),
    ],
)
def test_check_integrity_sees_damage(damage: object, message: str) -> None:
    allocator = BlockAllocator([4], block_size=16)
    allocator.allocate(0, 2)
    allocator.free(0, [0])
    damage(allocator._ranks[0])  # type: ignore[operator]
    with pytest.raises(AssertionError, match=message):
        allocator.check_integrity()


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="got 0 and"):
        BlockAllocator([4], block_size=0)
    with pytest.raises(ValueError, match=r"\[4, -1\]"):
        BlockAllocator([4, -1], block_size=16)
    allocator = BlockAllocator([4], block_size=16)
    with pytest.raises(ValueError, match="-1 blocks"):
        allocator.allocate(0, -1)
    with pytest.raises(ValueError, match="block 0 of rank 0: not allocated"):
        allocator.allocate(0, 1, extend_from=0)
    assert issubclass(OutOfBlocksError, DsCpError)


def test_neighbours_that_grow_side_by_side_keep_long_extents() -> None:
    """Two requests that take single blocks in turn do not interleave block by block."""
    allocator = BlockAllocator([256], block_size=16)
    held = [list(allocator.allocate(0, 20)), list(allocator.allocate(0, 20))]
    for _ in range(40):
        for blocks in held:
            blocks += allocator.allocate(0, 1, extend_from=blocks[-1])
    for blocks in held:
        assert len(free_runs(set(blocks))) <= 3
