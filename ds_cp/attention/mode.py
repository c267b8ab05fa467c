"""What a mode is: an order of folding partials, made once for a step and called once per layer."""

from __future__ import annotations

from typing import Protocol

import torch

from ds_cp.attention.kernels import PagedKernel
from ds_cp.attention.pages import Pages
from ds_cp.attention.spec import LayerSpec
from ds_cp.attention.state import Partial


class Mode(Protocol):
    """The one signature of the modes.

    ``q_THD`` and ``q_positions``: all rows of this rank's step, of which a mode takes those of its
    own items, one item after the other from its first row on; ``pages``: this rank's keys and
    values of the layer. Folds the attention of its rows over all keys of their items, wherever
    these are, into those rows of ``into`` (fp32, ``(0, -inf)`` or what another call found).
    """

    def __call__(
        self,
        q_THD: torch.Tensor,
        q_positions: torch.Tensor,
        pages: Pages,
        kernel: PagedKernel,
        spec: LayerSpec,
        into: Partial,
    ) -> None: ...
