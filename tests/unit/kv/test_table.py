"""A request's table against a model that keeps one (rank, slot) per position."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_cp.kv import SequenceTable
from ds_cp.kv.table import NEAR

Pairs = tuple[tuple[int, int], ...]
Home = tuple[int, int]


def maximal_runs(numbers: list[int]) -> Pairs:
    """The fewest (start, length) runs that give ``numbers`` in order."""
    runs: list[tuple[int, int]] = []
    for i, n in enumerate(numbers):
        if i and numbers[i - 1] == n - 1:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((n, 1))
    return tuple(runs)


def part(table: SequenceTable, rank: int) -> tuple[Pairs, Pairs]:
    """Positions on a rank, and their slots."""
    blocks = table.blocks_on(rank)
    runs = blocks.runs()
    assert table.runs_on(rank) == runs and blocks.num_keys == sum(n for _, n in runs)
    return runs, blocks.extents(table.block_size)


def check(table: SequenceTable, homes: list[Home], tokens: int, ranks: int) -> None:
    """Everything the table says, worked out from ``homes`` position by position."""
    size = table.block_size
    places = [(homes[p // size][0], homes[p // size][1] * size + p % size) for p in range(tokens)]
    assert (table.homes, table.num_tokens) == (homes, tokens)
    assert table.open_slots == len(homes) * size - tokens
    assert table.span == tuple(sorted({rank for rank, _ in homes}))
    assert table.width == len(table.span)
    assert table.last_rank == (homes[-1][0] if homes else -1)
    assert [table.slot(p) for p in range(tokens)] == places
    for index in range(len(homes) + 1):
        assert table.ranks_from(index) == len({rank for rank, _ in homes[index:]})
    for rank in range(ranks):
        assert table.num_blocks(rank) == sum(r == rank for r, _ in homes)
        there = [home for home in homes[-NEAR:] if home[0] == rank]
        assert table.newest_on(rank) == (there[-1] if there else None)
        mine = [p for p in range(tokens) if places[p][0] == rank]
        runs, extents = part(table, rank)
        assert runs == maximal_runs(mine)
        assert extents == maximal_runs([places[p][1] for p in mine])


@given(st.integers(1, 6), st.integers(1, 4), st.data())
@settings(max_examples=200)
def test_table_equals_the_model(size: int, ranks: int, data: st.DataObject) -> None:
    """Appended, one by one or many at a time, and moved, with parts asked for now and then."""
    home = st.tuples(st.integers(0, ranks - 1), st.integers(0, 5) | st.integers(0, 400))
    homes = data.draw(st.lists(home, max_size=3))
    tokens = len(homes) * size - data.draw(st.integers(0, size - 1)) if homes else 0
    table = SequenceTable(size, tuple(homes), tokens)
    for _ in range(data.draw(st.integers(0, 12))):
        what = data.draw(st.sampled_from(["append", "one", "replace", "look"]))
        if what == "append":
            count = data.draw(st.integers(0, 9))
            needed = 0
            while (len(homes) + needed) * size < tokens + count:
                needed += 1
            assert table.blocks_for(count) == needed
            fresh = data.draw(st.lists(home, min_size=needed, max_size=needed))
            table.append(fresh, count)
            homes += fresh
            tokens += count
        elif what == "one" and table.open_slots:
            table.append_one()
            tokens += 1
        elif what == "replace" and homes:
            index = data.draw(st.integers(0, len(homes) - 1))
            homes[index] = data.draw(home)
            table.replace(index, homes[index])
        else:
            check(table, homes, tokens, ranks)
    check(table, homes, tokens, ranks)


def test_by_hand() -> None:
    table = SequenceTable(4)
    assert (table.num_tokens, table.span, table.last_rank, table.open_slots) == (0, (), -1, 0)
    table.append([(1, 5), (0, 9), (1, 6)], 10)
    assert part(table, 1) == (((0, 4), (8, 2)), ((20, 6),)), "adjacent slots are one extent"
    assert part(table, 0) == (((4, 4),), ((36, 4),))
    assert part(table, 2) == ((), ())
    table.append_one()
    table.append([(0, 2)], 2)
    assert part(table, 1)[0] == ((0, 4), (8, 4))
    assert part(table, 0) == (((4, 4), (12, 1)), ((36, 4), (8, 1)))
    assert (table.slot(11), table.slot(12)) == ((1, 27), (0, 8))
    table.replace(1, (2, 0))
    assert (table.span, table.num_blocks(0), part(table, 2)) == (
        (0, 1, 2),
        1,
        (((4, 4),), ((0, 4),)),
    )


def test_blocks_grow_with_the_table_and_a_cut_of_them_does_not() -> None:
    table = SequenceTable(4, [(0, 0)], 2)
    blocks = table.blocks_on(0)
    cut = blocks[:]
    table.append_one()
    table.append([(0, 1)], 2)
    assert list(cut) == [(0, 0, 2)] and list(blocks) == [(0, 0, 4), (1, 4, 1)]
    assert (cut.num_keys, blocks.num_keys) == (2, 5) and table.blocks_on(0) is blocks
    table.replace(0, (1, 9))
    assert list(table.blocks_on(0)) == [(1, 4, 1)] and list(table.blocks_on(1)) == [(9, 0, 4)]


@pytest.mark.parametrize(
    ("tokens", "homes", "message"),
    [
        (3, [], r"3 tokens with 2 open slots need 1 new blocks of 4, got 0"),
        (2, [(0, 7)], r"need 0 new blocks of 4, got 1"),
        (7, [(0, 7)], r"need 2 new blocks of 4, got 1"),
        (0, [(0, 7)], r"need 0 new blocks of 4, got 1"),
    ],
)
def test_a_wrong_append_is_refused_with_nothing_changed(
    tokens: int, homes: list[Home], message: str
) -> None:
    table = SequenceTable(4, [(0, 1), (1, 2)], 6)
    with pytest.raises(ValueError, match=message):
        table.append(homes, tokens)
    check(table, [(0, 1), (1, 2)], 6, 3)


@pytest.mark.parametrize(("homes", "tokens"), [([], 1), ([(0, 0)], 5), ([(0, 0)], -1)])
def test_tokens_without_blocks_are_refused(homes: list[Home], tokens: int) -> None:
    with pytest.raises(ValueError, match=rf"{len(homes)} blocks of 4 do not hold {tokens} tokens"):
        SequenceTable(4, homes, tokens)
