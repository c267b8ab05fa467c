"""What a kernel need not do itself: calls made ready, and rows on the wire by torch's operators."""

from __future__ import annotations

from functools import partial
from typing import Protocol

import torch

from ds_cp.attention.batch import PagedBatch
from ds_cp.attention.kernels.kernel import Call, Merge, PagedKernel
from ds_cp.attention.pages import Pages
from ds_cp.attention.spec import LayerSpec
from ds_cp.attention.state import Partial
from ds_cp.attention.wireform import pack_into, unpack_partial


class _Merges(Protocol):
    def merge_rows(self, into: Partial, part: Partial, rows: torch.Tensor | None) -> None: ...


class ByTorch:
    """Part of a ``PagedKernel``."""

    def attending(
        self: PagedKernel,
        q_THD: torch.Tensor,
        q_positions: torch.Tensor,
        pages: Pages,
        batch: PagedBatch,
        spec: LayerSpec,
        into: Partial,
    ) -> Call:
        """As in ``PagedKernel``; nothing is done before the call."""
        return partial(self.paged_attention, q_THD, q_positions, pages, batch, spec, into)

    def packing(self, part: Partial, dtype: torch.dtype, packed: torch.Tensor) -> Call:
        """As in ``PagedKernel``."""
        return partial(pack_into, part, dtype, packed)

    def merging(
        self: _Merges,
        packed: torch.Tensor,
        dtype: torch.dtype,
        rows: torch.Tensor | int,
        num_heads: int,
        v_dim: int,
    ) -> Merge:
        """As in ``PagedKernel``."""

        def merge(into: Partial) -> None:
            part = unpack_partial(packed, num_heads, v_dim, dtype)
            if isinstance(rows, int):
                here = slice(rows, rows + packed.shape[-2])
                self.merge_rows(Partial(into.out[here], into.lse[here]), part, None)
            else:
                self.merge_rows(into, part, rows)

        return lambda into: partial(merge, into)
