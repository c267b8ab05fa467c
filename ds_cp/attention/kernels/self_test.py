"""The check of a kernel on its device, at start: small cases of every kind against plain fp32 math.

A fraction of a second. A kernel that is wrong here is not taken; see ``ds_cp.attention.kernels``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from ds_cp.attention.batch import Blocks, Part, make_batch
from ds_cp.attention.kernels.kernel import PagedKernel
from ds_cp.attention.kernels.reference import ReferenceKernel
from ds_cp.attention.pages import Pages, PageShape, empty_pages
from ds_cp.attention.spec import LayerSpec
from ds_cp.attention.state import Partial, empty_partial, merge_rows
from ds_cp.layout import Runs, head, positions, tail, total

# Of the largest value. Other dtypes are checked as fp32.
LIMIT = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
GROUPS = {1: 3, 3: 2, 8: 1}  # query heads per KV head: KV heads
UNIT = 16  # tokens; of smaller blocks, several are taken as one
LARGE = 512  # tokens of a block; of larger ones, fewer are read
LONG = 64  # tokens of a block that a prompt fills; larger ones stay part empty
FAR = 1100  # keys of one decoding request: more than kernels read in one go


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


def cases(size: int) -> Iterator[Case]:
    """Every kind of call, for blocks of ``size`` tokens."""
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
    every = tuple(GROUPS)
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
    dims = sorted({(spec.head_dim, spec.v_dim) for spec in layers})
    for k_dim, v_dim in dims:
        filled = {
            group: _filled(
                kernel, PageShape(block_size, heads, k_dim, v_dim, dtype, kernel.packed), device
            )
            for group, heads in GROUPS.items()
        }
        for number, case in enumerate(cases(block_size)):
            # Not every kind with every number of heads: one each, in turn.
            for group in case.groups or (tuple(GROUPS)[number % len(GROUPS)],):
                heads = GROUPS[group]
                spec = LayerSpec(
                    heads * group, heads, k_dim, k_dim**-0.5, case.window, case.softcap,
                    v_head_dim=v_dim,
                )  # fmt: skip
                if kernel.refuses(spec, block_size, dtype):
                    continue
                error = _error(kernel, case, spec, *filled[group])
                if not error <= LIMIT.get(dtype, LIMIT[torch.float32]):
                    return (
                        f"it is wrong by {error:.1e} for {case.name} with head_dim {k_dim} and "
                        f"{group} query heads per KV head"
                    )
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


def _error(kernel: PagedKernel, case: Case, spec: LayerSpec, pages: Pages, plain: Pages) -> float:
    """Largest difference to the reference; infinite when an empty row is not empty."""
    device = pages.data.device
    gen = torch.Generator().manual_seed(11)
    num_rows = sum(total(part.q_runs) for part in case.parts)
    lead = 2  # rows that belong to no request
    q = torch.randn(num_rows + 2 * lead, spec.num_q_heads, spec.head_dim, generator=gen)
    q_THD = q.to(device=device, dtype=pages.shape.dtype)
    places = [p for part in case.parts for p in positions(part.q_runs)]
    q_positions = torch.tensor([0] * lead + places + [0] * lead, device=device)
    batch = make_batch(case.parts, device, lead)
    want = ReferenceKernel().paged_attention(q_THD, q_positions, plain, batch, spec)
    errors = []
    if case.alone:
        got = kernel.paged_attention(q_THD, q_positions, pages, batch, spec)
        errors.append(_difference(got, want))
    if case.folded:
        before = empty_partial(len(q), spec.num_q_heads, spec.v_dim, device, want.out.dtype)
        before.out[::2] = 0.5
        before.lse[::2] = 1.0
        merge_rows(want, before, None)
        got = kernel.paged_attention(q_THD, q_positions, pages, batch, spec, before)
        errors.append(_difference(got, want))
    return max(errors)


def _filled(kernel: PagedKernel, shape: PageShape, device: torch.device) -> tuple[Pages, Pages]:
    """The kernel's pages, written by it, between others as in a pool; the same in plain order."""
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
    plain = empty_pages(PageShape(size, *dims, shape.dtype), blocks, device)
    slots = torch.arange(tokens, device=device)
    plain.write(k, v, slots // size, slots % size)
    return pages, plain


def _difference(got: Partial, want: Partial) -> float:
    empty = torch.isneginf(want.lse)
    if not torch.equal(torch.isneginf(got.lse), empty) or bool(got.out[empty].any()):
        return float("inf")
    seen = ~empty
    if not bool(seen.any()):
        return 0.0
    out = (got.out - want.out).abs().amax() / want.out.abs().amax().clamp_min(1e-6)
    lse = (got.lse[seen] - want.lse[seen]).abs().amax() / want.lse[seen].abs().amax().clamp_min(1.0)
    return float(torch.maximum(out, lse))  # NaN where one of them is
