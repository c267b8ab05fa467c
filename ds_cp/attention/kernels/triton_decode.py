"""Triton: few rows a request over many keys, split by position, and the merge of the splits.

The queries of one KV head's query heads are rows of one product. A request's keys are cut at
multiples of ``SPLIT`` in positions, so that a row's result does not depend on what else is in the
step; a program takes every so-many-th split, whatever request it is of. No size here depends on
what is on the device: how many splits there are is planned there, under a bound from the host.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ds_cp.attention.batch import PagedBatch
from ds_cp.attention.kernels.triton_tables import Call, Tile, decode_tile
from ds_cp.attention.kernels.triton_tile import LN2, LOG2E, NEG_INF, attend_tile, fold
from ds_cp.attention.state import Partial
from ds_cp.layout import total

SPLIT = 512  # positions of one split
PROGRAMS = 2048  # programs of one launch at most, about; they share the splits
MERGE = 32  # splits that are read at once when they are merged
FEW = 2  # row tiles a request may have and be served here


@dataclass(frozen=True)
class DecodePlan:
    """The requests of a batch that have few rows, for layers with ``heads_per_kv`` query heads a KV
    head. ``tasks``: int32 ``[max_tasks, 4]``: request, split, first and end entry; ``bases``: int32
    ``[n + 1]``, the first task of each request."""

    max_rows: int  # of one such request
    max_tasks: int
    limit: int  # rows times heads_per_kv of such a request
    tasks: torch.Tensor
    bases: torch.Tensor


def is_few(rows: int, heads_per_kv: int) -> bool:
    """Whether a request with so many rows is served by the decode kernel. A function of the request
    and the layer alone."""
    return rows * heads_per_kv <= few_limit(heads_per_kv)


def few_limit(heads_per_kv: int) -> int:
    """Most rows, times query heads a KV head."""
    return FEW * max(row_tile(heads_per_kv), heads_per_kv)


def row_tile(heads_per_kv: int) -> int:
    """Rows of one product, query heads folded in."""
    return min(64, max(16, int(triton.next_power_of_2(heads_per_kv))))


def plan_decode(batch: PagedBatch, heads_per_kv: int) -> DecodePlan | None:
    """Made once a step, by one small launch; None when no request has few rows."""
    rows = [total(part.q_runs) for part in batch.parts]
    few = [
        (n, part.blocks.firsts)
        for n, part in zip(rows, batch.parts, strict=True)
        if n and is_few(n, heads_per_kv)
    ]
    if not few:
        return None
    splits = [f[-1] // SPLIT - f[0] // SPLIT + 1 if f else 0 for _, f in few]
    max_tasks, count, device = max(1, sum(splits)), len(batch.parts), batch.blocks.device
    tasks = torch.empty(max_tasks, 4, dtype=torch.int32, device=device)
    bases = torch.empty(count + 1, dtype=torch.int32, device=device)
    limit = few_limit(heads_per_kv)
    plan_kernel[(count,)](
        batch.q_starts, batch.block_starts, batch.firsts, tasks, bases, count, max_tasks,
        limit, FOLD=heads_per_kv, SPLIT=SPLIT, LANES=128,
    )  # fmt: skip
    return DecodePlan(max(n for n, _ in few), max_tasks, limit, tasks, bases)


def decode(call: Call, batch: PagedBatch, plan: DecodePlan, into: Partial, merge: bool) -> None:
    """Attention of the planned requests' rows, written over their rows of ``into`` or, with
    ``merge``, merged with them."""
    spec, shape = call.spec, call.pages.shape
    groups, heads_per_kv = spec.num_kv_heads, spec.num_q_heads // spec.num_kv_heads
    tile: Tile = decode_tile(shape, row_tile(heads_per_kv))
    width = plan.max_rows * heads_per_kv
    row_tiles = triton.cdiv(width, tile.rows)
    lanes = min(plan.max_tasks, max(1, PROGRAMS // (groups * row_tiles)))
    parts = (plan.max_tasks, groups, width)
    out = torch.empty(*parts, spec.v_dim, dtype=torch.float32, device=call.q.device)
    lse = torch.empty(parts, dtype=torch.float32, device=call.q.device)
    split_kernel[(lanes, groups, row_tiles)](
        call.q, call.q_positions, call.pages.data, batch.blocks, batch.firsts, batch.keys,
        batch.q_starts, plan.tasks, plan.bases, out, lse,
        len(batch.parts), plan.max_tasks, width, *call.strides, *call.scalars,
        FOLD=heads_per_kv, SPLIT=SPLIT, M=tile.rows, **call.constants(tile), **tile.launch,
    )  # fmt: skip
    merge_kernel[(len(batch.parts) * plan.max_rows, spec.num_q_heads)](
        out, lse, batch.q_starts, batch.block_starts, batch.firsts, plan.bases,
        into.out, into.lse, plan.max_rows, plan.max_tasks, plan.limit, groups, width,
        into.out.stride(0), into.out.stride(1), into.lse.stride(0), into.lse.stride(1),
        FOLD=heads_per_kv, SPLIT=SPLIT, CHUNK=MERGE, DV=spec.v_dim,
        BDV=triton.next_power_of_2(spec.v_dim), INTO=merge, num_warps=4,
    )  # fmt: skip


@triton.jit
def lower_bound(firsts, low, high, target):
    """The first entry of ``low .. high`` whose first position is at least ``target``, lane by
    lane."""
    a = tl.zeros_like(target) + low
    b = tl.zeros_like(target) + high
    while tl.max(b - a) > 0:
        searching = a < b
        middle = (a + b) // 2
        first = tl.load(firsts + middle, mask=searching, other=0).to(tl.int32)
        after = first < target
        a = tl.where(searching & after, middle + 1, a)
        b = tl.where(searching & (first >= target), middle, b)
    return a


# Index vectors are slices of one upload, so their alignment and lengths change from step to step:
# a kernel that was compiled anew for each would stop the engine for seconds.
@triton.jit(
    do_not_specialize=["count", "max_tasks", "limit"],
    do_not_specialize_on_alignment=["q_starts", "block_starts", "firsts", "tasks", "bases"],
)
def plan_kernel(
    q_starts, block_starts, firsts, tasks, bases, count, max_tasks,
    limit, FOLD: tl.constexpr, SPLIT: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    request = tl.program_id(0)
    base = 0
    for j0 in range(0, request, LANES):  # the splits of the requests before this one
        j = j0 + tl.arange(0, LANES)
        mine = j < request
        rows = tl.load(q_starts + j + 1, mask=mine, other=0) - tl.load(
            q_starts + j, mask=mine, other=0
        )
        low = tl.load(block_starts + j, mask=mine, other=0)
        high = tl.load(block_starts + j + 1, mask=mine, other=0)
        some = mine & (rows > 0) & (rows * FOLD <= limit) & (high > low)
        first = tl.load(firsts + low, mask=some, other=0) // SPLIT
        last = tl.load(firsts + high - 1, mask=some, other=0) // SPLIT
        base += tl.sum(tl.where(some, last - first + 1, 0).to(tl.int32), 0)
    rows = tl.load(q_starts + request + 1) - tl.load(q_starts + request)
    low = tl.load(block_starts + request).to(tl.int32)
    high = tl.load(block_starts + request + 1).to(tl.int32)
    splits = 0
    start = 0
    if (rows > 0) & (rows * FOLD <= limit) & (high > low):
        start = (tl.load(firsts + low) // SPLIT).to(tl.int32)
        splits = (tl.load(firsts + high - 1) // SPLIT).to(tl.int32) - start + 1
    tl.store(bases + request, base)
    if request == count - 1:
        tl.store(bases + count, base + splits)
    for s0 in range(0, splits, LANES):
        s = s0 + tl.arange(0, LANES)
        target = (start + s) * SPLIT
        a = lower_bound(firsts, low, high, target)
        b = lower_bound(firsts, low, high, target + SPLIT)
        at = tasks + (base + s) * 4
        mine = (s < splits) & (base + s < max_tasks)
        tl.store(at, tl.zeros_like(s) + request, mask=mine)
        tl.store(at + 1, start + s, mask=mine)
        tl.store(at + 2, a, mask=mine)
        tl.store(at + 3, b, mask=mine)


@triton.jit(
    do_not_specialize=["count", "max_tasks", "width", "window"],
    do_not_specialize_on_alignment=[
        "q_positions", "blocks", "firsts", "keys", "q_starts", "tasks", "bases",
    ],
)  # fmt: skip
def split_kernel(
    q, q_positions, pages, blocks, firsts, keys, q_starts, tasks, bases, part_out, part_lse,
    count, max_tasks, width, q_stride_t, q_stride_h, page_stride, v_start, scale, cap, window,
    FOLD: tl.constexpr, SPLIT: tl.constexpr, M: tl.constexpr,
    B: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    BN: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(1)
    r = tl.program_id(2) * M + tl.arange(0, M)
    token = r // FOLD
    head = group * FOLD + r % FOLD
    d = tl.arange(0, BD)
    dv = tl.arange(0, BDV)
    tasks_here = tl.minimum(tl.load(bases + count), max_tasks)
    for task in range(tl.program_id(0), tasks_here, tl.num_programs(0)):
        request = tl.load(tasks + task * 4)
        split = tl.load(tasks + task * 4 + 1)
        low = tl.load(tasks + task * 4 + 2)
        high = tl.load(tasks + task * 4 + 3)
        row0 = tl.load(q_starts + request)
        live = token < tl.load(q_starts + request + 1) - row0
        q_pos = tl.load(q_positions + row0 + token, mask=live, other=0).to(tl.int32)
        q_at = ((row0 + token).to(tl.int64) * q_stride_t + head * q_stride_h)[:, None] + d[None, :]
        rows = tl.load(q + q_at, mask=live[:, None] & (d < D)[None, :], other=0.0)
        if UPCAST:
            rows = rows.to(tl.float32)
        # Tiles start at multiples of BN in positions, wherever the list begins.
        lead = 0
        if BN > B:
            first = tl.load(firsts + low, mask=low < high, other=0).to(tl.int32)
            lead = first // B % (BN // B)
        keys_here = (lead + high - low) * B
        if split * SPLIT > tl.max(tl.where(live, q_pos, -1)):
            keys_here = 0  # all of them are later than the queries
        if WINDOW:
            nearest = tl.min(tl.where(live, q_pos, 2147483647))
            if (split + 1) * SPLIT + B <= nearest - window:
                keys_here = 0  # none is in a window
        acc = tl.zeros([M, BDV], dtype=tl.float32)
        top = tl.full([M], NEG_INF, dtype=tl.float32)
        total = tl.zeros([M], dtype=tl.float32)
        for u0 in range(0, keys_here, BN):
            acc, top, total = attend_tile(
                acc, top, total, rows, q_pos,
                pages, page_stride, group * (B * D), v_start + group * (B * DV),
                blocks, firsts, keys, low - lead, low, high, u0, scale, cap, window,
                B, D, DV, BD, BDV, BN, True, WINDOW, CAP, UPCAST,
            )  # fmt: skip
        some = total > 0.0
        at = (tl.cast(task, tl.int64) * tl.num_programs(1) + group) * width + r
        safe = tl.where(some, total, 1.0)
        lse = tl.where(some, (top + tl.log2(safe)) * LN2, NEG_INF)
        tl.store(part_lse + at, lse, mask=live)
        stored = (live & some)[:, None] & (dv < DV)[None, :]
        tl.store(part_out + at[:, None] * DV + dv[None, :], acc / safe[:, None], mask=stored)


@triton.jit(
    do_not_specialize=["max_rows", "max_tasks", "limit", "width"],
    do_not_specialize_on_alignment=["q_starts", "block_starts", "firsts", "bases"],
)
def merge_kernel(
    part_out, part_lse, q_starts, block_starts, firsts, bases, out, lse,
    max_rows, max_tasks, limit, groups, width, out_t, out_h, lse_t, lse_h,
    FOLD: tl.constexpr, SPLIT: tl.constexpr, CHUNK: tl.constexpr, DV: tl.constexpr,
    BDV: tl.constexpr, INTO: tl.constexpr,
):  # fmt: skip
    request = tl.program_id(0) // max_rows
    token = tl.program_id(0) % max_rows
    head = tl.program_id(1)
    row0 = tl.load(q_starts + request)
    rows = tl.load(q_starts + request + 1) - row0
    base = tl.load(bases + request)
    end = tl.minimum(tl.load(bases + request + 1), max_tasks)
    if (token < rows) & (rows * FOLD <= limit) & (base < end):
        dv = tl.arange(0, BDV)
        # Chunks start at multiples of CHUNK splits, wherever the list begins.
        start = tl.load(firsts + tl.load(block_starts + request)) // SPLIT
        lead = (start % CHUNK).to(tl.int32)
        r = token * FOLD + head % FOLD
        acc = tl.zeros([1, BDV], dtype=tl.float32)
        top = tl.full([1], NEG_INF, dtype=tl.float32)
        total = tl.zeros([1], dtype=tl.float32)
        for s0 in range(base - lead, end, CHUNK):
            s = s0 + tl.arange(0, CHUNK)
            at = (s.to(tl.int64) * groups + head // FOLD) * width + r
            some = tl.load(part_lse + at, mask=(s >= base) & (s < end), other=NEG_INF) * LOG2E
            mask = (some > NEG_INF)[:, None] & (dv < DV)[None, :]
            more = tl.load(part_out + at[:, None] * DV + dv[None, :], mask=mask, other=0.0)
            new_top = tl.maximum(top, tl.max(some, 0))
            shift = tl.where(new_top == NEG_INF, 0.0, new_top)
            weights = tl.exp2(some - shift)
            keep = tl.exp2(top - shift)
            acc = acc * keep[:, None] + tl.sum(more * weights[:, None], 0)[None, :]
            total = total * keep + tl.sum(weights, 0)
            top = new_top
        safe = tl.where(total > 0.0, total, 1.0)
        acc = acc / safe[:, None]
        found = tl.where(total > 0.0, (top + tl.log2(safe)) * LN2, NEG_INF)
        row = (row0 + token).to(tl.int64)
        out_at = out + row * out_t + head * out_h + dv[None, :]
        lse_at = lse + row * lse_t + head * lse_h + tl.arange(0, 1)
        if INTO:
            before = tl.load(out_at, mask=(dv < DV)[None, :], other=0.0)
            acc, found = fold(before, tl.load(lse_at), acc, found)
        tl.store(out_at, acc, mask=(dv < DV)[None, :])
        tl.store(lse_at, found)
