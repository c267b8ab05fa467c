"""torch's own fused attention operators that return the log-sum-exp, on CPU and on CUDA.

Their peculiarities, handled here and nowhere else (torch 2.13):
- CPU flash: ``is_causal`` is top-left aligned, so it is used for squares only; a row that sees
  nothing gets out 0 and lse **0** (``hide_blind``); masks must be float; head dims of keys and
  values must be equal, so the smaller ones are padded with zeros, which changes no score.
- CPU flash reads grouped KV heads without expansion, but with few query rows it is several times
  faster when the query heads of one KV head are folded into rows; without a mask that is exact.
- All of them read the last dimension with stride 1 whatever it is, on CPU without a check.
- CUDA flash wants fp16 or bf16, no mask and at most 256 dims a head; the memory-efficient one takes
  a mask and fp32 and pads the lse. Both want K and V expanded to the query heads unless heads are
  folded, and head dims that are multiples of 8.
- No operator knows a soft cap: ``capped`` is plain math with the same signature.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch.nn.functional import pad

from ds_cp.attention.spec import LayerSpec
from ds_cp.attention.state import NEG_INF

CUDA_DIM = 8  # dims: CUDA's operators take head dims that are multiples of it
FLASH_DIM = 256  # dims: largest head dim of CUDA's flash operator
MASK_KEYS = 16  # keys: rows of a mask on CUDA begin at multiples of it
SCORE_BYTES = 16 * 2**20  # bytes of fp32 scores that ``capped`` holds at once

# (q [B, H, R, D], k [B, G, S, D], v [B, G, S, Dv], mask or None, causal) -> out [B, H, R, Dv] in
# q's dtype or fp32, lse [B, H, R], natural log. ``mask``: in q's dtype, 0 or -inf, [R, S] or
# [B, 1, 1, S]; ``causal``: R = S, row i sees the keys up to i. Last dimensions are dense.
Operator = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, bool],
    tuple[torch.Tensor, torch.Tensor],
]


def operator(spec: LayerSpec, device: torch.device) -> Operator:
    """What computes a layer's attention on a device."""
    if spec.softcap is not None:
        return partial(capped, spec.scale, spec.softcap)
    return partial(cpu_op if device.type == "cpu" else cuda_op, spec.scale)


def hide_blind(
    mask: torch.Tensor, out: torch.Tensor, lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(0, -inf)`` for the rows of a mask ``[R, S]`` that hides every key from them."""
    blind = torch.isneginf(mask).all(dim=-1)
    return out.masked_fill(blind[:, None], 0.0), lse.masked_fill(blind, NEG_INF)


def cpu_op(
    scale: float,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """An ``Operator``: the CPU's flash kernel."""
    v_dim, most = v.shape[3], max(k.shape[3], v.shape[3])
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        _padded(q, most), _padded(k, most), _padded(v, most), 0.0, causal,
        attn_mask=mask, scale=scale,
    )  # fmt: skip
    return out[..., :v_dim], lse


def cuda_op(
    scale: float,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """An ``Operator``: flash where it can, else the memory-efficient kernel."""
    if k.shape[1] != q.shape[1]:
        fold = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(fold, dim=1), v.repeat_interleave(fold, dim=1)
    rows, v_dim = q.shape[2], v.shape[3]
    most = -(-max(k.shape[3], v_dim) // CUDA_DIM) * CUDA_DIM
    q, k, v = _padded(q, most), _padded(k, most), _padded(v, most)
    half = q.dtype in (torch.float16, torch.bfloat16)
    if mask is None and half and most <= FLASH_DIM:
        out, lse = cuda_flash(q, k, v, scale, causal)
        return out[..., :v_dim], lse
    if mask is not None:
        # The operator reads the mask in aligned strides: pad the last dim, then cut the view.
        keys = mask.shape[-1]
        room = -(-keys // MASK_KEYS) * MASK_KEYS
        mask = _padded(mask, room)[..., :keys].expand(*q.shape[:3], -1)
    out, lse = cuda_efficient(q, k, v, scale, mask, causal)
    return out[..., :v_dim], lse[:, :, :rows]


def capped(
    scale: float,
    cap: float,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """An ``Operator`` that caps the scaled scores, in fp32 (fp64 for fp64), in slices of rows."""
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    (batch, heads, rows, _), (_, kv_heads, keys, v_dim) = q.shape, v.shape
    by_kv_head = (batch, kv_heads, heads // kv_heads, -1, q.shape[3])
    k_t, v_t = k.to(compute).unsqueeze(2).transpose(-1, -2), v.to(compute).unsqueeze(2)
    out = torch.empty(batch, heads, rows, v_dim, dtype=compute, device=q.device)
    lse = torch.empty(batch, heads, rows, dtype=compute, device=q.device)
    at = torch.arange(keys, device=q.device)
    step = max(1, SCORE_BYTES // (batch * heads * keys * 4))
    for low in range(0, rows, step):
        some = slice(low, min(low + step, rows))
        scores = torch.matmul(q[:, :, some].to(compute).reshape(by_kv_head), k_t)
        scores = torch.tanh_(scores.mul_(scale / cap)).mul_(cap)  # [B, G, H/G, r, S]
        if mask is not None:
            scores += mask[some] if mask.dim() == 2 else mask.unsqueeze(1)
        if causal:
            scores.masked_fill_(
                at > torch.arange(low, some.stop, device=q.device)[:, None], NEG_INF
            )
        found = torch.logsumexp(scores, dim=-1)
        weights = torch.exp_(scores.sub_(found.unsqueeze(-1)))
        out[:, :, some] = torch.matmul(weights, v_t).flatten(1, 2)
        lse[:, :, some] = found.flatten(1, 2)
    return out, lse


def cuda_flash(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """FlashAttention as torch carries it."""
    found = torch.ops.aten._scaled_dot_product_flash_attention(
        q, k, v, 0.0, causal, False, scale=scale
    )
    return found[0], found[1]


def cuda_efficient(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    mask: torch.Tensor | None,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The memory-efficient kernel; its lse has more rows than there are."""
    found = torch.ops.aten._scaled_dot_product_efficient_attention(
        q, k, v, mask, True, 0.0, causal, scale=scale
    )
    return found[0], found[1]


def _padded(x: torch.Tensor, size: int) -> torch.Tensor:
    """``x`` with zeros up to ``size`` in the last dimension."""
    missing = size - x.shape[-1]
    return pad(x, (0, missing)) if missing else x
