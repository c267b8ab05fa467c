"""A rank's KV pool as a row of cells, in bounded time and size."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby

from ds_cp.engine.picture import CACHED, CELLS, FREE, MAX_CELLS, SHARED
from ds_cp.layout import Home

MAX_BLOCKS = 8192  # blocks of requests that are looked at for one picture, of all ranks
MAX_RUNS = 2048  # free runs of one rank that are looked at

Runs = Sequence[tuple[int, int]]
Cells = tuple[tuple[int, int], ...]


def cell_count(total: int, ranks: int) -> int:
    """Cells for a pool of ``total`` blocks beside ``ranks`` such pools."""
    return min(total, max(CELLS[0], min(CELLS[-1], MAX_CELLS // max(ranks, 1))))


def owners_of(held: Iterable[tuple[int, Iterable[Home]]]) -> dict[Home, int]:
    """What each block shows, from pairs (what, blocks); ``SHARED`` for one that comes twice."""
    found: dict[Home, int] = {}
    for what, homes in held:
        for home in homes:
            found[home] = SHARED if home in found else what
    return found


def draw_pool(total: int, count: int, free: Runs, owners: dict[int, int], stride: int) -> Cells:
    """``count`` cells for a pool of ``total`` blocks, run-length coded.

    ``free``: its free runs (start, length), in any order; ``owners``: what used blocks show, of
    which each stands for ``stride``. What is neither free nor anybody's is cached. In a cell of
    several blocks the most frequent wins, a request before what no one uses.
    """
    if not total:
        return ()
    bounds = [-(-cell * total // count) for cell in range(count + 1)]  # the first block of each
    used: dict[int, dict[int, float]] = {}  # by cell, where there are any
    for block, what in owners.items():
        cell = used.setdefault(block * count // total, {})
        cell[what] = cell.get(what, 0.0) + stride
    shown = []
    for at, blocks in enumerate(_free_blocks(bounds, free)):
        cached = bounds[at + 1] - bounds[at] - blocks
        found = used.get(at)
        if found is not None:
            what = max(found, key=found.__getitem__)
            cached -= sum(found.values())
            if found[what] >= max(blocks, cached):
                shown.append(what)
                continue
        shown.append(FREE if blocks >= cached else CACHED)
    return tuple((what, len(list(run))) for what, run in groupby(shown))


def _free_blocks(bounds: Sequence[int], free: Runs) -> list[float]:
    """Free blocks of each cell. Of very many runs only some are looked at, and count for all."""
    stride = -(-len(free) // MAX_RUNS) or 1
    total, count = bounds[-1], len(bounds) - 1
    found = [0.0] * count
    for start, length in free[::stride]:
        end = start + length
        first, last = start * count // total, (end - 1) * count // total
        for cell in range(first + 1, last):
            found[cell] += (bounds[cell + 1] - bounds[cell]) * stride
        found[first] += (min(end, bounds[first + 1]) - start) * stride
        if last > first:
            found[last] += (end - bounds[last]) * stride
    return found
