"""The kernels over pages against fp64, for any runs, windows, head counts and dtypes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_cp.attention import LayerSpec
from ds_cp.attention.batch import Blocks, Part, make_batch
from ds_cp.attention.kernels import PagedKernel, operators, reference, torch_ops
from ds_cp.attention.kernels.reference import ReferenceKernel
from ds_cp.attention.kernels.torch_ops import TorchKernel
from ds_cp.attention.pages import PageShape, empty_pages
from ds_cp.attention.state import Partial, merge
from ds_cp.layout import Runs, positions
from tests.helpers.attention_cases import laid_out
from tests.helpers.oracle import full_attention
from tests.helpers.paged import (
    LIMITS,
    Request,
    assert_exact,
    call,
    check,
    kernels,
    oracle,
    own_rows,
    request,
    stored,
)

HEADS = [(4, 4), (6, 2), (9, 3), (5, 1)]
D = 16
SIZES = [1, 4, 8, 64]
KERNELS = kernels()
HOW = "run `pytest -m gpu tests/unit/attention/test_kernels.py` on a machine with a CUDA device"
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason=f"no CUDA device: {HOW}")


@pytest.fixture(params=["reference", "sdpa", "cpu"])
def kernel(request: pytest.FixtureRequest) -> PagedKernel:
    if request.param not in KERNELS:
        pytest.skip(f"kernel {request.param} does not run here: run `python -m ds_cp.native` first")
    return KERNELS[request.param]


def serving(kernel: PagedKernel, dtype: torch.dtype) -> bool:
    """Whether it serves the dtype; the native one has no fp16."""
    return not kernel.refuses(LayerSpec(4, 2, D, 0.3), 8, dtype)


@st.composite
def disjoint_runs(draw: st.DrawFn) -> Runs:
    """Runs of distinct positions, ascending, empty ones among them."""
    lengths = draw(st.lists(st.integers(0, 14), max_size=5))
    at, runs = 0, []
    for length in lengths:
        at += draw(st.integers(0, 9))
        runs.append((at, length))
        at += length
    return tuple(runs)


windows = st.one_of(st.none(), st.integers(1, 40))
dtypes = st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16])


@settings(max_examples=50)
@given(
    st.lists(st.tuples(disjoint_runs(), disjoint_runs()), min_size=1, max_size=3),
    st.sampled_from(HEADS), dtypes, windows, st.sampled_from([4, 8]),
)  # fmt: skip
def test_every_kernel_equals_fp64(
    runs: list[tuple[Runs, Runs]],
    heads: tuple[int, int],
    dtype: torch.dtype,
    window: int | None,
    size: int,
) -> None:
    """Queries before, among and after the keys, several requests a call; some see nothing."""
    spec = LayerSpec(*heads, D, 0.3, window)
    requests = [request(q, k, spec, dtype, seed) for seed, (q, k) in enumerate(runs)]
    for each in KERNELS.values():
        if serving(each, dtype):
            check(each, requests, spec, size)


CASES: list[tuple[str, Runs, Runs, int | None, float | None]] = [
    ("T = 1, decode", ((57, 1),), ((0, 58),), None, None),
    ("T = 1, decode over pieces, windowed", ((57, 1),), ((0, 30), (30, 28)), 9, None),
    ("T = 1, nothing seen", ((3, 1),), ((4, 20),), None, None),
    ("T = 0", (), ((0, 20),), None, None),
    ("S = 0", ((5, 20),), (), None, None),
    ("both empty", (), (), 4, None),
    ("empty runs", ((5, 0), (9, 3)), ((0, 0), (2, 9)), None, None),
    ("a window of one", ((0, 40),), ((0, 40),), 1, None),
    ("a window that cuts the keys off", ((10, 8), (50, 8)), ((0, 12),), 5, None),
    ("zigzag", ((0, 9), (27, 9)), ((9, 9), (18, 9)), None, None),
    ("rows beyond one band", ((100, 290),), ((0, 150), (150, 240)), 50, None),
    ("a band of fewer keys than rows", ((20, 60),), ((30, 9),), 25, None),
    ("soft cap", ((10, 30),), ((0, 40),), None, 2.0),
    ("soft cap in a window", ((10, 30),), ((0, 40),), 7, 1.5),
    ("soft cap, decode", ((39, 1),), ((0, 40),), 17, 1.5),
]


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=[case[0] for case in CASES])
def test_named_cases(
    kernel: PagedKernel,
    case: tuple[str, Runs, Runs, int | None, float | None],
    dtype: torch.dtype,
) -> None:
    if not serving(kernel, dtype):
        assert (kernel.name, dtype) == ("cpu", torch.float16)
        return
    _, q_runs, k_runs, window, softcap = case
    for dims, sizes in (((D, D), SIZES), ((24, D), SIZES[2:3]), ((D, 24), SIZES[2:3])):
        spec = LayerSpec(6, 2, dims[0], 0.3, window, softcap, v_head_dim=dims[1])
        for size in sizes:
            if not kernel.refuses(spec, size, dtype):
                check(kernel, [request(q_runs, k_runs, spec, dtype)], spec, size)


def every_case(spec: LayerSpec, dtype: torch.dtype) -> list[Request]:
    """All of ``CASES`` that are plain, as requests of one call."""
    plain = [case for case in CASES if case[3] is None and case[4] is None]
    return [request(q, k, spec, dtype, seed) for seed, (_, q, k, _, _) in enumerate(plain)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("window", [None, 11])
def test_requests_of_every_kind_in_one_call(
    kernel: PagedKernel, dtype: torch.dtype, window: int | None
) -> None:
    spec = LayerSpec(6, 2, D, 0.3, window)
    check(kernel, every_case(spec, dtype), spec)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_keys_in_two_calls_fold_into_one_partial(kernel: PagedKernel, dtype: torch.dtype) -> None:
    """Two halves of the keys, the second folded into what the first found; rows of no request are
    left as they are."""
    spec = LayerSpec(6, 2, D, 0.3)
    whole = [request(q, ((0, 61),), spec, dtype) for q in (((30, 31),), ((60, 1),), ((5, 3),))]
    halves = [
        [Request(r.q, r.k[a:b], r.v[a:b], r.q_runs, ((a, b - a),)) for r in whole]
        for a, b in ((0, 24), (24, 61))
    ]
    running = call(kernel, halves[0], spec, 8)
    for edge in (0, -1):
        running.out[edge], running.lse[edge] = 3.0, 1.5
    kept = Partial(running.out.clone(), running.lse.clone())
    found = call(kernel, halves[1], spec, 8, into=running)
    assert found is running or found.out.data_ptr() == running.out.data_ptr()
    for edge in (0, -1):
        assert torch.equal(found.out[edge], kept.out[edge])
        assert torch.equal(found.lse[edge], kept.lse[edge])
        found.out[edge], found.lse[edge] = 0.0, -torch.inf
    part, row = own_rows(found), 0
    for r in whole:
        rows = slice(row, row + len(r.q))
        assert_exact(Partial(part.out[rows], part.lse[rows]), *oracle(r, spec), dtype)
        row += len(r.q)


def test_folding_is_a_merge_to_the_bit() -> None:
    """Torch's operators write over rows that hold nothing; a merge gives the same."""
    spec = LayerSpec(6, 2, D, 0.3, 20)
    requests = every_case(spec, torch.float32)
    alone = call(TorchKernel(), requests, spec, 8)
    into = Partial(torch.randn_like(alone.out), torch.randn_like(alone.lse))
    into.out[::3], into.lse[::3] = 0.0, -torch.inf
    want = merge(into, alone)
    got = call(TorchKernel(), requests, spec, 8, into=into)
    assert float((got.out - want.out).abs().max()) <= 1e-6
    assert torch.equal(got.out[::3], alone.out[::3]) and torch.equal(got.lse[::3], alone.lse[::3])


