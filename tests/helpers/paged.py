"""Keys and values put into pages as a pool holds them, and one call of a kernel over them.

What a kernel must not read is NaN (blocks that no request names, rows of the queries that belong to
none); what it may read under a mask is large and finite (slots of a named block without a key).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ds_cp.attention.batch import Blocks, Part, blocks_of_runs, make_batch
from ds_cp.attention.kernels import PagedKernel
from ds_cp.attention.kernels.choose import KernelUnavailableError, makers
from ds_cp.attention.pages import Pages, PageShape
from ds_cp.attention.spec import LayerSpec
from ds_cp.attention.state import NEG_INF, Partial
from ds_cp.layout import Runs, positions, total
from tests.helpers.oracle import full_attention

CPU = torch.device("cpu")
LEAD = 2  # rows before and behind those of the requests
# Largest error of out, relative to the largest reference value; 2 ulps at that scale for halves.
LIMITS = {torch.float32: 2e-6, torch.bfloat16: 2 * 2**-8, torch.float16: 2 * 2**-11}


def kernels(device: torch.device = CPU) -> dict[str, PagedKernel]:
    """Every kernel that runs on the device, by name."""
    found = {}
    for name, make in makers(device).items():
        try:
            found[name] = make(device, torch.bfloat16)
        except KernelUnavailableError:
            continue
    return found


@dataclass(frozen=True, eq=False)
class Request:
    """One request of a call: its queries and keys by position, K and V in the order of
    ``k_runs``."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    q_runs: Runs
    k_runs: Runs


def request(
    q_runs: Runs, k_runs: Runs, spec: LayerSpec, dtype: torch.dtype, seed: int = 5
) -> Request:
    """A request with random numbers, its runs sorted as kernels get them."""
    gen = torch.Generator().manual_seed(seed)
    q_runs, k_runs = tuple(sorted(q_runs)), tuple(sorted(k_runs))
    q, k, v = (
        torch.randn(total(runs), heads, dim, generator=gen).to(dtype)
        for runs, heads, dim in (
            (q_runs, spec.num_q_heads, spec.head_dim),
            (k_runs, spec.num_kv_heads, spec.head_dim),
            (k_runs, spec.num_kv_heads, spec.v_dim),
        )
    )
    return Request(q, k, v, q_runs, k_runs)


def stored(
    kernel: PagedKernel,
    requests: Sequence[Request],
    spec: LayerSpec,
    size: int,
    device: torch.device = CPU,
    shuffle: bool = True,
) -> tuple[Pages, list[Blocks]]:
    """The pages, one layer of several, and each request's blocks: in any order, or one behind the
    other."""
    dtype = requests[0].k.dtype
    lists = [list(blocks_of_runs(r.k_runs, size)) for r in requests]
    spare = 3
    count = sum(map(len, lists)) + spare
    numbers = list(range(count))
    if shuffle:
        random.Random(count).shuffle(numbers)
    shape = PageShape.of(spec, size, dtype, kernel.packed)
    # As a column of a pool of three layers, which starts at 64 bytes as a pool does.
    unit = 64 // dtype.itemsize
    pool = torch.full((count * 3 * shape.stride + unit,), torch.nan, dtype=dtype, device=device)
    begin = -pool.data_ptr() % 64 // dtype.itemsize
    rows = pool[begin : begin + count * 3 * shape.stride].view(count, 3 * shape.stride)
    pages = Pages(rows[:, shape.stride : 2 * shape.stride], shape)
    given, at = [], 0
    for r, blocks in zip(requests, lists, strict=True):
        mine = Blocks()
        where: list[tuple[int, int]] = []
        for block in blocks:
            mine.append(numbers[at], block.first, block.keys)
            pages.data[numbers[at], : shape.elements] = 9.0
            where += [(numbers[at], place) for place in range(block.keys)]
            at += 1
        given.append(mine)
        if where:
            slots = torch.tensor(where, dtype=torch.int64, device=device)
            kernel.write(pages, r.k.to(device), r.v.to(device), slots[:, 0], slots[:, 1])
    return pages, given


def call(
    kernel: PagedKernel,
    requests: Sequence[Request],
    spec: LayerSpec,
    size: int,
    device: torch.device = CPU,
    shuffle: bool = True,
    into: Partial | None = None,
) -> Partial:
    """All requests in one call, ``LEAD`` rows of none before and behind; twice, as two layers."""
    pages, blocks = stored(kernel, requests, spec, size, device, shuffle)
    parts = [Part(r.q_runs, mine) for r, mine in zip(requests, blocks, strict=True)]
    edge = torch.full((LEAD, spec.num_q_heads, spec.head_dim), torch.nan, dtype=requests[0].q.dtype)
    q = torch.cat([edge, *(r.q for r in requests), edge]).to(device)
    at = [0] * LEAD + [p for r in requests for p in positions(r.q_runs)] + [0] * LEAD
    q_positions = torch.tensor(at, dtype=torch.int64, device=device)
    batch = make_batch(parts, device, LEAD)
    first = kernel.paged_attention(q, q_positions, pages, batch, spec)
    again = kernel.paged_attention(q, q_positions, pages, batch, spec, into)
    if into is None:
        assert torch.equal(first.out, again.out) and torch.equal(first.lse, again.lse)
    return again


def own_rows(part: Partial) -> Partial:
    """Without the rows that belong to no request, of which nothing may be found."""
    for edge in (slice(0, LEAD), slice(len(part.lse) - LEAD, None)):
        assert bool((part.out[edge] == 0).all())
        assert bool((part.lse[edge] == NEG_INF).all())
    inner = slice(LEAD, len(part.lse) - LEAD)
    return Partial(part.out[inner], part.lse[inner])


def oracle(r: Request, spec: LayerSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """fp64 over the same (rounded) inputs."""
    at = (torch.tensor(positions(runs), dtype=torch.int64) for runs in (r.q_runs, r.k_runs))
    return full_attention(
        r.q, r.k, r.v, *at, scale=spec.scale, window=spec.window, softcap=spec.softcap
    )


def assert_exact(part: Partial, out: torch.Tensor, lse: torch.Tensor, dtype: torch.dtype) -> None:
    """Out and lse against fp64; a query that sees nothing gives exactly (0, -inf)."""
    assert part.out.shape == out.shape and part.lse.shape == lse.shape
    assert part.out.dtype == part.lse.dtype == torch.float32
    got_out, got_lse = part.out.cpu().double(), part.lse.cpu().double()
    blind = torch.isneginf(lse)
    assert torch.equal(torch.isneginf(got_lse), blind)
    assert bool((got_out[blind] == 0).all())
    if blind.all():
        return
    assert float((got_out - out).abs().max()) <= LIMITS[dtype] * float(out.abs().max())
    seen = lse[~blind]
    limit = 5e-6 if dtype == torch.float32 else 1e-2
    worst = float((got_lse[~blind] - seen).abs().max())
    assert worst <= limit * max(1.0, float(seen.abs().max()))


def check(
    kernel: PagedKernel,
    requests: Sequence[Request],
    spec: LayerSpec,
    size: int = 8,
    device: torch.device = CPU,
) -> None:
    """One call of all requests, each against fp64."""
    part = own_rows(call(kernel, requests, spec, size, device))
    row = 0
    for r in requests:
        rows = slice(row, row + len(r.q))
        assert_exact(Partial(part.out[rows], part.lse[rows]), *oracle(r, spec), r.q.dtype)
        row += len(r.q)
