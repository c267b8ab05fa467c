"""fp64 attention over the whole sequence, written from the definition: the independent
reference."""

from __future__ import annotations

import torch


def full_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_pos: torch.Tensor,
    k_pos: torch.Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``[T, H, Dv]`` and lse ``[T, H]`` in fp64, head by head (K and V expanded, dense mask)."""
    q, k, v = q.double(), k.double(), v.double()
    num_heads, num_kv_heads = q.shape[1], k.shape[1]
    seen = k_pos[None, :] <= q_pos[:, None]
    if window is not None:
        seen &= k_pos[None, :] > q_pos[:, None] - window
    out = q.new_empty(*q.shape[:2], v.shape[2])
    lse = torch.empty(q.shape[0], num_heads, dtype=torch.float64)
    for head in range(num_heads):
        kv = head * num_kv_heads // num_heads
        scores = q[:, head] @ k[:, kv].T * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = torch.where(seen, scores, -torch.inf)
        if sinks is not None:
            scores = torch.cat([scores, sinks[head].double().expand(len(scores), 1)], dim=1)
        lse[:, head] = torch.logsumexp(scores, dim=1)
        weights = torch.softmax(scores, dim=1)[:, : len(k_pos)]
        out[:, head] = weights.nan_to_num(0.0) @ v[:, kv]
    return out, lse
