"""torch's own fused attention operators that return the log-sum-exp, on CPU and on CUDA.

Their peculiarities, handled here and nowhere else (torch 2.13):
- CPU flash: ``is_causal`` is top-left aligned, so it is used for squares only; a row that sees
  nothing gets out 0 and lse **0**, which is set to -inf here; masks must be float.
- CPU flash reads grouped KV heads without expansion, but with few query rows it is several times
  faster when the query heads of one KV head are folded into rows; without a mask that is exact.
- All of them read the last dimension with stride 1 whatever it is, on CPU without a check; q, k and
  v are made dense first.
- CUDA flash wants fp16 or bf16, no mask and at most 256 dims a head; the memory-efficient one takes
  a mask and fp32 and pads the lse. Both want K and V expanded to the query heads unless heads are
  folded, and head dims that are multiples of 8: others are padded with zeros, which changes no
  score.
- No operator knows a soft cap: those layers take the reference kernel.
"""

from __future__ import annotations

import math

import torch

from ds_cp.attention.kernels.reference import reference_kernel, reference_rows
from ds_cp.attention.spec import LayerSpec, Padding
from ds_cp.attention.state import (
    NEG_INF,
    Partial,
    dense,
    empty_partial,
    merge_all,
    split_heads,
)
from ds_cp.attention.tiles import Tile, cover
from ds_cp.layout import Runs

OP_ROWS = 32  # query rows of one task of the CPU operator, while there are few rows
CUDA_DIM = 8  # dims: CUDA's operators take head_dims that are multiples of it
FLASH_DIM = 256  # dims: largest head_dim of CUDA's flash operator
PART_KEYS = 1536  # least keys of a part; with fewer the merge costs more than it saves


def sdpa_kernel(
    q_THD: torch.Tensor,
    k_SGD: torch.Tensor,
    v_SGD: torch.Tensor,
    q_runs: Runs,
    k_runs: Runs,
    spec: LayerSpec,
) -> Partial:
    """Attention by torch's fused operators, tile by tile, merged in tile order.

    Shapes, masks and the empty case as in ``ds_cp.attention.kernels``. ``out`` is in q's dtype when
    one tile was enough for a row, else fp32.
    """
    if spec.softcap is not None:
        return reference_kernel(q_THD, k_SGD, v_SGD, q_runs, k_runs, spec)
    q_THD, k_SGD, v_SGD = dense(q_THD), dense(k_SGD), dense(v_SGD)
    num_tokens = q_THD.shape[0]
    tiles = cover(q_runs, k_runs, spec.window) if num_tokens and k_SGD.shape[0] else ()
    if len(tiles) == 1 and tiles[0].rows == num_tokens:
        return _tile(q_THD, k_SGD, v_SGD, tiles[0], spec)
    whole = empty_partial(num_tokens, q_THD.shape[1], q_THD.shape[2], q_THD.device)
    for low, high, group in _row_groups(tiles):
        parts = [
            _grow(_tile(q_THD, k_SGD, v_SGD, tile, spec), tile.row - low, high - low)
            for tile in group
        ]
        part = merge_all(parts)
        whole.out[low:high] = part.out
        whole.lse[low:high] = part.lse
    return whole


def sdpa_rows(
    q_BHD: torch.Tensor,
    k_BGSD: torch.Tensor,
    v_BGSD: torch.Tensor,
    padding: Padding,
    spec: LayerSpec,
) -> Partial:
    """One query per row over its own keys, in one call; query heads of a KV head are folded into
    rows."""
    if spec.softcap is not None:
        return reference_rows(q_BHD, k_BGSD, v_BGSD, padding, spec)
    q_BGFD = split_heads(dense(q_BHD), spec.num_kv_heads)
    k_BGSD, v_BGSD = dense(k_BGSD), dense(v_BGSD)
    if q_BHD.device.type == "cpu":
        out, lse = _cpu_op(q_BGFD, k_BGSD, v_BGSD, spec.scale, padding.mask, False)
    else:
        mask = padding.mask.expand(*q_BGFD.shape[:3], -1)
        out, lse = _cuda_masked(q_BGFD, k_BGSD, v_BGSD, spec.scale, mask)
    return Partial(out.flatten(1, 2), lse.flatten(1, 2))


