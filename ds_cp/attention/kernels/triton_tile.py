"""Device code that the Triton kernels share: one tile of keys folded into a running softmax.

Scores are kept in units of log2, since the hardware's exponential is 2^x. Products of fp32 are
asked for in full ("ieee"): the default would be TF32. Triton's interpreter cannot multiply bf16,
so there ``UPCAST`` rounds as the device does and multiplies in fp32.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
NEG_INF = tl.constexpr(float("-inf"))


@triton.jit
def capped(x, cap):
    """cap * tanh(x / cap), by a series near 0 where the quotient form would lose digits."""
    y = x / cap
    z = y * y
    series = 2.0 / 15.0 + z * (-17.0 / 315.0 + z * (62.0 / 2835.0))
    small = y + y * z * (-1.0 / 3.0 + z * series)
    large = 1.0 - 2.0 / (tl.exp2(y * (2.0 * LOG2E)) + 1.0)
    return cap * tl.where(tl.abs(y) < 0.25, small, large)


@triton.jit
def attend_tile(
    acc, top, total, q, q_pos,
    pages, page_stride, k_offset, v_offset,
    blocks, firsts, keys, base, low, high, u0,
    scale, cap, window,
    B: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    BN: tl.constexpr, MASKED: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Fold the BN keys from ``u0`` on into ``acc [M, BDV]``, ``top [M]`` and ``total [M]``.

    Key u is in slot ``u % B`` of entry ``base + u // B``; entries outside ``low .. high`` are none.
    ``q_pos``: int32 ``[M]``. Without MASKED every row sees every key.
    """
    u = u0 + tl.arange(0, BN)
    entry = base + u // B
    slot = u % B
    there = (entry >= low) & (entry < high)
    row = tl.load(blocks + entry, mask=there, other=0).to(tl.int64) * page_stride
    pos = tl.load(firsts + entry, mask=there, other=0).to(tl.int32) + slot
    there = there & (slot < tl.load(keys + entry, mask=there, other=0).to(tl.int32))

    d = tl.arange(0, BD)
    k_mask = there[:, None]
    if D != BD:
        k_mask = k_mask & (d < D)[None, :]
    k_at = (row + k_offset + slot * D)[:, None] + d[None, :]
    k = tl.load(pages + k_at, mask=k_mask, other=0.0)
    if UPCAST:
        k = k.to(tl.float32)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    if CAP:
        scores = capped(scores * scale, cap) * LOG2E
    else:
        scores = scores * (scale * LOG2E)
    seen = there[None, :]
    if MASKED:
        seen = seen & (pos[None, :] <= q_pos[:, None])
        if WINDOW:
            seen = seen & (pos[None, :] > q_pos[:, None] - window)
    scores = tl.where(seen, scores, NEG_INF)

    new_top = tl.maximum(top, tl.max(scores, 1))
    shift = tl.where(new_top == NEG_INF, 0.0, new_top)  # 2^(-inf - 0) is the 0 we want
    weights = tl.exp2(scores - shift[:, None])
    keep = tl.exp2(top - shift)
    total = total * keep + tl.sum(weights, 1)

    dv = tl.arange(0, BDV)
    v_mask = there[:, None]
    if DV != BDV:
        v_mask = v_mask & (dv < DV)[None, :]
    v_at = (row + v_offset + slot * DV)[:, None] + dv[None, :]
    v = tl.load(pages + v_at, mask=v_mask, other=0.0)
    if UPCAST:
        weights = weights.to(pages.dtype.element_ty).to(tl.float32)
        v = v.to(tl.float32)
    else:
        weights = weights.to(v.dtype)
    acc = tl.dot(weights, v, acc * keep[:, None], input_precision="ieee")
    return acc, new_top, total


@triton.jit
def fold(out, lse, more, more_lse):
    """The merge of two partials, ``[R, D]`` with natural-log lse ``[R]``. An empty side (lse -inf)
    leaves the other as it is, even if its out holds NaN."""
    out = tl.where((lse == NEG_INF)[:, None], 0.0, out)
    more = tl.where((more_lse == NEG_INF)[:, None], 0.0, more)
    top = tl.maximum(lse, more_lse)
    shift = tl.where(top == NEG_INF, 0.0, top)
    a = tl.exp2((lse - shift) * LOG2E)
    b = tl.exp2((more_lse - shift) * LOG2E)
    both = a + b
    safe = tl.where(both == 0.0, 1.0, both)
    merged = (out * a[:, None] + more * b[:, None]) / safe[:, None]
    return merged, tl.where(both == 0.0, NEG_INF, shift + tl.log2(safe) * LN2)
