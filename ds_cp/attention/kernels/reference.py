"""The plain kernel: any mask, soft cap, dtype and device, straight from the definition."""

from __future__ import annotations

import torch

from ds_cp.attention.spec import LayerSpec, Padding
from ds_cp.attention.state import NEG_INF, Partial, split_heads
from ds_cp.layout import Runs

SCORE_BYTES = 64 * 2**20  # bytes of fp32 scores held at once; rows are computed in slices that fit


def run_positions(runs: Runs, device: torch.device) -> torch.Tensor:
    """The positions of ``runs`` as an int64 vector."""
    parts = [torch.arange(s, s + n, device=device) for s, n in runs if n]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64, device=device)


def reference_kernel(
    q_THD: torch.Tensor,
    k_SGD: torch.Tensor,
    v_SGD: torch.Tensor,
    q_runs: Runs,
    k_runs: Runs,
    spec: LayerSpec,
) -> Partial:
    """Softmax attention over the visible keys, computed in fp32 (fp64 for fp64 inputs).

    Shapes, masks and the empty case as in ``ds_cp.attention.kernels``.
    """
    compute = torch.float64 if q_THD.dtype == torch.float64 else torch.float32
    num_tokens, num_heads, head_dim = q_THD.shape
    num_keys, num_kv_heads, _ = k_SGD.shape
    out = torch.zeros(num_tokens, num_heads, head_dim, dtype=compute, device=q_THD.device)
    lse = torch.full((num_tokens, num_heads), NEG_INF, dtype=compute, device=q_THD.device)
    if num_tokens and num_keys:
        k_GDS = k_SGD.to(compute).permute(1, 2, 0)
        v_GSD = v_SGD.to(compute).permute(1, 0, 2)
        q_pos = run_positions(q_runs, q_THD.device)
        k_pos = run_positions(k_runs, q_THD.device)
        step = max(1, SCORE_BYTES // (num_heads * num_keys * 4))
        for low in range(0, num_tokens, step):
            rows = slice(low, min(low + step, num_tokens))
            grouped = split_heads(q_THD[rows].to(compute), num_kv_heads)
            q_GxD = grouped.permute(1, 2, 0, 3)
            scores = torch.matmul(q_GxD, k_GDS.unsqueeze(1)) * spec.scale  # [G, H/G, t, S]
            if spec.softcap is not None:
                scores = spec.softcap * torch.tanh(scores / spec.softcap)
            hidden = k_pos > q_pos[rows].unsqueeze(1)
            if spec.window is not None:
                hidden |= k_pos <= q_pos[rows].unsqueeze(1) - spec.window
            scores = scores.masked_fill(hidden, NEG_INF)
            part = torch.logsumexp(scores, dim=-1)
            safe = part.masked_fill(torch.isneginf(part), 0.0)  # exp(-inf - 0) is the 0 we want
            weights = torch.exp(scores - safe.unsqueeze(-1))
            mixed = torch.matmul(weights, v_GSD.unsqueeze(1))  # [G, H/G, t, D]
            out[rows] = mixed.permute(2, 0, 1, 3).flatten(1, 2)
            lse[rows] = part.permute(2, 0, 1).flatten(1, 2)
    if compute is torch.float64:
        return Partial(out, lse)
    return Partial(out, lse.to(torch.float32))


def reference_rows(
    q_BHD: torch.Tensor,
    k_BGSD: torch.Tensor,
    v_BGSD: torch.Tensor,
    padding: Padding,
    spec: LayerSpec,
) -> Partial:
    """Softmax attention of one query per row over its own keys, computed in fp32."""
    q_BGFD = split_heads(q_BHD.float(), spec.num_kv_heads)
    scores = torch.matmul(q_BGFD, k_BGSD.float().transpose(2, 3)) * spec.scale  # [B, G, H/G, S]
    if spec.softcap is not None:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    scores = scores + padding.mask.float()
    lse = torch.logsumexp(scores, dim=-1)
    mixed = torch.matmul(torch.exp(scores - lse.unsqueeze(-1)), v_BGSD.float())
    return Partial(mixed.flatten(1, 2), lse.flatten(1, 2))
