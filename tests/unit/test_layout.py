"""Token layout against position-by-position re-implementations."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_cp import layout
from ds_cp.layout import Runs
from tests.helpers.pairs import causal_work

runs_of_positions = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 12)), max_size=8).map(
    tuple
)
counts_lists = st.lists(st.integers(0, 40), min_size=1, max_size=8)


def expand(runs: Runs) -> list[int]:
    found = []
    for start, length in runs:
        for i in range(length):
            found.append(start + i)
    return found


def is_tight(runs: Runs) -> bool:
    """No empty run, no two neighbours that could be one."""
    fused = any(a[0] + a[1] == b[0] for a, b in zip(runs, runs[1:], strict=False))
    return not fused and all(length > 0 for _, length in runs)


def naive_zigzag(start: int, counts: list[int], unit: int) -> list[list[int]]:
    """Hand out position by position: up through the ranks, then down again."""
    fronts = []
    for count in counts:
        multiples = range(0, count + unit, unit)
        distances = [(abs(m - Fraction(count, 2)), -m) for m in multiples]
        fronts.append(-min(distances)[1])
    held: list[list[int]] = [[] for _ in counts]
    position = start
    for rank in range(len(counts)):
        while len(held[rank]) < fronts[rank]:
            held[rank].append(position)
            position += 1
    for rank in reversed(range(len(counts))):
        while len(held[rank]) < counts[rank]:
            held[rank].append(position)
            position += 1
    return held


def naive_work(q_positions: list[int], k_positions: list[int]) -> int:
    return sum(1 for q in q_positions for k in k_positions if k <= q)


@given(runs_of_positions)
def test_join_keeps_the_positions_and_is_tight(runs: Runs) -> None:
    joined = layout.join(runs)
    assert expand(joined) == expand(runs)
    assert is_tight(joined)
    assert layout.total(runs) == len(expand(runs))
    assert layout.positions(runs) == expand(runs)


@given(runs_of_positions, st.data())
def test_head_and_tail_cut_in_storage_order(runs: Runs, data: st.DataObject) -> None:
    tokens = expand(runs)
    n = data.draw(st.integers(0, len(tokens)))
    assert expand(layout.head(runs, n)) == tokens[:n]
    assert expand(layout.tail(runs, n)) == tokens[len(tokens) - n :]
    assert is_tight(layout.head(runs, n)) and is_tight(layout.tail(runs, n))


@pytest.mark.parametrize("cut", [layout.head, layout.tail])
@pytest.mark.parametrize("n", [-1, 6])
def test_cutting_more_than_there_is_says_how_many_there_are(cut: object, n: int) -> None:
    with pytest.raises(ValueError, match=f"{n} tokens from runs that hold 5"):
        cut(((0, 2), (7, 3)), n)  # type: ignore[operator]


@given(st.integers(0, 10**6), st.integers(1, 40))
def test_split_even(n: int, parts: int) -> None:
    shares = layout.split_even(n, parts)
    assert len(shares) == parts and sum(shares) == n
    assert max(shares) - min(shares) <= 1
    assert shares == sorted(shares, reverse=True)


@given(st.integers(0, 10**5), st.lists(st.integers(0, 1000), min_size=1, max_size=10))
def test_split_weighted_is_within_one_of_the_exact_share(n: int, weights: list[int]) -> None:
    if n and not any(weights):
        with pytest.raises(ValueError, match="all are zero"):
            layout.split_weighted(n, weights)
        return
    shares = layout.split_weighted(n, weights)
    assert sum(shares) == n
    for share, weight in zip(shares, weights, strict=True):
        exact = Fraction(n * weight, sum(weights)) if n else Fraction(0)
        assert abs(share - exact) < 1
        assert weight or share == 0
    # largest remainder: no share rounded down has a larger remainder than one rounded up
    if n:
        exacts = [Fraction(n * w, sum(weights)) for w in weights]
        up = [e % 1 for e, s in zip(exacts, shares, strict=True) if s > e]
        down = [e % 1 for e, s in zip(exacts, shares, strict=True) if s < e]
        assert not up or not down or min(up) >= max(down)


def test_split_weighted_by_hand() -> None:
    assert layout.split_weighted(10, [1, 3]) == [3, 7]  # 2.5 and 7.5: the first of equals rounds up
    assert layout.split_weighted(10, [0, 1, 0, 1]) == [0, 5, 0, 5]
    assert layout.split_weighted(2, [1, 1, 1]) == [1, 1, 0]
    assert layout.split_weighted(0, [0, 0]) == [0, 0]
    with pytest.raises(ValueError, match="negative"):
        layout.split_weighted(3, [2, -1])


parts_with_caps = st.lists(
    st.tuples(st.integers(0, 20), st.integers(0, 30)), min_size=1, max_size=7
)


@given(st.integers(0, 120), parts_with_caps)
def test_split_capped(n: int, parts: list[tuple[int, int]]) -> None:
    weights, caps = [p[0] for p in parts], [p[1] for p in parts]
    room = sum(cap for weight, cap in parts if weight)
    if n > room:
        with pytest.raises(ValueError, match=f"sum to {room}"):
            layout.split_capped(n, weights, caps)
        return
    shares = layout.split_capped(n, weights, caps)
    assert sum(shares) == n
    assert all(0 <= s <= c for s, c in zip(shares, caps, strict=True))
    assert all(w or not s for s, w in zip(shares, weights, strict=True))
    # fair: tokens per weight of a part below its cap is (within rounding) the highest of all
    for i, (share, weight) in enumerate(zip(shares, weights, strict=True)):
        if weight and share < caps[i]:
            for other, other_weight in zip(shares, weights, strict=True):
                if other_weight:
                    assert Fraction(other - 1, other_weight) < Fraction(share + 1, weight)


def test_split_capped_by_hand() -> None:
    assert layout.split_capped(10, [1, 1], [3, 20]) == [3, 7]
    assert layout.split_capped(10, [1, 2, 1], [10, 2, 10]) == [4, 2, 4]
    assert layout.split_capped(4, [5, 5], [4, 4]) == [2, 2]


@given(st.integers(0, 500), counts_lists, st.integers(1, 16))
def test_zigzag_equals_handing_out_one_by_one(start: int, counts: list[int], unit: int) -> None:
    assignment = layout.zigzag(start, counts, unit)
    assert [expand(runs) for runs in assignment] == naive_zigzag(start, counts, unit)
    assert all(is_tight(runs) and len(runs) <= 2 for runs in assignment)


@given(st.integers(0, 500), counts_lists, st.sampled_from(layout.LAYOUTS), st.integers(1, 16))
def test_assign_is_a_partition_with_exact_counts(
    start: int, counts: list[int], name: str, unit: int
) -> None:
    assignment = layout.assign(name, start, counts, unit)
    assert [len(expand(runs)) for runs in assignment] == counts
    assert sorted(p for runs in assignment for p in expand(runs)) == list(
        range(start, start + sum(counts))
    )
    assert all(expand(runs) == sorted(expand(runs)) for runs in assignment)
    for position in range(start, start + sum(counts)):
        assert position in expand(assignment[layout.owner_of(assignment, position)])


@given(st.integers(0, 500), counts_lists)
def test_contiguous_is_rank_order(start: int, counts: list[int]) -> None:
    found = [p for runs in layout.contiguous(start, counts) for p in expand(runs)]
    assert found == list(range(start, start + sum(counts)))


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 5, 8])
def test_equal_counts_give_the_classic_chunks(ranks: int) -> None:
    """2N equal chunks; rank r holds chunk r and chunk 2N-1-r."""
    half = 6
    chunks = [list(range(i * half, (i + 1) * half)) for i in range(2 * ranks)]
    assignment = layout.zigzag(0, [2 * half] * ranks, unit=half)
    for rank in range(ranks):
        assert expand(assignment[rank]) == chunks[rank] + chunks[2 * ranks - 1 - rank]


@pytest.mark.parametrize("ranks", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("per_rank", [64, 65, 97, 128, 1750, 4099])
def test_zigzag_balances_causal_work(ranks: int, per_rank: int) -> None:
    assignment = layout.zigzag(0, [per_rank] * ranks)
    everything = ((0, per_rank * ranks),)
    work = [causal_work(runs, everything) for runs in assignment]
    assert sum(work) == per_rank * ranks * (per_rank * ranks + 1) // 2
    assert max(work) * ranks <= 1.02 * sum(work)


@pytest.mark.parametrize("ranks", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("tokens", [64 * 8 + 1, 1001, 7001])
def test_zigzag_balances_lengths_that_do_not_divide(ranks: int, tokens: int) -> None:
    assignment = layout.zigzag(0, layout.split_even(tokens, ranks))
    work = [causal_work(runs, ((0, tokens),)) for runs in assignment]
    assert sum(work) == tokens * (tokens + 1) // 2
    assert max(work) * ranks <= 1.02 * sum(work)


@pytest.mark.parametrize("unit", [16, 64])
def test_rounding_to_blocks_costs_little_balance_on_long_prompts(unit: int) -> None:
    counts = layout.split_even(32_003, 4)
    assignment = layout.zigzag(0, counts, unit)
    work = [causal_work(runs, ((0, 32_003),)) for runs in assignment]
    assert max(work) * 4 <= 1.02 * sum(work)
    assert all(runs[0][1] % unit == 0 for runs in assignment[:-1])


@pytest.mark.parametrize("name", layout.LAYOUTS)
@pytest.mark.parametrize("tokens", [0, 1, 2, 3, 4])
def test_fewer_tokens_than_ranks(name: str, tokens: int) -> None:
    assignment = layout.assign(name, 7, layout.split_even(tokens, 5), unit=1)
    assert [expand(runs) for runs in assignment] == [
        [7 + r] if r < tokens else [] for r in range(5)
    ]


@given(runs_of_positions, runs_of_positions)
@settings(max_examples=300)
def test_causal_work_counts_pairs(q_runs: Runs, k_runs: Runs) -> None:
    assert causal_work(q_runs, k_runs) == naive_work(expand(q_runs), expand(k_runs))


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="'spiral'; known: zigzag, contiguous"):
        layout.assign("spiral", 0, [1], 1)
    with pytest.raises(ValueError, match="position 9"):
        layout.owner_of((((0, 4),), ((4, 2),)), 9)
    with pytest.raises(ValueError, match="0 parts"):
        layout.split_even(3, 0)
    with pytest.raises(ValueError, match="unit >= 1"):
        layout.zigzag(0, [4], 0)
    with pytest.raises(ValueError, match=r"\[4, -1\]"):
        layout.contiguous(0, [4, -1])


@given(runs_of_positions, runs_of_positions)
def test_overlap_is_the_positions_of_both(a: Runs, b: Runs) -> None:
    one = layout.join(sorted((p, 1) for p in set(expand(a))))
    two = layout.join(sorted((p, 1) for p in set(expand(b))))
    found = layout.overlap(one, two)
    assert expand(found) == sorted(set(expand(a)) & set(expand(b)))
    assert is_tight(found)


@pytest.mark.parametrize("at", [0, 1, 2])
def test_no_block_is_within_no_positions(at: int) -> None:
    blocks = layout.Blocks([layout.Block(0, 0, 2), layout.Block(3, 2, 1)])
    for high in (at, at - 1, -5):
        begin, end = blocks.where(at, high)
        assert begin == end and list(blocks.within(at, high)) == []


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 5)), max_size=8), st.data())
def test_blocks_are_three_vectors_and_are_cut_by_position(
    gaps: list[tuple[int, int]], data: st.DataObject
) -> None:
    expected, at = [], 0
    for number, (gap, keys) in enumerate(gaps):
        expected.append((7 * number % 5, at + gap, keys))
        at += gap + keys
    blocks = layout.Blocks(layout.Block(*block) for block in expected)
    assert list(blocks) == expected and len(blocks) == len(expected)
    held = [first + j for _, first, keys in expected for j in range(keys)]
    assert (
        blocks.num_keys == len(held) and expand(blocks.runs()) == held and is_tight(blocks.runs())
    )
    slots = [number * 5 + j for number, _, keys in expected for j in range(keys)]
    assert expand(blocks.extents(5)) == slots
    low, high = data.draw(st.integers(-2, 80)), data.draw(st.integers(-2, 80))
    want = [b for b in expected if any(low <= b[1] + j < high for j in range(b[2]))]
    assert list(blocks.within(low, high)) == want
