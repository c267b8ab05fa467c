"""The CPU operator against fp64, over random layouts, in every variant that runs here; and that a
row's bits do not depend on its company."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence

import pytest
import torch

from ds_cp.attention.batch import Part, make_batch
from ds_cp.attention.kernels.cpu import ISAS, CpuKernel
from ds_cp.attention.kernels.reference import ReferenceKernel
from ds_cp.attention.kernels.self_test import fault
from ds_cp.attention.pages import Pages, PageShape, empty_pages
from ds_cp.attention.spec import LayerSpec
from ds_cp.attention.state import Partial, merge_rows
from ds_cp.layout import Block, Blocks, Runs, positions
from tests.helpers.native import native_library
from tests.helpers.oracle import full_attention
from tests.helpers.wire_rows import pack_partial

LIMIT = {torch.float32: 2e-6, torch.bfloat16: 8e-3}  # of the largest value
DIMS = ((16, 16), (64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (256, 256), (20, 36))
VARIANTS = (*((isa, False) for isa in ISAS), ("avx512bf16", True))


def make_kernel(isa: str, brgemm: bool) -> CpuKernel:
    library = native_library()
    if isa not in library.isas:
        pytest.skip(f"this processor or compiler has no {isa}: run it where it has")
    if (
        brgemm
        and torch.cpu.get_capabilities().get("amx_tile")
        and "DS_CP_TEST_AMX" not in os.environ
    ):
        pytest.skip("brgemm with AMX is not taken yet and was never run: DS_CP_TEST_AMX=1 runs it")
    try:
        return CpuKernel(library, isa, brgemm)
    except ValueError as err:
        pytest.skip(f"{err}: run it where torch has it")


@pytest.fixture(params=VARIANTS, ids=lambda v: v[0] + ("-brgemm" if v[1] else ""))
def kernel(request: pytest.FixtureRequest) -> CpuKernel:
    return make_kernel(*request.param)


class Request:
    """A sequence of ``length`` tokens in scattered blocks, some of which are elsewhere."""

    def __init__(self, rng: random.Random, length: int, size: int, free: list[int], gaps: bool):
        starts = range(0, length, size)
        self.length, self.size = length, size
        self.blocks = [Block(free.pop(), at, min(size, length - at)) for at in starts]
        self.held = [b for b in self.blocks if not gaps or rng.random() < 0.7]

    def part(self, q_runs: Runs) -> Part:
        return Part(q_runs, Blocks(self.held))


def fill(kernel: CpuKernel, pages: Pages, request: Request, gen: torch.Generator):
    """Random keys and values of all tokens, written token by token order shuffled into runs."""
    s = pages.shape
    k = torch.randn(request.length, s.num_kv_heads, s.k_dim, generator=gen).to(s.dtype)
    v = torch.randn(request.length, s.num_kv_heads, s.v_dim, generator=gen).to(s.dtype)
    numbers = torch.tensor([b.number for b in request.blocks])
    at = torch.arange(request.length)
    blocks, places = numbers[at // request.size], at % request.size
    middle = request.length // 3
    for rows in (slice(middle, None), slice(0, middle)):
        kernel.write(pages, k[rows], v[rows], blocks[rows], places[rows])
    return k, v


def worst(got: Partial, row: int, request: Request, q, k, v, q_pos: Sequence[int], spec: LayerSpec):
    """Largest error of a request's rows relative to the largest value."""
    rows = slice(row, row + len(q_pos))
    held = torch.tensor(
        [p for b in request.held for p in range(b.first, b.first + b.keys)], dtype=torch.int64
    )
    shared = (q[rows], k[held], v[held], torch.tensor(q_pos), held)
    if not len(held):
        assert not got.out[rows].any() and torch.isneginf(got.lse[rows]).all()
        return 0.0
    if spec.v_dim != spec.head_dim:  # the oracle has one head dim: compare by padding
        wide = max(spec.v_dim, spec.head_dim)
        pad = torch.nn.functional.pad
        shared = (
            pad(shared[0], (0, wide - spec.head_dim)),
            pad(shared[1], (0, wide - spec.head_dim)),
            pad(shared[2], (0, wide - spec.v_dim)),
            *shared[3:],
        )
    out, lse = full_attention(*shared, scale=spec.scale, window=spec.window, softcap=spec.softcap)
    out = out[..., : spec.v_dim]
    empty = torch.isneginf(lse)
    assert torch.equal(torch.isneginf(got.lse[rows]), empty)
    assert not got.out[rows][empty].any()
    error = (got.out[rows] - out).abs().max() / out.abs().max().clamp_min(1e-3)
    if (~empty).any():
        seen = (got.lse[rows] - lse)[~empty].abs().max() / lse[~empty].abs().max().clamp_min(1.0)
        error = max(error, seen)
    return float(error)


