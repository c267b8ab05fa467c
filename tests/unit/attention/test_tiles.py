"""Tiles against every (query, key) pair, one by one."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_cp.attention.tiles import BAND_ROWS, Tile, check_runs, cover
from ds_cp.layout import Runs, assign, split_even
from tests.helpers.pairs import causal_work, visible_pairs

windows = st.one_of(st.none(), st.integers(1, 70))


@st.composite
def disjoint_runs(draw: st.DrawFn) -> Runs:
    """Runs of distinct positions in any storage order, empty ones among them."""
    lengths = draw(st.lists(st.integers(0, 12), max_size=6))
    gaps = draw(st.lists(st.integers(0, 9), min_size=len(lengths), max_size=len(lengths)))
    at, runs = 0, []
    for length, gap in zip(lengths, gaps, strict=True):
        runs.append((at + gap, length))
        at += gap + length
    return tuple(draw(st.permutations(runs)))


def places(runs: Runs) -> np.ndarray:
    return np.array([p for start, n in runs for p in range(start, start + n)], dtype=np.int64)


def seen(q: np.ndarray, k: np.ndarray, window: int | None) -> np.ndarray:
    """``[T, S]``: key not after the query and, with a window W, less than W before it."""
    distance = q[:, None] - k[None, :]
    return (distance >= 0) & (distance < (window or np.inf))


def claimed(tile: Tile, window: int | None) -> np.ndarray:
    """``[rows, keys]``: the pairs that a tile says are visible, from its own numbers alone."""
    if tile.kind == "full":
        return np.ones((tile.rows, tile.keys), dtype=bool)
    if tile.kind == "causal":
        assert tile.rows == tile.keys
        return np.tril(np.ones((tile.rows, tile.keys), dtype=bool))
    assert tile.kind == "band" and window is not None
    rows = np.arange(tile.row_pos, tile.row_pos + tile.rows)
    return seen(rows, np.arange(tile.key_pos, tile.key_pos + tile.keys), window)


def check_cover(q_runs: Runs, k_runs: Runs, window: int | None) -> tuple[Tile, ...]:
    q, k = places(q_runs), places(k_runs)
    want = seen(q, k, window)
    count = np.zeros(want.shape, dtype=np.int64)
    tiles = cover(q_runs, k_runs, window)
    for tile in tiles:
        assert tile.rows > 0 and tile.keys > 0
        assert 0 <= tile.row and tile.row + tile.rows <= len(q)
        assert 0 <= tile.key and tile.key + tile.keys <= len(k)
        rows, keys = slice(tile.row, tile.row + tile.rows), slice(tile.key, tile.key + tile.keys)
        assert q[rows].tolist() == list(range(q[tile.row], q[tile.row] + tile.rows))
        if tile.kind == "full":
            assert want[rows, keys].all()
        else:  # what a mask is built from: true positions, in a row
            assert q[tile.row] == tile.row_pos and k[tile.key] == tile.key_pos
            assert k[keys].tolist() == list(range(tile.key_pos, tile.key_pos + tile.keys))
        if tile.kind == "causal":
            assert tile.row_pos == tile.key_pos
        count[rows, keys] += claimed(tile, window)
    assert np.array_equal(count, want.astype(np.int64))  # every visible pair once, no other
    assert visible_pairs(q_runs, k_runs, window) == want.sum()
    return tiles


@settings(max_examples=250)
@given(disjoint_runs(), disjoint_runs(), windows)
def test_tiles_hold_every_visible_pair_once(q_runs: Runs, k_runs: Runs, window: int | None) -> None:
    """Any queries over any keys: before, among and after them, in any storage order."""
    check_cover(q_runs, k_runs, window)


@settings(max_examples=100)
@given(disjoint_runs(), windows)
def test_a_sequence_over_itself(runs: Runs, window: int | None) -> None:
    check_cover(runs, runs, window)


@given(disjoint_runs(), disjoint_runs())
def test_pairs_without_a_window_are_the_causal_work(q_runs: Runs, k_runs: Runs) -> None:
    """The same number from the layout's closed form."""
    assert visible_pairs(q_runs, k_runs) == causal_work(q_runs, k_runs)


