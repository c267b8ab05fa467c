"""Partials as rows of bytes: ``H * (Dv * e + 4)`` a query for elements of e bytes, out in the
model's dtype, then lse in fp32."""

from __future__ import annotations

import torch

from ds_cp.attention.spec import LayerSpec
from ds_cp.attention.state import Partial, dense


def row_bytes(spec: LayerSpec, dtype: torch.dtype) -> int:
    """Bytes of one query's partial on the wire."""
    return spec.num_q_heads * (spec.v_dim * dtype.itemsize + 4)


def new_rows(
    num_rows: int, spec: LayerSpec, dtype: torch.dtype, like: torch.Tensor
) -> torch.Tensor:
    """Memory for ``num_rows`` partials, ``[num_rows, row_bytes]`` uint8, where ``like`` is."""
    return like.new_empty(num_rows, row_bytes(spec, dtype), dtype=torch.uint8)


def pack_into(part: Partial, dtype: torch.dtype, rows: torch.Tensor) -> None:
    """To ``rows [T, row_bytes]`` uint8: a pass over out and one over lse. One rounding to the
    model's dtype, nothing in fp32."""
    cut = part.out.shape[1] * part.out.shape[2] * dtype.itemsize
    if _aligned(cut, rows.shape[1], dtype):
        rows[:, :cut].view(dtype).view(part.out.shape).copy_(part.out)
        rows[:, cut:].view(torch.float32).copy_(part.lse)
    else:
        rows[:, :cut] = dense(part.out.to(dtype).flatten(1)).view(torch.uint8)
        rows[:, cut:] = dense(part.lse.to(torch.float32)).view(torch.uint8)


def unpack_partial(rows: torch.Tensor, num_heads: int, v_dim: int, dtype: torch.dtype) -> Partial:
    """The inverse of ``pack_into``: out in ``dtype`` and lse, views of ``rows`` wherever the
    numbers are aligned to their size there. So fold it before ``rows`` is written again. Stacked
    rows ``[N, T, row_bytes]`` give N stacked partials."""
    shape = *rows.shape[:-1], num_heads, v_dim
    cut = num_heads * v_dim * dtype.itemsize
    out, lse = rows[..., :cut], rows[..., cut:]
    if not _aligned(cut, rows.shape[-1], dtype):
        out, lse = (x.clone(memory_format=torch.contiguous_format) for x in (out, lse))
    return Partial(out.view(dtype).view(shape), lse.view(torch.float32))


def _aligned(cut: int, width: int, dtype: torch.dtype) -> bool:
    """Whether every row's numbers begin at a multiple of their own size."""
    return cut % 4 == 0 and width % max(4, dtype.itemsize) == 0
