"""Triton: tiles of many rows over the blocks that they can see, of all requests in one launch.

Which tile is of which request, and from where to where its keys go, is planned on the host once a
step; keys that no row of a tile can see are never read, and those that every row sees are not
compared.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ds_cp.attention.batch import Blocks, PagedBatch, Part
from ds_cp.attention.kernels.triton_decode import is_few
from ds_cp.attention.kernels.triton_tables import Call, Tile, prefill_tile
from ds_cp.attention.kernels.triton_tile import LN2, NEG_INF, attend_tile, fold
from ds_cp.attention.state import Partial
from ds_cp.layout import Runs, total

FIELDS = 8  # integers of one tile; six are used


@dataclass(frozen=True)
class PrefillPlan:
    """``tiles``: int32 ``[num_tiles, FIELDS]``: request, first row (query heads folded in), entries
    that its first key tile is ahead of the list, first key, first key that not all rows see, end
    key. Keys are counted from the start of a key tile."""

    num_tiles: int
    tiles: torch.Tensor


def plan_prefill(
    batch: PagedBatch, heads_per_kv: int, tile: Tile, block_size: int, window: int | None
) -> PrefillPlan | None:
    """Made once a step; None when there is nothing to do. The longest tiles come first, so that no
    long one is left alone at the end."""
    tiles: list[tuple[int, ...]] = []
    for request, part in enumerate(batch.parts):
        rows = total(part.q_runs)
        if len(part.blocks) and not is_few(rows, heads_per_kv):
            found = _tiles(part, rows, heads_per_kv, tile, block_size, window)
            tiles += ((request, *each) for each in found)
    if not tiles:
        return None
    tiles.sort(key=lambda t: t[3] - t[5])
    flat = torch.tensor([t + (0,) * (FIELDS - len(t)) for t in tiles], dtype=torch.int32)
    device = batch.blocks.device
    if device.type == "cuda":
        flat = flat.pin_memory().to(device, non_blocking=True)
    return PrefillPlan(len(tiles), flat)


def _tiles(
    part: Part, rows: int, heads_per_kv: int, tile: Tile, size: int, window: int | None
) -> Iterator[tuple[int, ...]]:
    """First row, lead, first key, first masked key, end key of each tile that sees something."""
    blocks = part.blocks
    per = max(1, tile.keys // size)
    lead = blocks.firsts[0] // size % per  # key tiles start at multiples of their size in positions
    for row in range(0, rows * heads_per_kv, tile.rows):
        last_token = min(row + tile.rows - 1, rows * heads_per_kv - 1) // heads_per_kv
        low = _position(part.q_runs, row // heads_per_kv)
        high = _position(part.q_runs, last_token)
        end = bisect_right(blocks.firsts, high)
        begin = 0 if window is None else _ended(blocks, low - window + 1)
        if begin >= end:
            continue
        within = min(blocks.keys[end - 1], high - blocks.firsts[end - 1] + 1)
        end_key = (lead + end - 1) * size + within
        first_key = (lead + begin) * size // tile.keys * tile.keys
        masked = first_key
        if window is None:
            masked = _seen_by_all(blocks, low, lead, size) // tile.keys * tile.keys
        last_tile = -(-end_key // tile.keys) * tile.keys
        yield row, lead, first_key, max(first_key, min(masked, last_tile)), end_key


def _seen_by_all(blocks: Blocks, position: int, lead: int, size: int) -> int:
    """The end of the keys that a query at ``position`` sees all of."""
    whole = _ended(blocks, position + 1)
    more = position + 1 - blocks.firsts[whole] if whole < len(blocks) else 0
    return (lead + whole) * size + max(0, more)


def _ended(blocks: Blocks, position: int) -> int:
    """How many blocks hold only keys before ``position``."""
    begun = bisect_right(blocks.firsts, position)
    if begun and blocks.firsts[begun - 1] + blocks.keys[begun - 1] > position:
        return begun - 1
    return begun


def _position(runs: Runs, row: int) -> int:
    for start, length in runs:
        if row < length:
            return start + row
        row -= length
    raise IndexError("a row beyond the last run")


def prefill(call: Call, batch: PagedBatch, plan: PrefillPlan, into: Partial, merge: bool) -> None:
    """Attention of the planned tiles' rows, written over their rows of ``into`` or, with
    ``merge``, merged with them."""
    spec = call.spec
    tile = prefill_tile(call.pages.shape)
    prefill_kernel[(plan.num_tiles, spec.num_kv_heads)](
        call.q, call.q_positions, call.pages.data, batch.blocks, batch.firsts, batch.keys,
        batch.q_starts, batch.block_starts, plan.tiles, into.out, into.lse,
        into.out.stride(0), into.out.stride(1), into.lse.stride(0), into.lse.stride(1),
        *call.strides, *call.scalars,
        FOLD=spec.num_q_heads // spec.num_kv_heads, M=tile.rows, FIELDS=FIELDS, INTO=merge,
        **call.constants(tile), **tile.launch,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=["window"],
    do_not_specialize_on_alignment=[
        "q_positions", "blocks", "firsts", "keys", "q_starts", "block_starts",
    ],
)  # fmt: skip
def prefill_kernel(
    q, q_positions, pages, blocks, firsts, keys, q_starts, block_starts, tiles, out, lse,
    out_t, out_h, lse_t, lse_h, q_stride_t, q_stride_h, page_stride, v_start, scale, cap, window,
    FOLD: tl.constexpr, M: tl.constexpr, FIELDS: tl.constexpr, INTO: tl.constexpr,
    B: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    BN: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(1)
    plan = tiles + tl.program_id(0) * FIELDS
    request = tl.load(plan)
    r = tl.load(plan + 1) + tl.arange(0, M)
    lead = tl.load(plan + 2)
    first_key = tl.load(plan + 3)
    first_masked = tl.load(plan + 4)
    end_key = tl.load(plan + 5)
    row0 = tl.load(q_starts + request)
    low = tl.load(block_starts + request).to(tl.int32)
    high = tl.load(block_starts + request + 1).to(tl.int32)
    token = r // FOLD
    head = group * FOLD + r % FOLD
    live = token < tl.load(q_starts + request + 1) - row0
    q_pos = tl.load(q_positions + row0 + token, mask=live, other=0).to(tl.int32)
    d = tl.arange(0, BD)
    row = (row0 + token).to(tl.int64)
    q_at = (row * q_stride_t + head * q_stride_h)[:, None] + d[None, :]
    rows = tl.load(q + q_at, mask=live[:, None] & (d < D)[None, :], other=0.0)
    if UPCAST:
        rows = rows.to(tl.float32)
    acc = tl.zeros([M, BDV], dtype=tl.float32)
    top = tl.full([M], NEG_INF, dtype=tl.float32)
    total = tl.zeros([M], dtype=tl.float32)
    for u0 in range(first_key, first_masked, BN):
        acc, top, total = attend_tile(
            acc, top, total, rows, q_pos,
            pages, page_stride, group * (B * D), v_start + group * (B * DV),
            blocks, firsts, keys, low - lead, low, high, u0, scale, cap, window,
            B, D, DV, BD, BDV, BN, False, False, CAP, UPCAST,
        )  # fmt: skip
    for u0 in range(first_masked, end_key, BN):
        acc, top, total = attend_tile(
            acc, top, total, rows, q_pos,
            pages, page_stride, group * (B * D), v_start + group * (B * DV),
            blocks, firsts, keys, low - lead, low, high, u0, scale, cap, window,
            B, D, DV, BD, BDV, BN, True, WINDOW, CAP, UPCAST,
        )  # fmt: skip
    safe = tl.where(total > 0.0, total, 1.0)
    acc = acc / safe[:, None]
    found = tl.where(total > 0.0, (top + tl.log2(safe)) * LN2, NEG_INF)
    dv = tl.arange(0, BDV)
    mask = live[:, None] & (dv < DV)[None, :]
    out_at = out + (row * out_t + head * out_h)[:, None] + dv[None, :]
    lse_at = lse + row * lse_t + head * lse_h
    if INTO:
        before = tl.load(out_at, mask=mask, other=0.0)
        acc, found = fold(before, tl.load(lse_at, mask=live, other=NEG_INF), acc, found)
    tl.store(out_at, acc, mask=mask)
    tl.store(lse_at, found, mask=live)
