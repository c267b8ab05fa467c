"""Mode ``local``: every item's queries and keys are on this rank. Nothing is sent."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ds_cp.attention.batch import BatchPlan, IndexUpload, PagedBatch, Part, Shards
from ds_cp.attention.kernels import PagedKernel
from ds_cp.attention.pages import Pages
from ds_cp.attention.spec import LayerSpec
from ds_cp.attention.state import Partial


class LocalAttention:
    """One step's local items; called once per layer. ``me``: this rank's index in the group."""

    def __init__(
        self, items: Sequence[Shards], me: int, first_row: int, upload: IndexUpload
    ) -> None:
        parts = [Part(item.q_runs[me], item.blocks[me]) for item in items]
        self._plan = BatchPlan(parts, first_row, upload)

    @property
    def batch(self) -> PagedBatch:
        """All of it as a kernel sees it, once the upload was sent."""
        return self._plan.batch()

    def __call__(
        self,
        q_THD: torch.Tensor,
        q_positions: torch.Tensor,
        pages: Pages,
        kernel: PagedKernel,
        spec: LayerSpec,
        into: Partial,
    ) -> None:
        """Fold the attention of this mode's rows over all their keys into ``into``."""
        kernel.paged_attention(q_THD, q_positions, pages, self._plan.batch(), spec, into)
