"""The check of a kernel on its device, at start: small cases of every kind against plain fp64 math.

A fraction of a second. A kernel that is wrong here is not taken; see ``ds_cp.attention.kernels``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from ds_cp.attention.batch import Blocks, PagedBatch, Part, make_batch
from ds_cp.attention.kernels.kernel import PagedKernel, SquareKernel
from ds_cp.attention.kernels.reference import ReferenceKernel
from ds_cp.attention.pages import Fresh, Pages, PageShape, empty_pages
from ds_cp.attention.spec import LayerSpec
from ds_cp.attention.state import Partial, empty_partial, merge_rows
from ds_cp.layout import Runs, head, positions, tail, total

# Of the largest value; an lse may be wrong by four times as much, whatever its size: less than what
# one tile of keys adds to it. Other dtypes are checked as fp32.
LIMIT = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
GROUPS = {1: 3, 3: 2, 8: 1}  # query heads per KV head: KV heads
UNIT = 16  # tokens; of smaller blocks, several are taken as one
LARGE = 512  # tokens of a block; of larger ones, fewer are read
LONG = 64  # tokens of a block that a prompt fills; larger ones stay part empty
FAR = 1100  # keys of one decoding request: more than kernels read in one go
LEAD = 2  # rows before and behind those of requests
DEEP = 4700  # keys before the end of a later chunk: several tiles and splits of every kernel
DEEP_ROWS = 70  # of that chunk: more than one tile of rows
FARTHEST = 32 * 512  # positions; behind them, splits are merged in a second round


@dataclass(frozen=True)
class Case:
    """One call: its requests, and what the layer adds to the plain mask. ``groups``: query heads
    per KV head; ``alone``, ``folded``: without a partial to fold into, and with one."""

    name: str
    parts: tuple[Part, ...]
    window: int | None = None
    softcap: float | None = None
    groups: tuple[int, ...] = ()
    alone: bool = True
    folded: bool = True


def num_blocks(size: int) -> int:
    """Blocks of ``size`` tokens that the cases name: numbers below this one."""
    return 3 if size > LARGE else max(5, 2 * UNIT // size)


def _chain(size: int, keys: Runs, turn: int = 0) -> Blocks:
    """Blocks that hold the keys at ``keys``, in no order of their numbers; one that is named again
    is read again. ``turn`` makes another chain of the same blocks."""
    found, count = Blocks(), num_blocks(size)
    for start, length in keys:
        for at in range(0, length, size):
            number = (turn - 2 * len(found) if count % 2 else turn - len(found)) % count
            found.append(number, start + at, min(size, length - at))
    return found


def cases(size: int, own: Sequence[int] = ()) -> Iterator[Case]:
    """Every kind of call, for blocks of ``size`` tokens. ``own``: query heads per KV head of the
    model's layers, for which the kinds with most keys are."""
    unit = max(size, -(-UNIT // size) * size)  # tokens, whole blocks
    long: Runs = ((0, 2 * unit + unit // 2),)
    if unit > LONG:
        long = ((0, LONG), (unit, LONG), (2 * unit, LONG // 2))
    if unit > LARGE:
        long = ((0, LONG), (unit, LONG // 2))
    n, keys = total(long), _chain(size, long)

    def rows(begin: int, end: int) -> Runs:
        return tail(head(long, end), end - begin)

    def some(name: str, q_runs: Runs, k: Blocks = keys, window: int | None = None) -> Case:
        return Case(name, (Part(q_runs, k),), window)

    lengths = (1, unit, unit + 1, 2 * unit + 3 if size <= LARGE else 9, FAR)
    decode = tuple(
        Part(((n - 1, 1),), _chain(size, ((0, n),), turn)) for turn, n in enumerate(lengths)
    )
    every = tuple(dict.fromkeys((*own, *GROUPS)))
    mine = tuple(own) or every[-1:]
    yield Case("causal", (Part(long, keys),), groups=every)
    yield Case("decode rows", decode, groups=every)
    yield some("full", ((sum(long[-1]), 9),))
    yield some("later chunk", rows(n // 3, n))
    yield some("two runs of rows", rows(1, n // 4) + rows(n // 2, n - 3))
    ends = Blocks(block for i, block in enumerate(keys) if i in (0, len(keys) - 1))
    yield some("keys that lie elsewhere", rows(n // 3, n), ends)
    yield some("keys of the future", ((0, 5),), keys[1:])
    nothing = Blocks()
    yield Case("no keys", (Part(((7, 3),), nothing), decode[2], Part(((0, 1),), nothing)))
    yield Case("no rows", (decode[1], Part((), keys), decode[3]))
    yield Case("prompt beside decodes", (*decode[2:4], Part(rows(0, n // 2), keys), decode[0]))
    for window in (1, unit // 2 + 1, n // 2):
        yield some(f"window {window}", long, keys, window)
    for window in (unit // 2 + 1, unit + 3):
        yield Case(f"window {window}, decode rows", decode, window)
    few = _chain(size, ((0, 5),))
    yield some("band with fewer keys than rows", rows(0, 12), few, 7)
    yield some("band with more keys than rows", rows(n - 4, n), keys, n // 2)
    yield Case("soft cap", (Part(long, keys), *decode[2:4]), None, 2.0)
    yield Case("soft cap and window", (Part(long, keys), *decode[2:4]), unit // 2 + 3, 3.0)
    deep = Part(((DEEP - DEEP_ROWS, DEEP_ROWS),), _chain(size, ((0, DEEP),)))
    after = Part(((DEEP - 1, 1),), deep.blocks)
    yield Case("many earlier keys", (deep, after), groups=mine, folded=False)
    begin = (DEEP // 3) // size * size
    near = _chain(size, ((begin, DEEP - begin),), 1)
    band = (Part(deep.q_runs, near), Part(after.q_runs, near))
    yield Case("window, many earlier keys", band, DEEP // 3, groups=mine, alone=False)
    edge = FARTHEST // size * size
    far = ((0, 9), (edge - -(-200 // size) * size, 200), (edge, 400))
    yield Case("far keys", (Part(((edge + 399, 1),), _chain(size, far)),), groups=mine)


def square_cases(size: int, rows: int, earlier: int) -> Iterator[Case]:
    """Prompts of at least ``rows`` rows, without earlier keys and behind ``earlier``."""
    one, two = ((0, rows),), ((0, rows + 13),)
    yield Case("many rows", tuple(Part(runs, _chain(size, runs)) for runs in (one, two)))
    whole = -(-earlier // size) * size
    for start in (whole, whole + size // 2 + 1):
        runs = ((0, start + rows),)
        parts = (Part(((start, rows),), _chain(size, runs, 1)), Part(((5, 1),), _chain(size, one)))
        yield Case(f"many rows behind {start} keys", parts, alone=start == whole)


def fault(
    kernel: PagedKernel,
    layers: Sequence[LayerSpec],
    block_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> str:
    """What the kernel gets wrong, as the end of a sentence; "" when nothing. Head dims are those of
    ``layers``, so that what is compiled for them is what is checked. Kinds of call that the kernel
    refuses are left out."""
    if not merges_rows(kernel, device):
        return "it is wrong in the merge of rows"
    own = tuple(dict.fromkeys(spec.num_q_heads // spec.num_kv_heads for spec in layers))
    groups = {**dict.fromkeys(own, 1), **GROUPS}
    dims = sorted({(spec.head_dim, spec.v_dim) for spec in layers})
    for k_dim, v_dim in dims:
        filled = {
            group: _filled(
                kernel, PageShape(block_size, heads, k_dim, v_dim, dtype, kernel.packed), device
            )
            for group, heads in groups.items()
        }
        for number, case in enumerate(cases(block_size, own)):
            # Not every kind with every number of heads: one each, in turn.
            for group in case.groups or (tuple(groups)[number % len(groups)],):
                heads = groups[group]
                spec = LayerSpec(
                    heads * group, heads, k_dim, k_dim**-0.5, case.window, case.softcap,
                    v_head_dim=v_dim,
                )  # fmt: skip
                if kernel.refuses(spec, block_size, dtype):
                    continue
                call = _call(case, spec, filled[group][1], dtype)
                if problem := _problem(case, spec, dtype, _errors(kernel, call, filled[group][0])):
                    return problem
    return _squares_fault(kernel, layers, block_size, dtype, device)


def _squares_fault(
    kernel: PagedKernel,
    layers: Sequence[LayerSpec],
    block_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> str:
    """The same of prompts with so many rows that the kernel takes another way, with the model's own
    head counts."""
    if not isinstance(kernel, SquareKernel):
        return ""
    specs = {
        (spec.num_q_heads, spec.num_kv_heads, spec.head_dim, spec.v_dim): replace(
            spec, window=None, softcap=None, sinks=None
        )
        for spec in layers
    }
    for spec in specs.values():
        pages, plain = _filled(kernel, PageShape.of(spec, block_size, dtype, kernel.packed), device)
        for case in square_cases(block_size, kernel.square_rows, kernel.earlier_keys):
            call = _call(case, spec, plain, dtype)
            k, v = (x.to(dtype) for x in call.new_keys(plain))
            fresh = replace(pages, fresh=Fresh(call.q, k, v))
            errors = [e for given in (pages, fresh) for e in _errors(kernel, call, given)]
            whole = slice(LEAD, len(k) - LEAD)
            bare = make_batch(case.parts, device)
            out = kernel.prefill(call.q[whole], k[whole], v[whole], bare, spec, block_size)
            if out is not None:
                lse = call.want.lse[whole]
                want = Partial(call.want.out[whole], lse)
                errors.append(_difference(Partial(out.double(), lse), want))
            if problem := _problem(case, spec, dtype, errors):
                return problem
    return ""


def merges_rows(kernel: PagedKernel, device: torch.device) -> bool:
    """Whether its ``merge_rows`` does as the plain one, for all rows and some, empty sides too."""
    gen = torch.Generator().manual_seed(5)
    part, into = (
        Partial(torch.randn(9, 3, 8, generator=gen), 4 * torch.randn(9, 3, generator=gen))
        for _ in range(2)
    )
    for side, empty in ((part, (0, 4)), (into, (0, 5))):
        side.lse[list(empty)] = float("-inf")
        side.out[list(empty)] = 0.0
    part, into = (Partial(x.out.to(device), x.lse.to(device)) for x in (part, into))
    some = torch.tensor([7, 0, 5, 4], device=device)
    for rows in (None, some):
        mine = part if rows is None else Partial(part.out[:4], part.lse[:4])
        got, want = (Partial(into.out.clone(), into.lse.clone()) for _ in range(2))
        kernel.merge_rows(got, mine, rows)
        merge_rows(want, mine, rows)
        if not _difference(got, want) <= LIMIT[torch.float32]:
            return False
    return True


@dataclass(frozen=True, eq=False)
class _Call:
    """One call, and what is right."""

    case: Case
    spec: LayerSpec
    q: torch.Tensor  # [T, H, D]
    q_positions: torch.Tensor
    batch: PagedBatch
    want: Partial  # fp64

    def new_keys(self, plain: Pages) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of the queries' own positions, row by row, where requests have all keys."""
        shape = plain.shape
        k = self.q.new_zeros(len(self.q), shape.num_kv_heads, shape.k_dim)
        v = self.q.new_zeros(len(self.q), shape.num_kv_heads, shape.v_dim)
        row, entry = LEAD, 0
        for part in self.case.parts:
            rows, entries = total(part.q_runs), len(part.blocks)
            found = plain.gather(self.batch.blocks[entry : entry + entries])
            at = self.q_positions[row : row + rows]
            for into, some in zip((k, v), found, strict=True):
                into[row : row + rows] = some[at].to(into.dtype)
            row, entry = row + rows, entry + entries
        return k, v


def _call(case: Case, spec: LayerSpec, plain: Pages, dtype: torch.dtype) -> _Call:
    device = plain.data.device
    gen = torch.Generator().manual_seed(11)
    num_rows = sum(total(part.q_runs) for part in case.parts)
    q = torch.randn(num_rows + 2 * LEAD, spec.num_q_heads, spec.head_dim, generator=gen)
    q_THD = q.to(device=device, dtype=dtype)
    places = [p for part in case.parts for p in positions(part.q_runs)]
    q_positions = torch.tensor([0] * LEAD + places + [0] * LEAD, device=device)
    batch = make_batch(case.parts, device, LEAD)
    want = ReferenceKernel().paged_attention(q_THD.double(), q_positions, plain, batch, spec)
    return _Call(case, spec, q_THD, q_positions, batch, want)


def _errors(kernel: PagedKernel, call: _Call, pages: Pages) -> list[float]:
    """Largest differences to the reference; infinite when an empty row is not empty."""
    errors, given = [], (call.q, call.q_positions, pages, call.batch, call.spec)
    if call.case.alone:
        errors.append(_difference(kernel.paged_attention(*given), call.want))
    if call.case.folded:
        before, want = (
            empty_partial(len(call.q), call.spec.num_q_heads, call.spec.v_dim,
                          pages.data.device, dtype)
            for dtype in (torch.float32, torch.float64)
        )  # fmt: skip
        for some in (before, want):
            some.out[::2] = 0.5
            some.lse[::2] = 1.0
        merge_rows(want, call.want, None)
        errors.append(_difference(kernel.paged_attention(*given, before), want))
    return errors


def _problem(case: Case, spec: LayerSpec, dtype: torch.dtype, errors: Sequence[float]) -> str:
    limit = LIMIT.get(dtype, LIMIT[torch.float32])
    wrong = [error for error in errors if not error <= limit]  # NaN too
    if not wrong:
        return ""
    return (
        f"it is wrong by {wrong[0]:.1e} for {case.name} with head_dim {spec.head_dim} and "
        f"{spec.num_q_heads // spec.num_kv_heads} query heads per KV head"
    )


def _filled(kernel: PagedKernel, shape: PageShape, device: torch.device) -> tuple[Pages, Pages]:
    """The kernel's pages, written by it, between others as in a pool; the same in plain order and
    fp64."""
    blocks, size = num_blocks(shape.block_size), shape.block_size
    room = torch.zeros(blocks, 3 * shape.stride, dtype=shape.dtype, device=device)
    pages = Pages(room[:, shape.stride : 2 * shape.stride], shape)
    gen = torch.Generator().manual_seed(7)
    tokens = blocks * size
    k = torch.randn(tokens, shape.num_kv_heads, shape.k_dim, generator=gen)
    v = torch.randn(tokens, shape.num_kv_heads, shape.v_dim, generator=gen)
    k, v = k.to(device, shape.dtype), v.to(device, shape.dtype)
    order = torch.randperm(tokens, generator=gen).to(device)
    kernel.write(pages, k[order], v[order], order // size, order % size)
    dims = shape.num_kv_heads, shape.k_dim, shape.v_dim
    plain = empty_pages(PageShape(size, *dims, torch.float64), blocks, device)
    slots = torch.arange(tokens, device=device)
    plain.write(k.double(), v.double(), slots // size, slots % size)
    return pages, plain


def _difference(got: Partial, want: Partial) -> float:
    empty = torch.isneginf(want.lse)
    if not torch.equal(torch.isneginf(got.lse), empty) or bool(got.out[empty].any()):
        return float("inf")
    seen = ~empty
    if not bool(seen.any()):
        return 0.0
    out = (got.out - want.out).abs().amax() / want.out.abs().amax().clamp_min(1e-6)
    lse = (got.lse[seen] - want.lse[seen]).abs().amax() / 4
    return float(torch.maximum(out, lse))  # NaN where one of them is
