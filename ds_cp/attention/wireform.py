"""Partials as rows of bytes: ``H * (D * e + 4)`` a query for elements of e bytes, out in the
model's dtype and lse in fp32."""

from __future__ import annotations

import torch

from ds_cp.attention.spec import LayerSpec
from ds_cp.attention.state import Partial, dense


def row_bytes(spec: LayerSpec, dtype: torch.dtype) -> int:
    """Bytes of one query's partial on the wire."""
    return spec.num_q_heads * (spec.head_dim * dtype.itemsize + 4)


def pack_partial(part: Partial, dtype: torch.dtype) -> torch.Tensor:
    """``[T, row_bytes]`` uint8. One rounding to the model's dtype, nothing in fp32."""
    out = dense(part.out.to(dtype).flatten(1)).view(torch.uint8)
    lse = dense(part.lse.to(torch.float32)).view(torch.uint8)
    return torch.cat([out, lse], dim=1)


def unpack_partial(rows: torch.Tensor, spec: LayerSpec, dtype: torch.dtype) -> Partial:
    """The inverse of ``pack_partial``; out comes back as fp32."""
    num_heads, head_dim = spec.num_q_heads, spec.head_dim
    cut = num_heads * head_dim * dtype.itemsize
    # Cloned: a single row counts as contiguous where it is, and may not be aligned to its dtype.
    out, lse = (
        part.clone(memory_format=torch.contiguous_format) for part in (rows[:, :cut], rows[:, cut:])
    )
    out = out.view(dtype).view(-1, num_heads, head_dim)
    return Partial(out.to(torch.float32), lse.view(torch.float32))
