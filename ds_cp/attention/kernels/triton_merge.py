"""Triton: partials that arrived folded into rows of a running one, and tokens stored in pages."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ds_cp.attention.kernels.triton_tile import NEG_INF, fold
from ds_cp.attention.pages import Pages
from ds_cp.attention.state import Partial, dense

ROWS = 16  # (row, head) pairs of one program
TOKENS = 64  # tokens of one program


def merge_stacked(
    into: Partial, out_NRHD: torch.Tensor, lse_NRH: torch.Tensor, rows: torch.Tensor | None
) -> None:
    """Fold N partials of R rows, the first one first, into the rows ``rows`` (int64 ``[R]``, each
    once; None: all, in order) of ``into``, in one launch.

    ``out_NRHD``: any float dtype, any strides (views of what came over the wire); ``lse_NRH``:
    fp32. ``into``: fp32, dense in its last dimension.
    """
    out_NRHD = dense(out_NRHD)
    count, num_rows, num_heads, dim = out_NRHD.shape
    if not count or not num_rows:
        return
    fold_kernel[(triton.cdiv(num_rows * num_heads, ROWS),)](
        into.out, into.lse, out_NRHD, lse_NRH, into.lse if rows is None else rows,
        count, num_rows, num_heads,
        into.out.stride(0), into.out.stride(1), into.lse.stride(0), into.lse.stride(1),
        *out_NRHD.stride()[:3], *lse_NRH.stride(),
        INDEXED=rows is not None, R=ROWS, D=dim, BD=triton.next_power_of_2(dim),
    )  # fmt: skip


def write(
    pages: Pages,
    k_TGD: torch.Tensor,
    v_TGD: torch.Tensor,
    blocks: torch.Tensor,
    places: torch.Tensor,
) -> None:
    """As in ``PagedKernel``, keys and values in one launch."""
    shape, tokens = pages.shape, len(blocks)
    if not tokens:
        return
    k_TGD, v_TGD = dense(k_TGD), dense(v_TGD)
    write_kernel[(triton.cdiv(tokens, TOKENS), shape.num_kv_heads)](
        pages.data, k_TGD, v_TGD, blocks, places, tokens, pages.data.stride(0), shape.k_elements,
        k_TGD.stride(0), k_TGD.stride(1), v_TGD.stride(0), v_TGD.stride(1),
        T=TOKENS, B=shape.block_size, D=shape.k_dim, DV=shape.v_dim,
        BD=triton.next_power_of_2(shape.k_dim), BDV=triton.next_power_of_2(shape.v_dim),
    )  # fmt: skip


@triton.jit(
    do_not_specialize=[
        "count",
        "num_rows",
        "more_n",
        "more_t",
        "more_h",
        "more_lse_n",
        "more_lse_t",
        "more_lse_h",
    ],
    do_not_specialize_on_alignment=["out", "lse", "more", "more_lse", "rows"],
)
def fold_kernel(
    out, lse, more, more_lse, rows, count, num_rows, num_heads, out_t, out_h, lse_t, lse_h,
    more_n, more_t, more_h, more_lse_n, more_lse_t, more_lse_h,
    INDEXED: tl.constexpr, R: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    row = pair // num_heads
    head = pair % num_heads
    live = row < num_rows
    target = row
    if INDEXED:
        target = tl.load(rows + row, mask=live, other=0)
    d = tl.arange(0, BD)
    mask = live[:, None] & (d < D)[None, :]
    out_at = out + (target * out_t + head * out_h)[:, None] + d[None, :]
    lse_at = lse + target * lse_t + head * lse_h
    acc = tl.load(out_at, mask=mask, other=0.0)
    found = tl.load(lse_at, mask=live, other=NEG_INF)
    for n in range(0, count):
        at = tl.cast(n, tl.int64) * more_n + row * more_t + head * more_h
        lse_from = tl.cast(n, tl.int64) * more_lse_n + row * more_lse_t + head * more_lse_h
        part = tl.load(more + at[:, None] + d[None, :], mask=mask, other=0.0).to(tl.float32)
        part_lse = tl.load(more_lse + lse_from, mask=live, other=NEG_INF).to(tl.float32)
        acc, found = fold(acc, found, part, part_lse)
    tl.store(out_at, acc, mask=mask)
    tl.store(lse_at, found, mask=live)


@triton.jit(
    do_not_specialize=["tokens"],
    do_not_specialize_on_alignment=["k", "v", "blocks", "places"],
)
def write_kernel(
    pages, k, v, blocks, places, tokens, page_stride, v_start, k_t, k_h, v_t, v_h,
    T: tl.constexpr, B: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BD: tl.constexpr, BDV: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(1)
    token = tl.program_id(0).to(tl.int64) * T + tl.arange(0, T)
    live = token < tokens
    row = tl.load(blocks + token, mask=live, other=0) * page_stride
    place = tl.load(places + token, mask=live, other=0)
    d = tl.arange(0, BD)
    mask = live[:, None] & (d < D)[None, :]
    keys = tl.load(k + (token * k_t + group * k_h)[:, None] + d[None, :], mask=mask)
    at = row + group * (B * D) + place * D
    tl.store(pages + at[:, None] + d[None, :], keys, mask=mask)
    dv = tl.arange(0, BDV)
    mask = live[:, None] & (dv < DV)[None, :]
    values = tl.load(v + (token * v_t + group * v_h)[:, None] + dv[None, :], mask=mask)
    at = row + v_start + group * (B * DV) + place * DV
    tl.store(pages + at[:, None] + dv[None, :], values, mask=mask)
