"""A kernel that records its calls."""

from __future__ import annotations

import torch

from ds_cp.attention import LayerSpec, PagedKernel, Pages, Partial
from ds_cp.attention.batch import PagedBatch
from ds_cp.attention.kernels.kernel import Call, Merge
from ds_cp.trace.recorder import Kind, Recorder


class TracedKernel:
    """Does what ``inner`` does. See ``PagedKernel``; modes alone call it."""

    def __init__(self, inner: PagedKernel, recorder: Recorder) -> None:
        self._inner = inner
        self._recorder = recorder
        self.name = inner.name
        self.packed = inner.packed

    def refuses(self, spec: LayerSpec, block_size: int, dtype: torch.dtype) -> str:
        """As ``inner``."""
        return self._inner.refuses(spec, block_size, dtype)

    def paged_attention(
        self,
        q_THD: torch.Tensor,
        q_positions: torch.Tensor,
        pages: Pages,
        batch: PagedBatch,
        spec: LayerSpec,
        into: Partial | None = None,
    ) -> Partial:
        """As ``inner``."""
        with self._recorder.span(Kind.ATTEND, "attend"):
            return self._inner.paged_attention(q_THD, q_positions, pages, batch, spec, into)

    def write(
        self,
        pages: Pages,
        k_TGD: torch.Tensor,
        v_TGD: torch.Tensor,
        blocks: torch.Tensor,
        places: torch.Tensor,
    ) -> None:
        """As ``inner``."""
        self._inner.write(pages, k_TGD, v_TGD, blocks, places)

    def merge_rows(self, into: Partial, part: Partial, rows: torch.Tensor | None) -> None:
        """As ``inner``."""
        with self._recorder.span(Kind.FOLD, "merge"):
            self._inner.merge_rows(into, part, rows)

    def attending(
        self,
        q_THD: torch.Tensor,
        q_positions: torch.Tensor,
        pages: Pages,
        batch: PagedBatch,
        spec: LayerSpec,
        into: Partial,
    ) -> Call:
        """As ``inner``; what is recorded is the call, not how it is made ready."""
        call = self._inner.attending(q_THD, q_positions, pages, batch, spec, into)
        return self._recorded(Kind.ATTEND, "attend", call)

    def packing(self, part: Partial, dtype: torch.dtype, packed: torch.Tensor) -> Call:
        """As ``inner``."""
        return self._recorded(Kind.FOLD, "pack", self._inner.packing(part, dtype, packed))

    def merging(
        self,
        packed: torch.Tensor,
        dtype: torch.dtype,
        rows: torch.Tensor | int,
        num_heads: int,
        v_dim: int,
    ) -> Merge:
        """As ``inner``."""
        merge = self._inner.merging(packed, dtype, rows, num_heads, v_dim)
        return lambda into: self._recorded(Kind.FOLD, "merge", merge(into))

    def _recorded(self, kind: Kind, name: str, call: Call) -> Call:
        def recorded() -> object:
            with self._recorder.span(kind, name):
                return call()

        return recorded