def _row_groups(tiles: tuple[Tile, ...]) -> list[tuple[int, int, list[Tile]]]:
    """Tiles whose rows overlap, gathered into (first row, end row, tiles) with disjoint rows."""
    groups: list[tuple[int, int, list[Tile]]] = []
    for tile in sorted(tiles, key=lambda t: (t.row, -t.rows)):
        if groups and tile.row < groups[-1][1]:
            low, high, members = groups[-1]
            groups[-1] = (low, max(high, tile.row + tile.rows), [*members, tile])
        else:
            groups.append((tile.row, tile.row + tile.rows, [tile]))
    return groups


def _grow(part: Partial, offset: int, rows: int) -> Partial:
    """A partial of some rows as a partial of all rows of its group: the others saw nothing."""
    if part.lse.shape[0] == rows:
        return part
    grown = empty_partial(rows, part.out.shape[1], part.out.shape[2], part.out.device)
    grown.out[offset : offset + part.lse.shape[0]] = part.out
    grown.lse[offset : offset + part.lse.shape[0]] = part.lse
    return grown


def _tile(
    q_THD: torch.Tensor, k_SGD: torch.Tensor, v_SGD: torch.Tensor, tile: Tile, spec: LayerSpec
) -> Partial:
    q, k, v = q_THD, k_SGD, v_SGD
    if tile.rows != q.shape[0]:
        q = q[tile.row : tile.row + tile.rows]
    if tile.keys != k.shape[0]:
        k = k[tile.key : tile.key + tile.keys]
        v = v[tile.key : tile.key + tile.keys]
    if tile.kind == "full":
        return _folded(q, k, v, spec)
    mask = _band_mask(tile, spec, q) if tile.kind == "band" else None
    op = _cpu_op if q.device.type == "cpu" else _cuda_op
    out, lse = op(_heads_first(q), _heads_first(k), _heads_first(v), spec.scale, mask, mask is None)
    part = Partial(out[0].transpose(0, 1), lse[0].transpose(0, 1))
    if mask is None:
        return part
    blind = torch.isneginf(mask).all(dim=-1)
    return Partial(
        part.out.masked_fill(blind[:, None, None], 0.0),
        part.lse.masked_fill(blind[:, None], NEG_INF),
    )


