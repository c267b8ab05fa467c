"""The check of a kernel on its device, at start: small cases of every kind against plain fp32 math.

Milliseconds. A kernel that is wrong here is not taken; see ``ds_cp.attention.kernels``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from ds_cp.attention.batch import Block, Blocks, Part, make_batch
from ds_cp.attention.kernels.kernel import PagedKernel
from ds_cp.attention.kernels.reference import ReferenceKernel
from ds_cp.attention.pages import Pages, PageShape, empty_pages
from ds_cp.attention.spec import LayerSpec
from ds_cp.attention.state import Partial, empty_partial
from ds_cp.layout import Runs, positions, total

LIMIT = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}  # of the largest value
GROUPS = (1, 3, 8)  # query heads per KV head
BLOCKS = 24  # of the pages in the check


@dataclass(frozen=True)
class Case:
    """One call: its requests, and what the layer adds to the plain mask."""

    name: str
    parts: tuple[Part, ...]
    window: int | None = None
    softcap: float | None = None


def _chain(first_block: int, size: int, keys: Runs) -> Blocks:
    """Blocks from ``first_block`` on, last to first so that they are out of order, that hold the
    keys at ``keys``."""
    found = []
    for start, length in keys:
        for at in range(0, length, size):
            found.append((start + at, min(size, length - at)))
    numbers = range(first_block + len(found) - 1, first_block - 1, -1)
    return Blocks(Block(n, first, count) for n, (first, count) in zip(numbers, found, strict=True))


def cases(size: int) -> Iterator[Case]:
    """Every kind of call, for blocks of ``size`` tokens; none needs more than ``BLOCKS`` blocks."""
    s = size
    long = _chain(0, s, ((0, 3 * s + s // 2),))
    new = 3 * s + s // 2
    yield Case("causal", (Part(((0, new),), long),))
    yield Case("full", (Part(((new, 9),), long),))
    yield Case("later chunk", (Part(((s + 1, new - s - 1),), long),))
    yield Case("two runs of rows", (Part(((1, s), (2 * s, s + 1)), long),))
    yield Case(
        "keys that lie elsewhere",
        (Part(((s, 2 * s),), Blocks(b for i, b in enumerate(long) if i in (0, 3))),),
    )
    yield Case("keys of the future", (Part(((0, 5),), long[1:]),))
    decode = [Part(((n - 1, 1),), _chain(4 * i, s, ((0, n),))) for i, n in
              enumerate((1, s, s + 1, 2 * s + 3, 3 * s))]  # fmt: skip
    yield Case("decode rows", tuple(decode))
    yield Case("no keys", (Part(((7, 3),), Blocks()), decode[2], Part(((0, 1),), Blocks())))
    yield Case("no rows", (decode[1], Part((), long), decode[3]))
    yield Case(
        "prompt beside decodes", (*decode[3:], Part(((0, s + 5),), _chain(0, s, ((0, s + 5),))))
    )
    for window in (1, s // 2 + 1, s + 3):
        yield Case(f"window {window}", (Part(((0, new),), long),), window)
        yield Case(f"window {window}, decode rows", tuple(decode), window)
    few = _chain(0, s, ((s, 5),))
    yield Case("band with fewer keys than rows", (Part(((s, s),), few),), 7)
    yield Case("band with more keys than rows", (Part(((2 * s, 4),), long),), s + s // 2)
    yield Case("soft cap", (Part(((0, new),), long), decode[4]), None, 2.0)
    yield Case("soft cap and window", (Part(((0, new),), long), decode[4]), s, 3.0)


def fault(
    kernel: PagedKernel,
    layers: Sequence[LayerSpec],
    block_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> str:
    """What the kernel gets wrong, as the end of a sentence; "" when nothing. Head dims are those of
    ``layers``, so that what is compiled for them is what is checked."""
    dims = sorted({(spec.head_dim, spec.v_dim) for spec in layers})
    for (k_dim, v_dim), group in [(d, g) for d in dims for g in GROUPS]:
        heads = {1: 3, 3: 2, 8: 1}[group]
        shape = PageShape(block_size, heads, k_dim, v_dim, dtype, kernel.packed)
        for case in cases(block_size):
            spec = LayerSpec(
                heads * group, heads, k_dim, k_dim**-0.5, case.window, case.softcap,
                v_head_dim=v_dim,
            )  # fmt: skip
            error = error_of(kernel, case, spec, shape, device)
            if not error <= LIMIT[dtype]:
                return (
                    f"it is wrong by {error:.1e} for {case.name} with head_dim {k_dim} and "
                    f"{group} query heads per KV head"
                )
    return ""


def error_of(
    kernel: PagedKernel, case: Case, spec: LayerSpec, shape: PageShape, device: torch.device
) -> float:
    """Largest difference to the reference, alone and folded into a partial that holds something;
    infinite when an empty row is not empty."""
    gen = torch.Generator().manual_seed(11)
    pages = _filled(kernel, shape, device, gen)
    rows = sum(total(part.q_runs) for part in case.parts)
    lead = 2  # rows that belong to no request
    q = torch.randn(rows + 2 * lead, spec.num_q_heads, spec.head_dim, generator=gen)
    q_THD = q.to(device=device, dtype=shape.dtype)
    places = [p for part in case.parts for p in positions(part.q_runs)]
    q_positions = torch.tensor([0] * lead + places + [0] * lead, device=device)
    batch = make_batch(case.parts, device, lead)
    plain = Pages(*_as_plain(pages))
    want = ReferenceKernel().paged_attention(q_THD, q_positions, plain, batch, spec)
    got = kernel.paged_attention(q_THD, q_positions, pages, batch, spec)
    before = empty_partial(len(q), spec.num_q_heads, spec.v_dim, device)
    before.out[::2] = 0.5
    before.lse[::2] = 1.0
    both = Partial(before.out.clone(), before.lse.clone())
    ReferenceKernel().merge_rows(both, want, None)
    folded = kernel.paged_attention(q_THD, q_positions, pages, batch, spec, before)
    kernel.merge_rows(got, Partial(got.out[:0], got.lse[:0]), q_positions[:0])
    return max(_difference(got, want), _difference(folded, both))


def _filled(
    kernel: PagedKernel, shape: PageShape, device: torch.device, gen: torch.Generator
) -> Pages:
    pages = empty_pages(shape, BLOCKS, device)
    tokens = BLOCKS * shape.block_size
    k = torch.randn(tokens, shape.num_kv_heads, shape.k_dim, generator=gen)
    v = torch.randn(tokens, shape.num_kv_heads, shape.v_dim, generator=gen)
    slots = torch.arange(tokens, device=device)
    at = slots // shape.block_size, slots % shape.block_size
    kernel.write(pages, k.to(device, shape.dtype), v.to(device, shape.dtype), *at)
    return pages


def _as_plain(pages: Pages) -> tuple[torch.Tensor, PageShape]:
    s = pages.shape
    shape = PageShape(s.block_size, s.num_kv_heads, s.k_dim, s.v_dim, s.dtype)
    blocks = torch.arange(pages.num_blocks, device=pages.data.device)
    k, v = pages.gather(blocks)
    plain = empty_pages(shape, pages.num_blocks, pages.data.device)
    slots = torch.arange(len(k), device=k.device)
    plain.write(k, v, slots // s.block_size, slots % s.block_size)
    return plain.data, shape


def _difference(got: Partial, want: Partial) -> float:
    empty = torch.isneginf(want.lse)
    if not torch.equal(torch.isneginf(got.lse), empty) or bool(got.out[empty].any()):
        return float("inf")
    seen = ~empty
    out = (got.out - want.out).abs().amax() / want.out.abs().amax().clamp_min(1e-6)
    if not bool(seen.any()):
        return float(out)
    lse = (got.lse[seen] - want.lse[seen]).abs().amax() / want.lse[seen].abs().amax().clamp_min(1.0)
    return max(float(out), float(lse))
