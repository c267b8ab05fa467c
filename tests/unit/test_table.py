"""A request's table against a model that keeps one list of (position, slot) per rank."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_cp.kv import SequenceTable, new_blocks_needed

Pairs = tuple[tuple[int, int], ...]


def expand(runs: Pairs) -> list[int]:
    found = []
    for start, length in runs:
        assert length > 0
        for i in range(length):
            found.append(start + i)
    return found


def maximal_runs(numbers: list[int]) -> Pairs:
    """The fewest (start, length) runs that give ``numbers`` in order."""
    runs: list[tuple[int, int]] = []
    for i, n in enumerate(numbers):
        if i and numbers[i - 1] == n - 1:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((n, 1))
    return tuple(runs)


class Model:
    """Blocks and positions per rank as flat lists; everything else is worked out on demand."""

    def __init__(self, block_size: int, ranks: int) -> None:
        self.block_size = block_size
        self.blocks: list[list[int]] = [[] for _ in range(ranks)]
        self.positions: list[list[int]] = [[] for _ in range(ranks)]

    def slots(self, rank: int) -> list[int]:
        size = self.block_size
        every = [b * size + i for b in self.blocks[rank] for i in range(size)]
        return every[: len(self.positions[rank])]

    def last_rank(self) -> int:
        newest = max((p for held in self.positions for p in held), default=None)
        return next((r for r, held in enumerate(self.positions) if newest in held), -1)


@given(st.integers(1, 6), st.integers(1, 4), st.data())
@settings(max_examples=200, deadline=None)
def test_table_equals_the_model(block_size: int, ranks: int, data: st.DataObject) -> None:
    table = SequenceTable(block_size, ranks)
    model = Model(block_size, ranks)
    next_position = 0
    for _ in range(data.draw(st.integers(0, 10))):
        rank = data.draw(st.integers(0, ranks - 1))
        lengths = data.draw(st.lists(st.integers(0, 9), max_size=3))
        runs = []
        for length in lengths:
            runs.append((next_position, length))
            next_position += length + data.draw(st.integers(0, 2))
        tokens = sum(lengths)
        held, stored = len(model.blocks[rank]), len(model.positions[rank])
        needed = 0
        while (held + needed) * block_size < stored + tokens:
            needed += 1
        assert new_blocks_needed(table, rank, tokens) == needed
        unheld = [b for b in range(400) if b not in model.blocks[rank]]
        choice = data.draw(st.sampled_from([unheld, unheld[::-1], unheld[::2], unheld[::3]]))
        start = data.draw(st.integers(0, 20))
        fresh = choice[start : start + needed]
        written = table.append(rank, tuple(runs), fresh)
        model.blocks[rank] += fresh
        model.positions[rank] += [p for s, n in runs for p in range(s, s + n)]
        assert expand(written) == model.slots(rank)[stored:]

        for r in range(ranks):
            assert table.blocks(r) == tuple(model.blocks[r])
            assert table.stored(r) == len(model.positions[r])
            assert table.open_slots(r) == len(model.blocks[r]) * block_size - table.stored(r)
            assert table.runs(r) == maximal_runs(model.positions[r])
            assert table.extents(r) == maximal_runs(model.slots(r))
        assert table.num_tokens == sum(map(len, model.positions))
        assert table.span == tuple(r for r in range(ranks) if model.positions[r])
        assert table.last_rank == model.last_rank()
        assert table.all_blocks() == {r: tuple(b) for r, b in enumerate(model.blocks) if b}


def test_by_hand() -> None:
    table = SequenceTable(block_size=4, num_ranks=2)
    assert (table.num_tokens, table.span, table.last_rank) == (0, (), -1)
    assert table.append(1, ((0, 3), (9, 3)), [5, 6]) == ((20, 6),)
    assert table.append(0, ((3, 6),), [9, 2]) == ((36, 4), (8, 2))
    assert table.last_rank == 1
    assert table.append(1, ((12, 3),), [0]) == ((26, 2), (0, 1))
    assert table.runs(1) == ((0, 3), (9, 6))
    assert table.extents(1) == ((20, 8), (0, 1))
    assert table.extents(0) == ((36, 4), (8, 2))
    assert table.open_slots(0) == 2
    assert table.span == (0, 1)


def test_zigzag_newest_token_is_on_the_rank_of_the_last_back_chunk() -> None:
    table = SequenceTable(block_size=4, num_ranks=2)
    table.append(0, ((0, 4), (12, 4)), [0, 1])
    table.append(1, ((4, 8),), [0, 1])
    assert table.last_rank == 0


@pytest.mark.parametrize(
    ("runs", "blocks", "message"),
    [
        (((6, 3),), [], r"2 open slots need 1 new blocks of 4, got 0"),
        (((6, 2),), [7], r"need 0 new blocks of 4, got 1"),
        (((6, 7),), [7, 7], r"\[7, 7\] of rank 0 repeat"),
        (((6, 7),), [7, 2], r"\[7, 2\] of rank 0 repeat or are held"),
        (((6, -1),), [], r"negative"),
    ],
)
def test_a_wrong_append_is_refused_with_nothing_changed(
    runs: Pairs, blocks: list[int], message: str
) -> None:
    table = SequenceTable(block_size=4, num_ranks=2)
    table.append(0, ((0, 6),), [1, 2])
    with pytest.raises(ValueError, match=message):
        table.append(0, runs, blocks)
    assert table.runs(0) == ((0, 6),) and table.blocks(0) == (1, 2)
    assert table.extents(0) == ((4, 6),) and table.num_tokens == 6
    assert table.append(0, ((6, 2),), []) == ((10, 2),)


def test_unknown_rank_and_bad_sizes() -> None:
    table = SequenceTable(block_size=4, num_ranks=2)
    for rank in (-1, 2):
        with pytest.raises(ValueError, match=f"no rank {rank} among 2"):
            table.stored(rank)
    with pytest.raises(ValueError, match="got 0 and 2"):
        SequenceTable(0, 2)
    with pytest.raises(ValueError, match="cannot store -1"):
        new_blocks_needed(table, 0, -1)
