"""Mode ``local``: every item's queries and keys are on this rank. Nothing is sent."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ds_cp.attention.fold import attend
from ds_cp.attention.kernels import Kernel
from ds_cp.attention.spec import KeyValues, LayerSpec
from ds_cp.attention.state import Partial
from ds_cp.layout import Runs


class LocalAttention:
    """One step's local items, as (positions of the queries, positions of the keys); called once per
    layer."""

    def __init__(self, items: Sequence[tuple[Runs, Runs]]) -> None:
        self._runs = list(items)

    def __call__(
        self,
        q: Sequence[torch.Tensor],
        kv: Sequence[KeyValues],
        kernel: Kernel,
        spec: LayerSpec,
    ) -> list[Partial]:
        """Per item this rank's ``q_THD`` and keys and values -> the partial over all keys."""
        return [
            attend(kernel, q[i], kv[i], q_runs, k_runs, spec)
            for i, (q_runs, k_runs) in enumerate(self._runs)
        ]
