"""Attention on CUDA: our paged kernel for everything, a dense operator where a prompt is dense.

A run of new tokens whose keys are all here is a causal square over the step's own K and V, which
the layer left side by side, below a rectangle of earlier keys. Large ones go to the operator that
``dense`` found, the rest to the paged kernel, folded into one partial. So a row depends, by
rounding, on how its prompt was cut into chunks; where it must not, the paged kernel alone is taken
(``attention.deterministic``).
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ds_cp.attention.batch import PagedBatch, Part, make_batch
from ds_cp.attention.kernels.by_torch import ByTorch
from ds_cp.attention.kernels.dense import Candidate, Dense, Found, first_right
from ds_cp.attention.kernels.kernel import PagedKernel
from ds_cp.attention.pages import Pages
from ds_cp.attention.spec import LayerSpec
from ds_cp.attention.state import Partial, dense, empty_partial
from ds_cp.layout import Blocks

SQUARE_ROWS = 256  # least rows of a square; for fewer, launches cost more than they save
EARLIER_KEYS = 4096  # least earlier keys that are copied side by side for a dense operator
SLICE_KEYS = 32768  # of these at a time; bounds the copy


class _Square(NamedTuple):
    """A run of new tokens: rows, and its own keys by entry of the batch: first entry, entries,
    first key within them. ``earlier``: entries before, and keys in them, for a dense rectangle."""

    row: int
    rows: int
    entry: int
    entries: int
    offset: int
    earlier: tuple[int, int, int] | None  # first entry, entries, keys


@dataclass(frozen=True)
class _Plan:
    squares: tuple[_Square, ...]
    rest: PagedBatch | None  # what the paged kernel does
    whole: bool  # the squares are all there is


class CudaKernel(ByTorch):
    """``PagedKernel`` over plain pages: ``paged`` and, for layers for which one is right, an
    operator of ``choices``."""

    name = "cuda"
    capturable = True  # with few rows a request, a call looks at nothing on the host

    def __init__(
        self,
        paged: PagedKernel,
        choices: Sequence[Candidate],
        device: torch.device,
    ) -> None:
        self.packed = paged.packed
        self.stacks = bool(getattr(paged, "stacks", False))
        self._paged = paged
        self._choices = tuple(choices)
        self._device = device
        self._found: dict[tuple[object, ...], Found] = {}

    @property
    def square_rows(self) -> int:
        """Least rows of a prompt for a dense operator."""
        return SQUARE_ROWS

    @property
    def earlier_keys(self) -> int:
        """Least earlier keys for one."""
        return EARLIER_KEYS

    def refuses(self, spec: LayerSpec, block_size: int, dtype: torch.dtype) -> str:
        """What ``paged`` refuses. Finds the layer's dense operator, at start."""
        if not (problem := self._paged.refuses(spec, block_size, dtype)):
            self._find(spec, dtype)
        return problem

    def operator(self, spec: LayerSpec, dtype: torch.dtype) -> str:
        """The name of the layer's dense operator, "" for none."""
        return self._find(spec, dtype).name

    def notes(self, layers: Sequence[LayerSpec], dtype: torch.dtype) -> list[str]:
        """A line for the user on each operator that was passed over for one of ``layers``."""
        lines = (note for spec in layers for note in self._find(spec, dtype).notes)
        return list(dict.fromkeys(lines))

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
        if batch.max_rows < SQUARE_ROWS:
            return self._paged.paged_attention(q_THD, q_positions, pages, batch, spec, into)
        operator = self._find(spec, q_THD.dtype).dense
        plan = None if operator is None else _plan(batch, spec, pages.shape.block_size)
        if operator is None or plan is None or not plan.squares:
            return self._paged.paged_attention(q_THD, q_positions, pages, batch, spec, into)
        if into is None:
            into = empty_partial(len(q_THD), spec.num_q_heads, spec.v_dim, q_THD.device)
        if plan.rest is not None:
            self._paged.paged_attention(q_THD, q_positions, pages, plan.rest, spec, into)
        q_THD = dense(q_THD)
        for square in plan.squares:
            self._fold(square, operator, q_THD, pages, batch, spec, into)
        return into

    def prefill(
        self,
        q_THD: torch.Tensor,
        k_TGD: torch.Tensor,
        v_TGD: torch.Tensor,
        batch: PagedBatch,
        spec: LayerSpec,
        block_size: int,
    ) -> torch.Tensor | None:
        """The finished attention ``[T, H, D]`` in q's dtype, when the step is nothing but whole
        prompts: every row of ``batch``, which is all rows of the step, is in a square without
        earlier keys. Else, and for layers with sinks, None: then call ``paged_attention``. Spares
        the passes over an fp32 partial. ``k_TGD``, ``v_TGD``: of the same rows."""
        if batch.max_rows < SQUARE_ROWS or spec.sinks is not None:
            return None
        operator = self._find(spec, q_THD.dtype).dense
        plan = None if operator is None else _plan(batch, spec, block_size)
        if operator is None or plan is None or not plan.whole or batch.num_rows != len(q_THD):
            return None
        q, k, v = dense(q_THD), dense(k_TGD), dense(v_TGD)
        found = []
        for square in plan.squares:
            rows = slice(square.row, square.row + square.rows)
            found.append(operator(q[rows], k[rows], v[rows], spec.scale, True)[0])
        return found[0] if len(found) == 1 else torch.cat(found)

    def write(
        self,
        pages: Pages,
        k_TGD: torch.Tensor,
        v_TGD: torch.Tensor,
        blocks: torch.Tensor,
        places: torch.Tensor,
    ) -> None:
        """As in ``PagedKernel``."""
        self._paged.write(pages, k_TGD, v_TGD, blocks, places)

    def merge_rows(self, into: Partial, part: Partial, rows: torch.Tensor | None) -> None:
        """As in ``PagedKernel``."""
        self._paged.merge_rows(into, part, rows)

    def _find(self, spec: LayerSpec, dtype: torch.dtype) -> Found:
        key = (
            spec.num_q_heads, spec.num_kv_heads, spec.head_dim, spec.v_dim, spec.softcap is None,
            dtype,
        )  # fmt: skip
        if key not in self._found:
            self._found[key] = first_right(self._choices, spec, dtype, self._device)
        return self._found[key]

    def _fold(
        self,
        square: _Square,
        operator: Dense,
        q_THD: torch.Tensor,
        pages: Pages,
        batch: PagedBatch,
        spec: LayerSpec,
        into: Partial,
    ) -> None:
        rows = slice(square.row, square.row + square.rows)
        mine = Partial(into.out[rows], into.lse[rows])
        size, q = pages.shape.block_size, q_THD[rows]
        if square.earlier is not None:
            first, entries, keys = square.earlier
            step = max(1, SLICE_KEYS // size)
            for at in range(0, entries, step):
                count = min(step, entries - at)
                k, v = _side_by_side(pages, batch.blocks[first + at : first + at + count])
                here = min(count * size, keys - at * size)
                found = operator(q, k[:here], v[:here], spec.scale, False)
                self._paged.merge_rows(mine, Partial(*found), None)
        # The step's own keys: where the layer left them, when these are the step's own queries.
        if pages.fresh is not None and pages.fresh.q.data_ptr() == q_THD.data_ptr():
            k, v = dense(pages.fresh.k)[rows], dense(pages.fresh.v)[rows]
        else:
            own = slice(square.entry, square.entry + square.entries)
            k, v = (
                x[square.offset : square.offset + square.rows]
                for x in _side_by_side(pages, batch.blocks[own])
            )
        self._paged.merge_rows(mine, Partial(*operator(q, k, v, spec.scale, True)), None)


def _side_by_side(pages: Pages, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V ``[n * B, G, D]`` of plain blocks, by one copy each."""
    k, v = (
        torch.index_select(x.transpose(1, 2), 0, blocks).flatten(0, 1)
        for x in (pages.keys(), pages.values())
    )
    return k, v


def _plan(batch: PagedBatch, spec: LayerSpec, size: int) -> _Plan:
    """Made once a step for each window, and kept in ``batch.derived``."""
    key = ("cuda", size, spec.window)
    if key not in batch.derived:
        batch.derived[key] = _make_plan(batch, spec.window, size)
    plan = batch.derived[key]
    assert isinstance(plan, _Plan)
    return plan


def _make_plan(batch: PagedBatch, window: int | None, size: int) -> _Plan:
    squares: list[_Square] = []
    rest: list[Part] = []
    row, entry, whole = batch.first_row, 0, True
    for part in batch.parts:
        for start, rows in part.q_runs:
            square = None
            if rows >= SQUARE_ROWS and (window is None or rows <= window):
                square = _square(part.blocks, start, rows, row, entry, size, window)
            left = part.blocks
            if square is not None:
                squares.append(square)
                left = Blocks() if square.earlier is not None else _before(part.blocks, start)
                whole = whole and square.earlier is None
            whole = whole and square is not None and not len(left)
            rest.append(Part(((start, rows),), left))
            row += rows
        entry += len(part.blocks)
    some = any(len(part.blocks) for part in rest)
    paged = make_batch(rest, batch.blocks.device, batch.first_row) if squares and some else None
    return _Plan(tuple(squares), paged, whole and batch.first_row == 0)


def _square(
    blocks: Blocks, start: int, rows: int, row: int, entry: int, size: int, window: int | None
) -> _Square | None:
    """The square of the run at ``start``, when all of its keys are here and, in the order of their
    blocks, side by side."""
    firsts, keys = blocks.firsts, blocks.keys
    first, end = bisect_right(firsts, start) - 1, bisect_left(firsts, start + rows)
    if first < 0 or firsts[end - 1] - firsts[first] != (end - 1 - first) * size:
        return None
    held = sum(
        max(0, min(firsts[i] + keys[i], start + rows) - max(firsts[i], start))
        for i in range(first, end)
    )
    if held != rows:
        return None
    earlier = None
    entries, before = first + (firsts[first] < start), first * size + start - firsts[first]
    full = keys[:first] == array("q", [size]) * first
    if window is None and full and before >= EARLIER_KEYS:
        earlier = (entry, entries, before)
    return _Square(row, rows, entry + first, end - first, start - firsts[first], earlier)


def _before(blocks: Blocks, position: int) -> Blocks:
    """The keys before ``position``."""
    cut = blocks.within(0, position)
    if len(cut) and cut.firsts[-1] + cut.keys[-1] > position:
        cut.fill(position - cut.firsts[-1] - cut.keys[-1])
    return cut
