"""The flash-attn package (2.x), wired where it is importable: CUDA, fp16 or bf16.

Its peculiarities end here: the causal mask is end-aligned (used for squares only, where both ends
meet), zero keys give a lse of **+inf** (never asked: empty tiles do not exist), lse comes as
``[B, H, T]`` and is a natural log, GQA is native, and sliding windows are expressed per tile. A
window side as long as the keys or longer is dropped by the package, and when the other side is not,
it is put back as long as the keys. With fewer keys than rows that hides or shows the wrong ones, so
such a tile takes the reference kernel. Importing this file raises ``ImportError`` for a flash-attn
without the two functions or an argument that they are called with.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from flash_attn import flash_attn_func, flash_attn_with_kvcache

from ds_cp.attention.kernels.reference import reference_kernel
from ds_cp.attention.kernels.sdpa import sdpa_kernel, sdpa_rows
from ds_cp.attention.spec import LayerSpec, Padding
from ds_cp.attention.state import NEG_INF, Partial, dense, empty_partial, merge_all
from ds_cp.attention.tiles import Tile, cover
from ds_cp.layout import Runs

HEAD_DIM, HEAD_DIM_STEP = 256, 8  # dims: largest head_dim, and what it must be a multiple of


def _check_arguments(function: Callable[..., Any], *names: str) -> None:
    missing = [name for name in names if name not in inspect.signature(function).parameters]
    if missing:
        raise ImportError(f"{function.__name__} has no argument {', '.join(missing)}")


_check_arguments(
    flash_attn_func, "softmax_scale", "causal", "window_size", "softcap", "return_attn_probs"
)
_check_arguments(
    flash_attn_with_kvcache, "cache_seqlens", "softmax_scale", "softcap", "return_softmax_lse"
)


def flash_kernel(
    q_THD: torch.Tensor,
    k_SGD: torch.Tensor,
    v_SGD: torch.Tensor,
    q_runs: Runs,
    k_runs: Runs,
    spec: LayerSpec,
) -> Partial:
    """Attention by flash-attn, tile by tile; by torch's operators where the layer's head_dim is
    none of flash-attn's. Shapes and meaning as in ``ds_cp.attention.kernels``."""
    if not takes_head_dim(spec.head_dim):
        return sdpa_kernel(q_THD, k_SGD, v_SGD, q_runs, k_runs, spec)
    q_THD, k_SGD, v_SGD = dense(q_THD), dense(k_SGD), dense(v_SGD)
    num_tokens, num_heads, head_dim = q_THD.shape
    tiles = cover(q_runs, k_runs, spec.window) if num_tokens and k_SGD.shape[0] else ()
    if len(tiles) == 1 and tiles[0].rows == num_tokens:
        return _tile(q_THD, k_SGD, v_SGD, tiles[0], spec)
    whole = empty_partial(num_tokens, num_heads, head_dim, q_THD.device)
    for tile in tiles:
        rows = slice(tile.row, tile.row + tile.rows)
        so_far = Partial(whole.out[rows], whole.lse[rows])
        merged = merge_all([so_far, _tile(q_THD, k_SGD, v_SGD, tile, spec)])
        whole.out[rows] = merged.out
        whole.lse[rows] = merged.lse
    return whole


def flash_rows(
    q_BHD: torch.Tensor,
    k_BGSD: torch.Tensor,
    v_BGSD: torch.Tensor,
    padding: Padding,
    spec: LayerSpec,
) -> Partial:
    """One query per row over its own keys, in one call: flash-attn's decode kernel, to which the
    gathered keys are a cache of ``padding.lengths``."""
    if not takes_head_dim(spec.head_dim):
        return sdpa_rows(q_BHD, k_BGSD, v_BGSD, padding, spec)
    out, lse = flash_attn_with_kvcache(
        dense(q_BHD).unsqueeze(1),
        dense(k_BGSD).transpose(1, 2),
        dense(v_BGSD).transpose(1, 2),
        cache_seqlens=padding.lengths,
        softmax_scale=spec.scale,
        softcap=spec.softcap or 0.0,
        return_softmax_lse=True,
    )
    return Partial(out[:, 0], lse[:, :, 0].float())


def takes_head_dim(head_dim: int) -> bool:
    """Whether flash-attn has a kernel for this head_dim."""
    return head_dim % HEAD_DIM_STEP == 0 and head_dim <= HEAD_DIM


def _tile(
    q_THD: torch.Tensor, k_SGD: torch.Tensor, v_SGD: torch.Tensor, tile: Tile, spec: LayerSpec
) -> Partial:
    q_THD = q_THD[tile.row : tile.row + tile.rows]
    k_SGD = k_SGD[tile.key : tile.key + tile.keys]
    v_SGD = v_SGD[tile.key : tile.key + tile.keys]
    left, right = -1, -1
    if tile.kind == "band":
        # flash-attn counts from the end: row i sits at key i + keys - rows for it. Shift the
        # window by the difference to the true positions. A negative width means "no limit" to it.
        assert spec.window is not None
        shift = (tile.row_pos - tile.key_pos) - (tile.keys - tile.rows)
        left, right = spec.window - 1 - shift, shift
        if tile.keys < tile.rows or left < 0 or right < 0:
            q_runs, k_runs = ((tile.row_pos, tile.rows),), ((tile.key_pos, tile.keys),)
            return reference_kernel(q_THD, k_SGD, v_SGD, q_runs, k_runs, spec)
    out, lse, _ = flash_attn_func(
        q_THD.unsqueeze(0),
        k_SGD.unsqueeze(0),
        v_SGD.unsqueeze(0),
        softmax_scale=spec.scale,
        causal=tile.kind == "causal",
        window_size=(left, right),
        softcap=spec.softcap or 0.0,
        return_attn_probs=True,
    )
    lse = lse[0].transpose(0, 1)
    blind = torch.isinf(lse) | torch.isnan(lse)
    return Partial(
        out[0].masked_fill(blind.unsqueeze(-1), 0.0), lse.float().masked_fill(blind, NEG_INF)
    )