@pytest.mark.parametrize("threads", [2, 3, 5, 64])
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_keys_in_parts(monkeypatch: pytest.MonkeyPatch, threads: int, dtype: torch.dtype) -> None:
    """Few rows and many threads: the keys are cut into parts, and the few that are left merged."""
    parts: list[int] = []
    in_parts = torch_ops._in_parts

    def counted(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        parts.append(args[-1])
        return in_parts(*args)

    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(torch_ops, "PART_KEYS", 7)
    monkeypatch.setattr(torch_ops, "_in_parts", counted)
    for heads in HEADS:
        spec = LayerSpec(*heads, D, 0.3)
        check(TorchKernel(), every_case(spec, dtype), spec)
        for keys in range(56, 64):
            check(TorchKernel(), [request(((63, 2),), ((0, keys),), spec, dtype)], spec)
    assert set(parts) >= ({2} if threads == 2 else {threads} if threads < 8 else {8, 9})


@pytest.mark.parametrize("stretch", [1, 8, 24, 100])
def test_keys_in_stretches(monkeypatch: pytest.MonkeyPatch, stretch: int) -> None:
    """What bounds the gathered keys is not seen in the result."""
    monkeypatch.setattr(torch_ops, "STRETCH_KEYS", stretch)
    for window in (None, 30):
        spec = LayerSpec(6, 2, D, 0.3, window)
        check(TorchKernel(), every_case(spec, torch.float32), spec)


def test_a_query_head_reads_its_own_kv_head(kernel: PagedKernel) -> None:
    """Head h of H reads KV head h // (H // G): values name their KV head and come back so."""
    spec = LayerSpec(6, 3, D, 0.3)
    r = request(((0, 5), (9, 1)), ((0, 9),), spec, torch.float32)
    named_v = torch.arange(3.0)[None, :, None].expand(9, 3, D).contiguous()
    for q_runs, q in ((((0, 5),), r.q[:5]), (((9, 1),), r.q[5:])):
        one = Request(q, r.k, named_v, q_runs, r.k_runs)
        named = own_rows(call(kernel, [one], spec, 4)).out.mean(dim=(0, 2))
        assert named.tolist() == pytest.approx([0.0, 0.0, 1.0, 1.0, 2.0, 2.0], abs=1e-6)


@pytest.mark.parametrize("how", ["swapped", "every_other", "expanded", "heads first", "wider"])
@pytest.mark.parametrize("strided", ["q", "k", "v", "qkv"])
def test_inputs_of_any_strides(kernel: PagedKernel, how: str, strided: str) -> None:
    """Against fp64 of the same values: queries as they come, keys and values as they are written;
    none is changed."""

    def spread(x: torch.Tensor) -> torch.Tensor:
        if how == "heads first":
            return x.transpose(0, 1).contiguous().transpose(0, 1)
        if how == "wider":
            return torch.cat([x, torch.full_like(x, torch.nan)], dim=-1)[..., : x.shape[-1]]
        return laid_out(x, how)

    for _, q_runs, k_runs, window, softcap in CASES:
        spec = LayerSpec(6, 2, D, 0.3, window, softcap)
        r = request(q_runs, k_runs, spec, torch.float32)
        q, k, v = (
            spread(x) if n in strided else x for n, x in zip("qkv", (r.q, r.k, r.v), strict=True)
        )
        kept = q.clone(), k.clone(), v.clone()
        pages, [blocks] = stored(kernel, [Request(q, k, v, r.q_runs, r.k_runs)], spec, 8)
        at = torch.tensor(positions(r.q_runs), dtype=torch.int64)
        batch = make_batch([Part(r.q_runs, blocks)], q.device)
        part = kernel.paged_attention(q, at, pages, batch, spec)
        k_at = torch.tensor(positions(r.k_runs), dtype=torch.int64)
        out, lse = full_attention(q, k, v, at, k_at, scale=0.3, window=window, softcap=softcap)
        assert_exact(part, out, lse, torch.float32)
        assert all(torch.equal(a, b) for a, b in zip((q, k, v), kept, strict=True))


def test_requests_without_rows_or_blocks_between_others(kernel: PagedKernel) -> None:
    spec = LayerSpec(6, 2, D, 0.3)
    one, empty = request(((19, 1),), ((0, 20),), spec, torch.float32), ((), ())
    nothing = [request(*empty, spec, torch.float32), request(((4, 2),), (), spec, torch.float32)]
    check(kernel, [*nothing, one, *nothing, one, *nothing], spec)
    batch = make_batch([Part((), Blocks())], torch.device("cpu"))
    pages = empty_pages(PageShape.of(spec, 8, torch.float32, kernel.packed), 1, torch.device("cpu"))
    none = torch.empty(0, dtype=torch.int64)
    part = kernel.paged_attention(torch.empty(0, 6, D), none, pages, batch, spec)
    assert part.out.shape == (0, 6, D) and part.lse.shape == (0, 6)


def test_reference_in_slices_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The slices that bound its memory are not seen in the result."""
    monkeypatch.setattr(reference, "SCORE_BYTES", 6 * 72 * 4 * 7)  # seven rows at a time
    spec = LayerSpec(6, 2, D, 0.3, 30)
    check(ReferenceKernel(), [request(((0, 50),), ((0, 70),), spec, torch.float32)], spec)


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_soft_capped_scores_in_slices_of_rows(
    monkeypatch: pytest.MonkeyPatch, softcap: float | None
) -> None:
    monkeypatch.setattr(operators, "SCORE_BYTES", 1)  # one row at a time
    for window in (None, 9):
        spec = LayerSpec(6, 2, D, 0.3, window, softcap)
        check(TorchKernel(), every_case(spec, torch.float32), spec)


@pytest.mark.parametrize("name", ["reference", "sdpa"])
def test_fp64_is_kept(name: str) -> None:
    spec = LayerSpec(6, 2, D, 0.3)
    for q_runs in (((0, 30),), ((29, 1),)):
        r = request(q_runs, ((0, 30),), spec, torch.float64)
        part = own_rows(call(KERNELS[name], [r], spec, 8))
        assert part.out.dtype == part.lse.dtype == torch.float64
        out, lse = oracle(r, spec)
        assert float((part.out - out).abs().max()) <= 1e-13
        assert float((part.lse - lse).abs().max()) <= 1e-13


def test_scores_of_any_size_give_no_nan(kernel: PagedKernel) -> None:
    """Scores up to about 1e5 in fp32, where a softmax without its maximum would overflow."""
    for window in (None, 3):
        spec = LayerSpec(4, 2, D, 0.3, window)
        for q_runs in (((0, 20),), ((19, 1),)):
            r = request(q_runs, ((0, 20),), spec, torch.float32)
            large = Request(r.q * 300, r.k * 300, r.v, r.q_runs, r.k_runs)
            part = own_rows(call(kernel, [large], spec, 8))
            assert bool(torch.isfinite(part.out).all()) and bool(torch.isfinite(part.lse).all())


# --- torch's operators on CUDA, over an emulation of what they check


def cuda_flash(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """``_scaled_dot_product_flash_attention``: halves, dense, dims a multiple of 8 up to 256."""
    assert q.dtype in (torch.float16, torch.bfloat16) and q.shape[3] <= 256
    rows, keys = q.shape[2], k.shape[2]
    assert not causal or rows == keys
    mask = torch.ones(rows, keys).tril() if causal else torch.ones(rows, keys)
    return in_fp64(q, k, v, scale, mask.log())


def cuda_efficient(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    mask: torch.Tensor | None,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``_scaled_dot_product_efficient_attention``: a mask of q's dtype in aligned strides, over all
    heads; the lse of more rows than there are."""
    rows, keys = q.shape[2], k.shape[2]
    assert not (causal and (mask is not None or rows != keys))
    if mask is None:
        mask = torch.ones(rows, keys).tril().log() if causal else torch.zeros(rows, keys)
    else:
        assert mask.dtype == q.dtype and mask.shape == (*q.shape[:3], keys)
        assert mask.stride(-1) == 1 and all(mask.stride(i) % 8 == 0 for i in range(3))
    out, lse = in_fp64(q, k, v, scale, mask)
    room = torch.full((*lse.shape[:2], -(-rows // 32) * 32), torch.nan)
    room[:, :, :rows] = lse
    return out, room


def in_fp64(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    assert q.shape[:2] == k.shape[:2] == v.shape[:2] and q.shape[3] % 8 == 0
    assert q.shape[3] == k.shape[3] == v.shape[3]
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    scores = torch.matmul(q.double(), k.double().transpose(2, 3)) * scale + mask.double()
    weights = torch.softmax(scores, dim=-1).nan_to_num(0.0)
    return torch.matmul(weights, v.double()).to(q.dtype), torch.logsumexp(scores, -1).float()


@pytest.mark.parametrize("dims", [(16, 16), (20, 20), (100, 36), (264, 264), (24, 40)])
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_what_cuda_operators_are_given(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, dims: tuple[int, int]
) -> None:
    """Any head dims: padded to what the operators take, and to the one that takes that many."""
    monkeypatch.setattr(operators, "cuda_flash", cuda_flash)
    monkeypatch.setattr(operators, "cuda_efficient", cuda_efficient)
    monkeypatch.setattr(operators, "cpu_op", operators.cuda_op)
    monkeypatch.setattr(torch_ops, "_parts", lambda *sizes: 1)
    for window in (None, 7):
        spec = LayerSpec(6, 2, dims[0], 0.1, window, v_head_dim=dims[1])
        for size in (1, 8):
            check(TorchKernel(), every_case(spec, dtype), spec, size)


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=[case[0] for case in CASES])
def test_torch_operators_on_cuda(
    case: tuple[str, Runs, Runs, int | None, float | None], dtype: torch.dtype
) -> None:
    _, q_runs, k_runs, window, softcap = case
    for heads in HEADS:
        for each in (TorchKernel(), ReferenceKernel()):
            spec = LayerSpec(*heads, 64, 0.3, window, softcap)
            one = [request(q_runs, k_runs, spec, dtype)]
            check(each, one, spec, 16, torch.device("cuda"))


def test_the_rows_of_a_call(kernel: PagedKernel) -> None:
    """A request's rows are its own, in whatever order the requests come."""
    spec = LayerSpec(4, 2, D, 0.3)
    many = [request(((n - 1, 1),), ((0, n),), spec, torch.float32, n) for n in (1, 7, 8, 9, 30)]
    check(kernel, many, spec)
    check(kernel, many[::-1], spec)
