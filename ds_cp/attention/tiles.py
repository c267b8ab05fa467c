"""Which keys each query may see, cut into rectangles that dense kernels can read.

Pure integers. Positions decide: a query at p sees a key at k iff ``k <= p`` and, with a window W,
``k > p - W``. A kernel's own causal flag is trusted for squares only, because flash kernels align
the mask to the end of the key list and torch's CPU kernel to its start: over a partial list both
are silently wrong.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from ds_cp.layout import Runs, total

BAND_ROWS = 256  # rows of a masked tile at most; bounds its mask and the hidden pairs it computes


class Tile(NamedTuple):
    """Rows [row, row + rows) against stored keys [key, key + keys).

    ``kind``: "full" (all visible), "causal" (a square, lower triangle with its diagonal), or "band"
    (a mask by position is needed; ``row_pos`` and ``key_pos`` are the first positions).
    """

    row: int
    rows: int
    key: int
    keys: int
    kind: str
    row_pos: int
    key_pos: int


@lru_cache(maxsize=4096)  # layers ask the same question in turn
def cover(q_runs: Runs, k_runs: Runs, window: int | None) -> tuple[Tile, ...]:
    """Tiles that together hold every visible (query, key) pair exactly once."""
    keys = _stored(k_runs)
    tiles: list[Tile] = []
    row = 0
    for start, length in q_runs:
        if not length:
            continue
        if window is None or not keys or start + length - min(p for _, p, _ in keys) <= window:
            tiles += _causal_tiles(row, start, length, keys)
        else:
            for at in range(0, length, BAND_ROWS):
                rows = min(BAND_ROWS, length - at)
                tiles += _band_tiles(row + at, start + at, rows, keys, window)
        row += length
    return tuple(tiles)


def _stored(k_runs: Runs) -> list[tuple[int, int, int]]:
    """(storage index, first position, length) of each run of keys."""
    out, at = [], 0
    for start, length in k_runs:
        if length:
            out.append((at, start, length))
        at += length
    return out


def _causal_tiles(row: int, start: int, rows: int, keys: list[tuple[int, int, int]]) -> list[Tile]:
    """Without a window: keys before the rows are full; a run that overlaps the rows is split.

    A single row sees its own key as it sees those before it, which makes one tile of a decode step.
    """
    end = start + rows
    seen = end if rows == 1 else start
    full: list[list[int]] = []  # [storage index, length], fused where adjacent in storage
    rest: list[Tile] = []
    for at, pos, length in keys:
        before = min(max(seen - pos, 0), length)
        if before:
            if full and full[-1][0] + full[-1][1] == at:
                full[-1][1] += before
            else:
                full.append([at, before])
        low, high = max(pos, seen), min(pos + length, end)
        if low < high:  # keys among the rows: a causal square, and all rows after it see them all
            n, key = high - low, at + low - pos
            rest.append(Tile(row + low - start, n, key, n, "causal", low, low))
            if high < end:
                rest.append(Tile(row + high - start, end - high, key, n, "full", high, low))
    return [Tile(row, rows, at, n, "full", start, 0) for at, n in full] + rest


def _band_tiles(
    row: int, start: int, rows: int, keys: list[tuple[int, int, int]], window: int
) -> list[Tile]:
    """With a window: per run of keys, the part that any of the rows can see."""
    tiles = []
    last = start + rows - 1
    for at, pos, length in keys:
        low, high = max(pos, start - window + 1), min(pos + length, last + 1)
        if low >= high:
            continue
        whole = high - 1 <= start and low > last - window
        kind = "full" if whole else "band"
        tiles.append(Tile(row, rows, at + low - pos, high - low, kind, start, low))
    return tiles


def check_runs(q_runs: Runs, k_runs: Runs, q_tokens: int, k_tokens: int) -> None:
    """Raise ``ValueError`` when positions and tensors differ in their number of tokens."""
    if total(q_runs) != q_tokens or total(k_runs) != k_tokens:
        raise ValueError(
            f"the span has {total(q_runs)} queries and {total(k_runs)} keys on this rank, "
            f"the tensors have {q_tokens} and {k_tokens}"
        )