def _folded(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: LayerSpec) -> Partial:
    """All keys visible: fold the H/G query heads of each KV head into rows, ``[1, G, H/G * T,
    D]``."""
    num_tokens, num_heads, head_dim = q.shape
    fold = num_heads // spec.num_kv_heads
    op = _cpu_op if q.device.type == "cpu" else _cuda_op
    if num_tokens == 1:  # a decode step: the fold is a view
        rows = q.reshape(spec.num_kv_heads, fold, head_dim)
    else:
        rows = split_heads(q, spec.num_kv_heads).permute(1, 2, 0, 3).flatten(1, 2)
    parts = _parts(spec.num_kv_heads * -(-rows.shape[1] // OP_ROWS), k) if op is _cpu_op else 1
    if parts > 1:
        out, lse = _in_parts(rows, k, v, spec.scale, parts)
    else:
        out, lse = op(rows.unsqueeze(0), _heads_first(k), _heads_first(v), spec.scale, None, False)
    if num_tokens == 1:
        return Partial(out.reshape(1, num_heads, head_dim), lse.reshape(1, num_heads))
    by_head = (spec.num_kv_heads, fold, num_tokens)
    out = out[0].reshape(*by_head, head_dim).permute(2, 0, 1, 3).flatten(1, 2)
    lse = lse[0].reshape(by_head).permute(2, 0, 1).flatten(1, 2)
    return Partial(out, lse)


def _parts(tasks: int, k_SGD: torch.Tensor) -> int:
    """The number of parts to cut the CPU operator's keys into. It deals out whole (head, rows)
    tasks to threads, and a few tasks do not divide evenly: 3 KV heads keep 2 threads busy for the
    time of 4. Each part of the keys is a task of its own."""
    threads = torch.get_num_threads()
    if tasks >= 8 * threads or tasks % threads == 0:
        return 1
    return max(1, min(threads // math.gcd(tasks, threads), k_SGD.shape[0] // PART_KEYS))


def _in_parts(
    rows_GRD: torch.Tensor, k_SGD: torch.Tensor, v_SGD: torch.Tensor, scale: float, parts: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over equal parts of the keys side by side and over the few that are left, merged
    (split-KV, as flash-decoding does it). ``[1, G, R, D]`` fp32 and ``[1, G, R]``."""
    each = k_SGD.shape[0] // parts
    k, v = (
        x[: parts * each].view(parts, each, *x.shape[1:]).transpose(1, 2) for x in (k_SGD, v_SGD)
    )
    out, lse = _cpu_op(rows_GRD.expand(parts, -1, -1, -1), k, v, scale, None, False)
    if parts * each < k_SGD.shape[0]:
        k, v = (_heads_first(x[parts * each :]) for x in (k_SGD, v_SGD))
        last = _cpu_op(rows_GRD.unsqueeze(0), k, v, scale, None, False)
        out, lse = torch.cat([out, last[0]]), torch.cat([lse, last[1]])
    weights = torch.softmax(lse, dim=0).unsqueeze(-1)
    return (out * weights).sum(dim=0, keepdim=True), torch.logsumexp(lse, dim=0, keepdim=True)


def _heads_first(x_THD: torch.Tensor) -> torch.Tensor:
    return x_THD.transpose(0, 1).unsqueeze(0)


def _band_mask(tile: Tile, spec: LayerSpec, q: torch.Tensor) -> torch.Tensor:
    """``[rows, keys]`` in q's dtype: 0 where visible, -inf elsewhere."""
    assert spec.window is not None
    q_pos = torch.arange(tile.row_pos, tile.row_pos + tile.rows, device=q.device).unsqueeze(1)
    k_pos = torch.arange(tile.key_pos, tile.key_pos + tile.keys, device=q.device)
    hidden = (k_pos > q_pos) | (k_pos <= q_pos - spec.window)
    return torch.zeros(hidden.shape, dtype=q.dtype, device=q.device).masked_fill_(hidden, NEG_INF)


def _cpu_op(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    mask: torch.Tensor | None,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, causal, attn_mask=mask, scale=scale
    )
    return out, lse


def _cuda_op(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    mask: torch.Tensor | None,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    if k.shape[1] != q.shape[1]:
        fold = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(fold, dim=1), v.repeat_interleave(fold, dim=1)
    half = q.dtype in (torch.float16, torch.bfloat16)
    if mask is None and half and q.shape[3] <= FLASH_DIM:
        out, lse = _cuda_flash(_padded(q), _padded(k), _padded(v), scale, causal)
        return out[..., : q.shape[3]], lse
    if mask is not None:
        # The operator reads the mask in aligned strides: pad the last dim, then cut the view.
        width = -(-mask.shape[1] // 16) * 16
        room = mask.new_zeros(mask.shape[0], width)
        room[:, : mask.shape[1]] = mask
        mask = room[:, : mask.shape[1]].expand(1, q.shape[1], -1, -1)
    return _cuda_masked(q, k, v, scale, mask, causal)


def _cuda_masked(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    mask: torch.Tensor | None,
    causal: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = _cuda_efficient(_padded(q), _padded(k), _padded(v), scale, mask, causal)
    return out[..., : q.shape[3]], lse[:, :, : q.shape[2]]


def _padded(x: torch.Tensor) -> torch.Tensor:
    """``x`` with zeros up to the next multiple of ``CUDA_DIM`` dims a head."""
    missing = -x.shape[3] % CUDA_DIM
    return torch.nn.functional.pad(x, (0, missing)) if missing else x


def _cuda_flash(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    found = torch.ops.aten._scaled_dot_product_flash_attention(
        q, k, v, 0.0, causal, False, scale=scale
    )
    return found[0], found[1]


def _cuda_efficient(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    mask: torch.Tensor | None,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    found = torch.ops.aten._scaled_dot_product_efficient_attention(
        q, k, v, mask, True, 0.0, causal, scale=scale
    )
    return found[0], found[1]
