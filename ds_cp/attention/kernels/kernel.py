"""What a kernel is: attention over pages, by position, of a whole step's requests in one call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch

from ds_cp.attention.batch import PagedBatch
from ds_cp.attention.pages import Pages
from ds_cp.attention.spec import LayerSpec
from ds_cp.attention.state import Partial

Call = Callable[[], object]
Merge = Callable[[Partial], Call]


class PagedKernel(Protocol):
    """One implementation, chosen when an engine is built and checked on its device then.

    ``name``: as in ``attention.backend``; ``packed``: the order of the pages that it reads and
    writes (see ``ds_cp.attention.pages``). One with an attribute ``stacks`` that is true folds
    several partials of the same rows by one launch: its ``merge_rows`` and ``merging`` also take N
    of them stacked (``out [N, R, H, Dv]``, ``packed [N, R, row_bytes]``), the first one first, to
    the same bits as one after the other.
    """

    name: str
    packed: bool

    def refuses(self, spec: LayerSpec, block_size: int, dtype: torch.dtype) -> str:
        """Why it cannot serve such a layer, as the end of a sentence; "" when it can."""
        ...

    def paged_attention(
        self,
        q_THD: torch.Tensor,
        q_positions: torch.Tensor,
        pages: Pages,
        batch: PagedBatch,
        spec: LayerSpec,
        into: Partial | None = None,
    ) -> Partial:
        """Attention of the queries over the keys that ``batch`` gives each request.

        A query at position p sees a key at k iff ``k <= p`` and, with a window W, ``k > p - W``.
        ``q_THD``: ``[T, H, D]``, any strides; ``q_positions``: int64 ``[T]``. Returns ``out [T, H,
        Dv]`` and natural-log ``lse [T, H]``, both fp32 (fp64 for fp64 queries), ``(0, -inf)`` for a
        row that sees nothing or belongs to no request. With ``into``, the same merged into that
        partial, which is overwritten and returned; other rows of it are left as they are. Sinks
        are not the kernel's: they enter once, at the end.
        """
        ...

    def write(
        self,
        pages: Pages,
        k_TGD: torch.Tensor,
        v_TGD: torch.Tensor,
        blocks: torch.Tensor,
        places: torch.Tensor,
    ) -> None:
        """Store T tokens, token t at place ``places[t]`` of block ``blocks[t]`` (int64)."""
        ...

    def merge_rows(self, into: Partial, part: Partial, rows: torch.Tensor | None) -> None:
        """Fold ``part`` (``[R, H, Dv]``, any float dtype) into rows ``rows`` (int64 ``[R]``, each
        once; None: all, in order) of ``into``, which is fp32 and overwritten."""
        ...

    def attending(
        self,
        q_THD: torch.Tensor,
        q_positions: torch.Tensor,
        pages: Pages,
        batch: PagedBatch,
        spec: LayerSpec,
        into: Partial,
    ) -> Call:
        """``paged_attention`` made ready: called, it does it with what the tensors hold then. So
        does what the next two give. Made before a wait, they leave little to be done after it."""
        ...

    def packing(self, part: Partial, dtype: torch.dtype, packed: torch.Tensor) -> Call:
        """Writes ``part``, T rows, as rows on the wire with out in ``dtype``: ``packed [T,
        row_bytes]`` uint8, contiguous (see ``ds_cp.attention.wireform``)."""
        ...

    def merging(
        self,
        packed: torch.Tensor,
        dtype: torch.dtype,
        rows: torch.Tensor | int,
        num_heads: int,
        v_dim: int,
    ) -> Merge:
        """Given a partial, makes ``merge_rows`` of what ``packing`` wrote into it ready. ``rows``:
        int64 ``[R]``, or the first of R rows that follow one another; ``num_heads``, ``v_dim``: of
        the partials."""
        ...


@runtime_checkable
class SquareKernel(PagedKernel, Protocol):
    """A kernel that takes another way for prompts of ``square_rows`` rows and more, and yet another
    where at least ``earlier_keys`` keys are before them."""

    @property
    def square_rows(self) -> int:
        """Least rows of such a prompt."""
        ...

    @property
    def earlier_keys(self) -> int:
        """Least earlier keys."""
        ...

    def prefill(
        self,
        q_THD: torch.Tensor,
        k_TGD: torch.Tensor,
        v_TGD: torch.Tensor,
        batch: PagedBatch,
        spec: LayerSpec,
        block_size: int,
    ) -> torch.Tensor | None:
        """The finished attention in q's dtype of a step that is nothing but whole prompts, or
        None."""
        ...
