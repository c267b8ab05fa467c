"""What a layer asks of attention, and what one request brings to a step."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ds_cp.layout import Runs


@dataclass(frozen=True, eq=False)
class LayerSpec:
    """One layer's attention, as the layer itself states it.

    ``scale``: factor on q.k; ``window``: keys at distance >= window are masked (None: no window);
    ``softcap``: c * tanh(x / c) on the scaled scores before softmax; ``sinks``: ``[H]`` logits;
    head counts are this rank's own (a tensor-parallel shard has fewer). ``head_dim``: of queries
    and keys; ``v_head_dim``: of values and outputs (None: the same). Raises ``ValueError`` when KV
    heads do not divide query heads.
    """

    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None
    v_head_dim: int | None = None

    @property
    def v_dim(self) -> int:
        """Dims of a head's value."""
        return self.head_dim if self.v_head_dim is None else self.v_head_dim

    def __post_init__(self) -> None:
        if self.num_kv_heads < 1 or self.num_q_heads % self.num_kv_heads:
            raise ValueError(
                f"{self.num_q_heads} query heads cannot share {self.num_kv_heads} KV heads evenly"
            )


@dataclass(frozen=True)
class Span:
    """Where one request's tokens are in this step, known to all ranks of the group.

    ``q_runs[r]``: positions of the queries that rank r owns; ``k_runs[r]``: positions of the keys
    that rank r holds, new ones included. Both in storage order. Causality and windows follow from
    these positions alone, so any layout, length and number of ranks is the same case.
    """

    q_runs: tuple[Runs, ...]
    k_runs: tuple[Runs, ...]
