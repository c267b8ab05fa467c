"""Triton: how large tiles are, and what every launch of one call passes on.

A small table by head dim and element size instead of trials at run time: a trial would stop the
engine, and its outcome would differ from rank to rank. Compiled for sm_80 and sm_90 the tiles keep
their registers (few or none are spilled) and take less than 100 KB of shared memory, so that
consumer cards can run them as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import triton

from ds_cp.attention.pages import Pages, PageShape
from ds_cp.attention.spec import LayerSpec

MAX_DIM = 256  # dims of a head; more would not fit shared memory and registers


@dataclass(frozen=True)
class Tile:
    """``rows`` (query heads folded in) by ``keys``, and how a program runs it."""

    rows: int
    keys: int
    num_warps: int
    num_stages: int

    @property
    def launch(self) -> dict[str, int]:
        """Keywords of a launch."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


# Largest padded head dim -> tile, for 16-bit elements and for fp32.
DECODE = {
    2: {64: Tile(16, 64, 4, 4), 128: Tile(16, 64, 4, 3), 256: Tile(16, 32, 4, 2)},
    4: {64: Tile(16, 32, 4, 2), 128: Tile(16, 32, 4, 2), 256: Tile(16, 16, 4, 2)},
}
PREFILL = {
    2: {64: Tile(128, 64, 8, 3), 128: Tile(128, 64, 8, 2), 256: Tile(64, 32, 8, 2)},
    4: {64: Tile(64, 32, 8, 2), 128: Tile(32, 16, 4, 2), 256: Tile(32, 16, 8, 2)},
}


def decode_tile(shape: PageShape, rows: int) -> Tile:
    """The decode kernel's tile for such pages, with ``rows`` rows."""
    tile = _find(DECODE, shape)
    return Tile(rows, tile.keys, tile.num_warps, tile.num_stages)


def prefill_tile(shape: PageShape) -> Tile:
    """The prefill kernel's tile for such pages."""
    return _find(PREFILL, shape)


def _find(table: dict[int, dict[int, Tile]], shape: PageShape) -> Tile:
    width = max(padded(shape.k_dim), padded(shape.v_dim))
    return next(tile for dim, tile in table[shape.dtype.itemsize].items() if width <= dim)


def padded(dim: int) -> int:
    """Dims of a product: a power of two, at least 16."""
    return max(16, int(triton.next_power_of_2(dim)))


def interpreted() -> bool:
    """Whether Triton was imported to be interpreted on the CPU."""
    return bool(triton.knobs.runtime.interpret)


@dataclass(frozen=True, eq=False)
class Call:
    """One ``paged_attention``: queries with a dense last dimension."""

    q: torch.Tensor
    q_positions: torch.Tensor
    pages: Pages
    spec: LayerSpec

    @cached_property
    def strides(self) -> tuple[int, ...]:
        """Of the queries' rows and heads, of the pages, and where a block's values begin."""
        data, shape = self.pages.data, self.pages.shape
        return self.q.stride(0), self.q.stride(1), data.stride(0), shape.k_elements

    @cached_property
    def scalars(self) -> tuple[float, float, int]:
        """Scale, soft cap and window; a cap or window of 1 and 0 stands for none."""
        return float(self.spec.scale), float(self.spec.softcap or 1.0), self.spec.window or 0

    def constants(self, tile: Tile) -> dict[str, Any]:
        """What is compiled in."""
        shape, spec = self.pages.shape, self.spec
        upcast = interpreted() and shape.dtype == torch.bfloat16
        return {
            "B": shape.block_size,
            "D": shape.k_dim,
            "DV": shape.v_dim,
            "BD": padded(shape.k_dim),
            "BDV": padded(shape.v_dim),
            "BN": tile.keys,
            "WINDOW": spec.window is not None,
            "CAP": spec.softcap is not None,
            "UPCAST": upcast,
        }
