"""The flash-attn package (2.x), wired where it is importable: CUDA, fp16 or bf16.

Its peculiarities end here: the causal mask is end-aligned (used for squares only, where both ends
meet), zero keys give a lse of **+inf** (never asked: empty tiles do not exist), lse comes as
``[B, H, T]`` and is a natural log, GQA is native, and sliding windows are expressed per tile.
"""

from __future__ import annotations

import torch
from flash_attn import flash_attn_func, flash_attn_with_kvcache

from ds_cp.attention.spec import LayerSpec, Padding
from ds_cp.attention.state import NEG_INF, Partial, empty_partial, merge_all
from ds_cp.attention.tiles import Tile, cover
from ds_cp.layout import Runs


def flash_kernel(
    q_THD: torch.Tensor,
    k_SGD: torch.Tensor,
    v_SGD: torch.Tensor,
    q_runs: Runs,
    k_runs: Runs,
    spec: LayerSpec,
) -> Partial:
    """Attention by flash-attn, tile by tile. Shapes and meaning as in
    ``ds_cp.attention.kernels``."""
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
    out, lse = flash_attn_with_kvcache(
        q_BHD.unsqueeze(1),
        k_BGSD.transpose(1, 2),
        v_BGSD.transpose(1, 2),
        cache_seqlens=padding.lengths,
        softmax_scale=spec.scale,
        softcap=spec.softcap or 0.0,
        return_softmax_lse=True,
    )
    return Partial(out[:, 0], lse[:, :, 0].float())


def _tile(
    q_THD: torch.Tensor, k_SGD: torch.Tensor, v_SGD: torch.Tensor, tile: Tile, spec: LayerSpec
) -> Partial:
    left, right = -1, -1
    if tile.kind == "band":
        # flash-attn counts from the end: row i is taken to sit at key i + keys - rows. Shift the
        # window by the difference to the true positions. A negative width means "no limit" to it,
        # so a band that would need one takes the plain kernel.
        assert spec.window is not None
        shift = (tile.row_pos - tile.key_pos) - (tile.keys - tile.rows)
        left, right = spec.window - 1 - shift, shift
        if left < 0 or right < 0:
            return _masked_by_rows(q_THD, k_SGD, v_SGD, tile, spec)
    out, lse, _ = flash_attn_func(
        q_THD[tile.row : tile.row + tile.rows].unsqueeze(0),
        k_SGD[tile.key : tile.key + tile.keys].unsqueeze(0),
        v_SGD[tile.key : tile.key + tile.keys].unsqueeze(0),
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


def _masked_by_rows(
    q_THD: torch.Tensor, k_SGD: torch.Tensor, v_SGD: torch.Tensor, tile: Tile, spec: LayerSpec
) -> Partial:
    """A band whose shifted window would be negative: the reference kernel takes the tile."""
    from ds_cp.attention.kernels.reference import reference_kernel

    return reference_kernel(
        q_THD[tile.row : tile.row + tile.rows],
        k_SGD[tile.key : tile.key + tile.keys],
        v_SGD[tile.key : tile.key + tile.keys],
        ((tile.row_pos, tile.rows),),
        ((tile.key_pos, tile.keys),),
        spec,
    )
