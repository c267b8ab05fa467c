"""Partials packed into memory of their own."""

from __future__ import annotations

import torch

from ds_cp.attention.state import Partial
from ds_cp.attention.wireform import pack_into


def pack_partial(part: Partial, dtype: torch.dtype) -> torch.Tensor:
    """``[T, row_bytes]`` uint8, filled with 255 before."""
    num_rows, num_heads, v_dim = part.out.shape
    rows = torch.full((num_rows, num_heads * (v_dim * dtype.itemsize + 4)), 255, dtype=torch.uint8)
    pack_into(part, dtype, rows)
    return rows
