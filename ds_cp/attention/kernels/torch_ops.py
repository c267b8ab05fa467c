"""Attention over pages by torch's own fused operators: for processors that the native kernel is not
built for, and for CUDA devices without a better one.

Requests with one row go to ``single_rows``. The rows of any other are covered by tiles
(``ds_cp.attention.tiles``) over its keys, which are gathered heads first, a bounded stretch at a
time, and what tiles find is folded in their order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ds_cp.attention.batch import Block, PagedBatch, Part, in_window
from ds_cp.attention.kernels.by_torch import ByTorch
from ds_cp.attention.kernels.operators import Operator, cpu_op, hide_blind, operator
from ds_cp.attention.kernels.single_rows import SingleRows
from ds_cp.attention.pages import Pages
from ds_cp.attention.spec import LayerSpec
from ds_cp.attention.state import NEG_INF, Partial, dense, empty_partial, merge_rows, split_heads
from ds_cp.attention.tiles import Tile, cover
from ds_cp.layout import Run, join, total

STRETCH_KEYS = 16_384  # keys gathered at once; stretches begin at multiples of it in positions
NOWHERE = 1 << 62  # position of a slot that holds no key: after every query
OP_ROWS = 32  # query rows of one task of the CPU operator, while there are few rows
PART_KEYS = 1536  # least keys of a part; with fewer the merge costs more than it saves


@dataclass(frozen=True)
class _Stretch:
    """Blocks gathered at once: ``(first slot, block number, blocks)`` of each run of blocks that
    lie in a row, the slots there are, and the tiles over them."""

    copies: tuple[tuple[int, int, int], ...]
    slots: int
    tiles: tuple[Tile, ...]


@dataclass(frozen=True, eq=False)
class _Plan:
    """What a step's calls for layers of one shape and window have in common: per request of several
    rows its first row and its stretches; the single rows; K and V as they are gathered."""

    requests: list[tuple[int, list[_Stretch]]]
    single: SingleRows | None
    keys: torch.Tensor
    values: torch.Tensor


class TorchKernel(ByTorch):
    """``PagedKernel`` by torch's operators."""

    name = "sdpa"
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
        if into is None:
            dtype = torch.float64 if q_THD.dtype == torch.float64 else torch.float32
            into = empty_partial(len(q_THD), spec.num_q_heads, spec.v_dim, q_THD.device, dtype)
        key = ("sdpa", pages.shape, spec.window, spec.num_q_heads)
        plan = batch.derived.get(key)
        if not isinstance(plan, _Plan):
            plan = batch.derived[key] = _plan(batch, q_positions, pages, spec)
        op = operator(spec, q_THD.device)
        if plan.single is not None:
            _fold(into, plan.single.rows, plan.single.attend(q_THD, pages, op))
        for row, stretches in plan.requests:
            for stretch in stretches:
                k_GSD, v_GSD = _gathered(plan, stretch, pages)
                for tile in stretch.tiles:
                    rows = slice(row + tile.row, row + tile.row + tile.rows)
                    _fold(into, rows, _tile(dense(q_THD[rows]), k_GSD, v_GSD, tile, spec, op))
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


def _plan(batch: PagedBatch, q_positions: torch.Tensor, pages: Pages, spec: LayerSpec) -> _Plan:
    shape, requests, row, slots, single = pages.shape, [], batch.first_row, 0, False
    for part in batch.parts:
        rows = total(part.q_runs)
        single = single or (rows == 1 and len(part.blocks) > 0)
        if rows > 1:
            stretches = list(_stretches(part, shape.block_size, spec.window))
            slots = max([slots, *(stretch.slots for stretch in stretches)])
            requests.append((row, stretches))
        row += rows
    one_row = SingleRows(batch, q_positions, shape, spec) if single else None
    return _Plan(
        requests,
        one_row if one_row is not None and one_row.num_chunks else None,
        pages.data.new_empty(shape.num_kv_heads, slots, shape.k_dim),
        pages.data.new_empty(shape.num_kv_heads, slots, shape.v_dim),
    )


