"""Attention in plain torch, correct before fast: any device, head count, mask and soft cap.

The kernel that the others are compared with at start, and the last one to be taken.
"""

from __future__ import annotations

import torch

from ds_cp.attention.batch import PagedBatch
from ds_cp.attention.kernels.by_torch import ByTorch
from ds_cp.attention.pages import Pages
from ds_cp.attention.spec import LayerSpec
from ds_cp.attention.state import NEG_INF, Partial, empty_partial, merge_rows, split_heads

SCORE_BYTES = 64 * 2**20  # bytes of fp32 scores held at once; rows are computed in slices that fit


class ReferenceKernel(ByTorch):
    """``PagedKernel`` by matrix products over each request's gathered keys, in fp32 (fp64 for fp64
    queries)."""

    name = "reference"
    packed = False

    def refuses(self, spec: LayerSpec, block_size: int, dtype: torch.dtype) -> str:
        """Serves every layer."""
        return ""

    def paged_attention(
        self,
        q_THD: torch.Tensor,
        q_positions: torch.Tensor,
        pages: Pages,
        batch: PagedBatch,
        spec: LayerSpec,
        into: Partial | None = None,
    ) -> Partial:
        """As in ``PagedKernel``."""
        num_tokens, num_heads, _ = q_THD.shape
        double = q_THD.dtype == torch.float64
        dtype = torch.float64 if double else torch.float32
        if into is None:
            into = empty_partial(num_tokens, num_heads, spec.v_dim, q_THD.device, dtype)
        row, at, size = batch.first_row, 0, pages.shape.block_size
        for part in batch.parts:
            num_rows, num_blocks = sum(n for _, n in part.q_runs), len(part.blocks)
            if num_rows and num_blocks:
                here = slice(at, at + num_blocks)
                k_SGD, v_SGD = pages.gather(batch.blocks[here])
                place = torch.arange(size, device=q_THD.device)
                k_pos = (batch.firsts[here, None] + place).flatten()
                absent = (place >= batch.keys[here, None]).flatten()
                rows = slice(row, row + num_rows)
                found = attend(q_THD[rows], k_SGD, v_SGD, q_positions[rows], k_pos, absent, spec)
                merge_rows(Partial(into.out[rows], into.lse[rows]), found, None)
            row, at = row + num_rows, at + num_blocks
        return into

    def write(
        self,
        pages: Pages,
        k_TGD: torch.Tensor,
        v_TGD: torch.Tensor,
        blocks: torch.Tensor,
        places: torch.Tensor,
    ) -> None:
        """As in ``PagedKernel``."""
        pages.write(k_TGD, v_TGD, blocks, places)

    def merge_rows(self, into: Partial, part: Partial, rows: torch.Tensor | None) -> None:
        """As in ``PagedKernel``."""
        merge_rows(into, part, rows)


def attend(
    q_THD: torch.Tensor,
    k_SGD: torch.Tensor,
    v_SGD: torch.Tensor,
    q_pos: torch.Tensor,
    k_pos: torch.Tensor,
    absent: torch.Tensor,
    spec: LayerSpec,
) -> Partial:
    """Softmax attention of T queries over the visible ones of S keys. ``absent``: bool ``[S]``,
    keys that are none."""
    compute = torch.float64 if q_THD.dtype == torch.float64 else torch.float32
    num_tokens, num_heads, _ = q_THD.shape
    num_keys, num_kv_heads, _ = k_SGD.shape
    out = torch.empty(num_tokens, num_heads, spec.v_dim, dtype=compute, device=q_THD.device)
    lse = torch.empty(num_tokens, num_heads, dtype=compute, device=q_THD.device)
    k_GDS = k_SGD.to(compute).permute(1, 2, 0)
    v_GSD = v_SGD.to(compute).permute(1, 0, 2)
    step = max(1, SCORE_BYTES // (num_heads * num_keys * 4))
    for low in range(0, num_tokens, step):
        rows = slice(low, min(low + step, num_tokens))
        grouped = split_heads(q_THD[rows].to(compute), num_kv_heads)
        q_GxD = grouped.permute(1, 2, 0, 3)
        scores = torch.matmul(q_GxD, k_GDS.unsqueeze(1)) * spec.scale  # [G, H/G, t, S]
        if spec.softcap is not None:
            scores = spec.softcap * torch.tanh(scores / spec.softcap)
        hidden = absent | (k_pos > q_pos[rows].unsqueeze(1))
        if spec.window is not None:
            hidden = hidden | (k_pos <= q_pos[rows].unsqueeze(1) - spec.window)
        scores = scores.masked_fill(hidden, NEG_INF)
        part = torch.logsumexp(scores, dim=-1)
        safe = part.masked_fill(torch.isneginf(part), 0.0)  # exp(-inf - 0) is the 0 we want
        weights = torch.exp(scores - safe.unsqueeze(-1))
        mixed = torch.matmul(weights, v_GSD.unsqueeze(1))  # [G, H/G, t, Dv]
        out[rows] = mixed.permute(2, 0, 1, 3).flatten(1, 2)
        lse[rows] = part.permute(2, 0, 1).flatten(1, 2)
    return Partial(out, lse)