@pytest.mark.parametrize("dtype", LIMIT, ids=lambda d: str(d)[6:])
def test_random_layouts_against_fp64(kernel: CpuKernel, dtype: torch.dtype) -> None:
    if kernel.brgemm and dtype == torch.float32:
        pytest.skip("brgemm is for bf16 only: run the other variant")
    rng = random.Random(5)
    for seed in range(2 * len(DIMS)):
        gen = torch.Generator().manual_seed(seed)
        k_dim, v_dim = DIMS[seed % len(DIMS)]
        size = rng.choice([2, 4, 16, 16, 48, 64, 64] + ([1, 3, 7] if dtype.itemsize == 4 else []))
        group, heads = rng.choice([(1, 3), (3, 2), (8, 1), (4, 2)])
        window = rng.choice([None, None, 1, 5, 70, 600])
        softcap = rng.choice([None, None, 3.0])
        spec = LayerSpec(
            group * heads, heads, k_dim, k_dim**-0.5, window, softcap, v_head_dim=v_dim
        )
        long = 700 if size >= 16 else 90
        lengths = [rng.randrange(1, long) for _ in range(3)]
        count = sum(-(-n // size) for n in lengths)
        free = rng.sample(range(count + 3), count)
        pages = empty_pages(PageShape.of(spec, size, dtype, True), count + 3, torch.device("cpu"))
        requests = [Request(rng, n, size, free, gaps=i == 1) for i, n in enumerate(lengths)]
        tensors = [fill(kernel, pages, r, gen) for r in requests]
        first = rng.randrange(lengths[0])
        q_runs: list[Runs] = [
            ((first, lengths[0] - first),),
            tuple((at, 1) for at in sorted(rng.sample(range(lengths[1]), min(4, lengths[1])))),
            ((lengths[2] - 1, 1),),
        ]
        parts = [r.part(runs) for r, runs in zip(requests, q_runs, strict=True)]
        places = [p for runs in q_runs for p in positions(runs)]
        rows = len(places) + 2
        q = torch.randn(rows, spec.num_q_heads, k_dim, generator=gen).to(dtype)
        q_pos = torch.tensor([0, *places, 0])
        batch = make_batch(parts, torch.device("cpu"), 1)
        got = kernel.paged_attention(q, q_pos, pages, batch, spec)
        before = Partial(
            torch.randn(rows, spec.num_q_heads, v_dim, generator=gen),
            torch.randn(rows, spec.num_q_heads, generator=gen),
        )
        both = Partial(before.out.clone(), before.lse.clone())
        merge_rows(both, got, None)
        kernel.paged_attention(q, q_pos, pages, batch, spec, before)
        torch.testing.assert_close(before.out, both.out, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(before.lse, both.lse, rtol=1e-5, atol=1e-5)
        row = 1
        for request, (k, v), runs in zip(requests, tensors, q_runs, strict=True):
            at = list(positions(runs))
            error = worst(got, row, request, q, k, v, at, spec)
            assert error <= LIMIT[dtype], (seed, size, spec, error)
            row += len(at)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", LIMIT, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("window", [None, 900])
def test_a_rows_bits_do_not_depend_on_its_company(
    kernel: CpuKernel, dtype: torch.dtype, window: int | None, threads
) -> None:
    """Alone, in chunks cut anywhere, beside others, with 1, 2 and 3 threads."""
    length, size = 5000, 64
    spec = LayerSpec(4, 2, 64, 0.125, window)
    gen = torch.Generator().manual_seed(3)
    free = list(range(200))
    pages = empty_pages(PageShape.of(spec, size, dtype, True), 200, torch.device("cpu"))
    request, other = (Request(random.Random(1), n, size, free, False) for n in (length, 3000))
    fill(kernel, pages, request, gen)
    fill(kernel, pages, other, gen)
    rows = 300
    q = torch.randn(rows, 4, 64, generator=gen).to(dtype)

    def run(at: list[tuple[Request, int, int]]) -> Partial:
        """Rows of requests at (request, first position, rows); the queries follow the position."""
        parts = [r.part(((first, n),)) for r, first, n in at]
        q_pos = torch.cat([torch.arange(first, first + n) for _, first, n in at])
        batch = make_batch(parts, torch.device("cpu"))
        return kernel.paged_attention(q[q_pos % rows].contiguous(), q_pos, pages, batch, spec)

    begin = length - rows
    threads(1)
    whole = run([(request, begin, rows)])
    for count in (1, 2, 3):
        threads(count)
        for cuts in ((0, 300), (0, 1, 300), (0, 17, 130, 299, 300)):
            for low, high in zip(cuts, cuts[1:], strict=False):
                got = run([(request, begin + low, high - low)])
                assert torch.equal(got.out, whole.out[low:high]), (count, low, high)
                assert torch.equal(got.lse, whole.lse[low:high]), (count, low, high)
        got = run([(other, 2500, 7), (request, begin + 40, 1), (other, 2999, 1)])
        assert torch.equal(got.out[7], whole.out[40])
        assert torch.equal(got.lse[7], whole.lse[40])


def test_the_self_test_finds_no_fault(kernel: CpuKernel) -> None:
    for k_dim, v_dim, size in ((64, 64, 64), (24, 40, 4)):
        layers = [LayerSpec(4, 2, k_dim, k_dim**-0.5, v_head_dim=v_dim)]
        for dtype in (torch.bfloat16, torch.float32):
            assert fault(kernel, layers, size, dtype, torch.device("cpu")) == ""


def test_write_takes_tokens_in_any_order_and_strides(kernel: CpuKernel) -> None:
    for dtype in LIMIT:
        shape = PageShape(6, 3, 10, 14, dtype, True)
        ours, theirs = (empty_pages(shape, 9, torch.device("cpu")) for _ in range(2))
        both = torch.randn(40, 3, 30).to(dtype)
        k, v = both[:, :, 2:12], both[:, :, 13:27]
        at = torch.cat([torch.arange(5, 25), torch.randperm(54)[:20].sort().values])
        at = torch.unique(at)[torch.randperm(len(torch.unique(at)))]
        k, v = k[: len(at)], v[: len(at)]
        kernel.write(ours, k, v, at // 6, at % 6)
        theirs.write(k, v, at // 6, at % 6)
        assert torch.equal(ours.data, theirs.data)


def test_merge_rows_is_that_of_torch(kernel: CpuKernel) -> None:
    def partial(rows: int) -> Partial:
        lse = torch.randn(rows, 5)
        lse[torch.rand(rows, 5) < 0.3] = -torch.inf
        out = torch.randn(rows, 5, 12)
        return Partial(out.masked_fill(torch.isneginf(lse)[..., None], 0.0), lse)

    for rows, part in ((None, partial(20)), (torch.randperm(20)[:7], partial(7))):
        ours = partial(20)
        theirs = Partial(ours.out.clone(), ours.lse.clone())
        kernel.merge_rows(ours, part, rows)
        merge_rows(theirs, part, rows)
        torch.testing.assert_close(ours.out, theirs.out)
        torch.testing.assert_close(ours.lse, theirs.lse)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "dim"), [(3, 5), (4, 32), (1, 7), (32, 128)])
def test_rows_on_the_wire_are_those_of_torch(heads: int, dim: int, dtype: torch.dtype) -> None:
    """Byte by byte, lse at any address; and what is merged from them is what torch merges."""
    kernel = make_kernel(ISAS[-1], False)

    def partial(rows: int) -> Partial:
        lse = torch.randn(rows, heads)
        lse[torch.rand(rows, heads) < 0.3] = -torch.inf
        out = torch.randn(rows, heads, dim)
        return Partial(out.masked_fill(torch.isneginf(lse)[..., None], 0.0), lse)

    for rows in (0, 1, 40):
        part = partial(rows)
        swapped = Partial(
            part.out.transpose(0, 1).contiguous().transpose(0, 1), part.lse.t().contiguous().t()
        )
        want = pack_partial(part, dtype)
        for one in (part, swapped):
            packed = torch.full_like(want, 77)
            kernel.packing(one, dtype, packed)()
            assert torch.equal(packed, want)
        at = torch.randperm(50)[:rows]
        for places in (at, 50 - rows, 0):
            ours = partial(50)
            theirs = Partial(ours.out.clone(), ours.lse.clone())
            kernel.merging(want, dtype, places, heads, dim)(ours)()
            ReferenceKernel().merging(want, dtype, places, heads, dim)(theirs)()
            torch.testing.assert_close(ours.out, theirs.out)
            torch.testing.assert_close(ours.lse, theirs.lse)


def test_bf16_rows_round_as_torch_does() -> None:
    """To nearest, ties to even, over every upper half and the lower halves beside the ties; NaN
    stays NaN."""
    kernel = make_kernel(ISAS[-1], False)
    upper = torch.arange(1 << 16, dtype=torch.int64)
    lower = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    bits = (upper[:, None] << 16 | lower).flatten()
    out = torch.where(bits < 1 << 31, bits, bits - (1 << 32)).to(torch.int32).view(torch.float32)
    out = out.view(1, 6, 1 << 16)
    packed = torch.empty(1, 6 * ((1 << 17) + 4), dtype=torch.uint8)
    kernel.packing(Partial(out, torch.zeros(1, 6)), torch.bfloat16, packed)()
    ours = packed[0, : 6 << 17].view(torch.bfloat16)
    nan = out.flatten().isnan()
    assert ours[nan].isnan().all() and nan.any()
    want = out.flatten().to(torch.bfloat16)
    assert torch.equal(ours[~nan].view(torch.int16), want[~nan].view(torch.int16))


def test_a_partial_that_does_not_fit_its_rows_is_refused() -> None:
    kernel = make_kernel(ISAS[-1], False)
    part = Partial(torch.zeros(4, 2, 8), torch.zeros(4, 2))
    rows = pack_partial(part, torch.bfloat16)
    wide = torch.zeros(4, 2 * rows.shape[1], dtype=torch.uint8)[:, : rows.shape[1]]
    for bad in (rows[:3], rows[:, 1:], rows.to(torch.int8), wide):
        with pytest.raises(ValueError, match="rows of"):
            kernel.packing(part, torch.bfloat16, bad)()
    cases: list[tuple[torch.Tensor, torch.Tensor | int]] = [
        (rows[:, :-4], 0),
        (wide, 0),
        (rows, 1),
        (rows, -1),
        (rows, torch.tensor([0, 1, 2])),
        (rows, torch.tensor([0, 1, 2, 4])),
        (rows, torch.tensor([0, 1, 2, -1])),
    ]
    for packed, places in cases:
        with pytest.raises(ValueError):
            kernel.merging(packed, torch.bfloat16, places, 2, 8)(part)()
    with pytest.raises(ValueError, match="is not of out"):
        kernel.packing(Partial(part.out, part.lse[:3]), torch.bfloat16, rows)()
    with pytest.raises(ValueError, match="do not fold"):
        kernel.merging(rows, torch.bfloat16, 0, 2, 8)(
            Partial(torch.zeros(4, 4, 4), torch.zeros(4, 4))
        )
    with pytest.raises(ValueError, match="is not of out"):
        kernel.merging(rows, torch.bfloat16, 0, 2, 8)(Partial(part.out, part.lse[:3]))()


def test_what_does_not_fit_is_refused_and_nothing_is_read() -> None:
    kernel = make_kernel("baseline", False)
    spec = LayerSpec(2, 1, 16, 0.25)
    assert "pairs" in kernel.refuses(spec, 3, torch.bfloat16)
    assert "float16" in kernel.refuses(spec, 4, torch.float16)
    assert kernel.refuses(spec, 3, torch.float32) == ""
    for x in (0.0, 1e-60, 1e60):  # the last two are 0 and inf in float32
        assert "scale" in kernel.refuses(LayerSpec(2, 1, 16, x), 4, torch.float32)
        assert "cap" in kernel.refuses(LayerSpec(2, 1, 16, 1.0, softcap=x), 4, torch.float32)
    pages = empty_pages(PageShape.of(spec, 4, torch.float32, True), 3, torch.device("cpu"))
    q, at = torch.randn(2, 2, 16), torch.tensor([4, 5])

    fine = (Block(0, 0, 4), Block(1, 4, 2))

    def call(q=q, at=at, pages=pages, blocks=fine, **more):
        batch = make_batch([Part(((4, 2),), Blocks(blocks))], torch.device("cpu"))
        return kernel.paged_attention(q, at, pages, batch, spec, **more)

    call()
    for wrong in (
        {"q": q[:, :1]},
        {"q": q.bfloat16()},
        {"q": q[:1], "at": at[:1]},  # the batch names two rows
        {"at": at.int()},
        {"at": at - 9},
        {"blocks": (Block(3, 0, 4),)},
        {"blocks": (Block(-1, 0, 4),)},
        {"blocks": (Block(0, 0, 5),)},
        {"pages": Pages(pages.data[:, :8], pages.shape)},
        {"into": Partial(torch.zeros(2, 2, 15), torch.zeros(2, 2))},
    ):
        with pytest.raises(ValueError, match=r"."):
            call(**wrong)
    one = torch.zeros(1, dtype=torch.int64)
    for block, place in ((3, 0), (0, 4), (-1, 0)):
        with pytest.raises(ValueError, match="not there"):
            kernel.write(pages, q[:1, :1], q[:1, :1], one + block, one + place)