def _stretches(part: Part, size: int, window: int | None) -> Iterator[_Stretch]:
    """A request's blocks, a bounded number of slots at a time, with what its rows see of them."""
    first_query = min(start for start, length in part.q_runs if length)
    some: list[Block] = []
    most = max(1, STRETCH_KEYS // size)
    for block in in_window(part.blocks, first_query, window):
        elsewhere = some and block.first // STRETCH_KEYS != some[0].first // STRETCH_KEYS
        if elsewhere or len(some) == most:
            yield from _stretch(part, some, size, window)
            some = []
        some.append(block)
    yield from _stretch(part, some, size, window)


def _stretch(part: Part, blocks: list[Block], size: int, window: int | None) -> Iterator[_Stretch]:
    runs: list[Run] = []
    for block in blocks:
        runs += [(block.first, block.keys), (NOWHERE, size - block.keys)]
    tiles = cover(part.q_runs, join(runs), window)
    if tiles:
        by_place = join((block.number, 1) for block in blocks)
        copies, at = [], 0
        for number, count in by_place:
            copies.append((at, number, count))
            at += count * size
        yield _Stretch(tuple(copies), at, tiles)


def _gathered(plan: _Plan, stretch: _Stretch, pages: Pages) -> tuple[torch.Tensor, torch.Tensor]:
    """K ``[G, S, D]`` and V ``[G, S, Dv]`` of a stretch; valid until the next call."""
    size = pages.shape.block_size
    for room, there in ((plan.keys, pages.keys()), (plan.values, pages.values())):
        for at, number, count in stretch.copies:
            here = room[:, at : at + count * size]
            here.view(len(room), count, size, -1).copy_(
                there[number : number + count].transpose(0, 1)
            )
    return plan.keys[:, : stretch.slots], plan.values[:, : stretch.slots]


def _fold(into: Partial, rows: slice | torch.Tensor, part: Partial) -> None:
    """Merge ``part`` into the rows. On a CPU, where a look at values costs nothing, rows that hold
    nothing yet are written over, which gives the same bits."""
    if into.lse.device.type == "cpu" and bool(torch.isneginf(into.lse[rows]).all()):
        into.out[rows] = part.out.to(into.out.dtype)
        into.lse[rows] = part.lse.to(into.lse.dtype)
    elif isinstance(rows, slice):
        merge_rows(Partial(into.out[rows], into.lse[rows]), part, None)
    else:
        merge_rows(into, part, rows)


def _tile(
    q_THD: torch.Tensor,
    k_GSD: torch.Tensor,
    v_GSD: torch.Tensor,
    tile: Tile,
    spec: LayerSpec,
    op: Operator,
) -> Partial:
    k = k_GSD[None, :, tile.key : tile.key + tile.keys]
    v = v_GSD[None, :, tile.key : tile.key + tile.keys]
    if tile.kind == "full":
        return _folded(q_THD, k, v, spec, op)
    q = q_THD.transpose(0, 1).unsqueeze(0)
    if tile.kind == "causal":
        out, lse = op(q, k, v, None, True)
    else:
        mask = _band_mask(tile, spec, q_THD)
        out, lse = hide_blind(mask, *op(q, k, v, mask, False))
    return Partial(out[0].transpose(0, 1), lse[0].transpose(0, 1))


def _folded(
    q_THD: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: LayerSpec, op: Operator
) -> Partial:
    """All keys visible: fold the H/G query heads of each KV head into rows, ``[1, G, H/G * T,
    D]``."""
    fold = (spec.num_kv_heads, spec.num_q_heads // spec.num_kv_heads, len(q_THD))
    rows = split_heads(q_THD, spec.num_kv_heads).permute(1, 2, 0, 3).flatten(1, 2).unsqueeze(0)
    parts = _parts(spec.num_kv_heads * -(-rows.shape[2] // OP_ROWS), k.shape[2])
    if parts > 1 and k.device.type == "cpu" and spec.softcap is None:
        out, lse = _in_parts(rows, k, v, spec.scale, parts)
    else:
        out, lse = op(rows, k, v, None, False)
    out = out.reshape(*fold, -1).permute(2, 0, 1, 3).flatten(1, 2)
    return Partial(out, lse.reshape(fold).permute(2, 0, 1).flatten(1, 2))


def _parts(tasks: int, keys: int) -> int:
    """The number of parts to cut the CPU operator's keys into. It deals out whole (head, rows)
    tasks to threads, and a few tasks do not divide evenly: 3 KV heads keep 2 threads busy for the
    time of 4. Each part of the keys is a task of its own."""
    threads = torch.get_num_threads()
    if tasks >= 8 * threads or tasks % threads == 0:
        return 1
    return max(1, min(threads // math.gcd(tasks, threads), keys // PART_KEYS))


def _in_parts(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, parts: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over equal parts of the keys side by side and over the few that are left, merged
    (split-KV, as flash-decoding does it). ``q [1, G, R, D]`` -> ``[1, G, R, Dv]``, ``[1, G,
    R]``."""
    each = k.shape[2] // parts
    many_k, many_v = (
        x[0, :, : parts * each].view(k.shape[1], parts, each, -1).transpose(0, 1) for x in (k, v)
    )
    out, lse = cpu_op(scale, q.expand(parts, -1, -1, -1), many_k, many_v, None, False)
    if parts * each < k.shape[2]:
        last = cpu_op(scale, q, k[:, :, parts * each :], v[:, :, parts * each :], None, False)
        out, lse = torch.cat([out, last[0]]), torch.cat([lse, last[1]])
    weights = torch.softmax(lse, dim=0).unsqueeze(-1)
    return (out * weights).sum(dim=0, keepdim=True), torch.logsumexp(lse, dim=0, keepdim=True)


def _band_mask(tile: Tile, spec: LayerSpec, q: torch.Tensor) -> torch.Tensor:
    """``[rows, keys]`` in q's dtype: 0 where visible, -inf elsewhere."""
    assert spec.window is not None
    q_pos = torch.arange(tile.row_pos, tile.row_pos + tile.rows, device=q.device).unsqueeze(1)
    k_pos = torch.arange(tile.key_pos, tile.key_pos + tile.keys, device=q.device)
    hidden = (k_pos > q_pos) | (k_pos <= q_pos - spec.window)
    return torch.zeros(hidden.shape, dtype=q.dtype, device=q.device).masked_fill_(hidden, NEG_INF)