@settings(max_examples=60)
@given(
    st.sampled_from(["zigzag", "contiguous"]),
    st.integers(0, 40),
    st.integers(1, 5),
    st.integers(0, 20),
    windows,
)
def test_shards_of_a_layout(
    layout: str, new: int, size: int, past: int, window: int | None
) -> None:
    """Every rank's queries over every rank's keys: together, the whole sequence's pairs."""
    runs = assign(layout, past, split_even(new, size), 1)
    pairs = 0
    for q_runs in runs:
        for k_runs in (*runs, ((0, past),)):
            check_cover(q_runs, k_runs, window)
            pairs += visible_pairs(q_runs, k_runs, window)
    positions = np.arange(past, past + new)
    assert pairs == seen(positions, np.arange(past + new), window).sum()


@pytest.mark.parametrize("window", [1, 7, 255, 256, 257, 600, 900])
def test_rows_beyond_one_band(window: int) -> None:
    """Masked tiles are cut at BAND_ROWS, and what a band never sees is not computed."""
    q_runs, k_runs = ((300, 700),), ((0, 500), (500, 500))
    tiles = check_cover(q_runs, k_runs, window)
    assert all(tile.rows <= BAND_ROWS for tile in tiles if tile.kind == "band")
    area = sum(tile.rows * tile.keys for tile in tiles)
    assert area <= 700 * (window + BAND_ROWS)


@pytest.mark.parametrize("window", [1000, 1001, 10**9])
def test_a_window_that_hides_nothing_costs_nothing(window: int) -> None:
    runs = ((0, 400), (400, 600))
    assert cover(runs, runs, window) == cover(runs, runs, None)


def test_the_three_cases_of_zigzag() -> None:
    """Chunks of 4, rank 0 has 0 and 3, rank 1 has 1 and 2. Own keys: diagonals. The other's: rank 1
    sees the first chunk of rank 0 whole, and the second chunk of rank 0 sees all of rank 1."""
    front, back = ((0, 4), (12, 4)), ((4, 4), (8, 4))
    assert kinds(cover(front, front, None)) == ["causal 4x4", "causal 4x4", "full 4x4"]
    assert kinds(cover(back, back, None)) == ["causal 4x4", "causal 4x4", "full 4x4"]
    assert kinds(cover(back, front, None)) == ["full 4x4", "full 4x4"]
    assert kinds(cover(front, back, None)) == ["full 4x8"]


def kinds(tiles: Iterable[Tile]) -> list[str]:
    return sorted(f"{tile.kind} {tile.rows}x{tile.keys}" for tile in tiles)


def test_decode_is_one_full_tile() -> None:
    """Over all earlier keys and its own, whatever pieces they were stored in: one dense call."""
    assert kinds(cover(((99, 1),), ((0, 40), (60, 39)), None)) == ["full 1x79"]
    assert kinds(cover(((40, 1),), ((0, 41),), None)) == ["full 1x41"]
    assert kinds(cover(((40, 1),), ((0, 8), (40, 1), (50, 5)), None)) == ["full 1x9"]


def test_nothing_to_see() -> None:
    assert cover((), ((0, 9),), None) == cover(((0, 9),), (), 4) == ()
    assert cover(((0, 4),), ((4, 4),), None) == cover(((0, 4),), ((4, 4),), 2) == ()
    assert cover(((90, 4),), ((0, 4),), 10) == ()
    assert cover(((3, 0),), ((0, 0),), None) == ()


def test_tensors_and_positions_must_agree() -> None:
    check_runs(((0, 3), (9, 2)), ((0, 7),), 5, 7)
    for q_tokens, k_tokens in ((4, 7), (5, 8)):
        with pytest.raises(ValueError, match="5 queries and 7 keys") as caught:
            check_runs(((0, 3), (9, 2)), ((0, 7),), q_tokens, k_tokens)
        assert f"{q_tokens} and {k_tokens}" in str(caught.value)
