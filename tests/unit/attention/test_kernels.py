"""The kernels against fp64, for any runs, windows, head counts and dtypes.

flash-attn is not installed on a CPU machine: its adapter runs here over a stand-in written from
that package's documentation (end-aligned masks, ``[B, H, T]`` lse, +inf for nothing seen), and on
the real one under the ``gpu`` marker.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_cp.attention import Kernel, LayerSpec, get_kernel, kernels
from ds_cp.attention.kernels import Block, reference, sdpa
from ds_cp.attention.kernels.reference import reference_kernel, reference_rows
from ds_cp.attention.kernels.sdpa import sdpa_kernel, sdpa_rows
from ds_cp.errors import ConfigError
from ds_cp.kv.pool import KVPool
from ds_cp.layout import Runs
from tests.helpers.oracle import full_attention

CPU = torch.device("cpu")
HEADS = [(4, 4), (6, 2), (9, 3), (5, 1)]
D = 16
# Largest error of out, relative to the largest reference value; 2 ulps at that scale for halves.
LIMITS = {torch.float32: 2e-6, torch.bfloat16: 2 * 2**-8, torch.float16: 2 * 2**-11}
HOW = "run `pytest -m gpu tests/unit/attention/test_kernels.py` on a machine with a CUDA device"
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason=f"no CUDA device: {HOW}")
needs_flash = pytest.mark.skipif(
    importlib.util.find_spec("flash_attn") is None,
    reason=f"flash-attn is not installed: pip install 'ds_cp[flash]', then {HOW}",
)


def inputs(
    q_runs: Runs, k_runs: Runs, heads: tuple[int, int], dtype: torch.dtype, dim: int = D
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    gen = torch.Generator().manual_seed(5)
    counts = [sum(n for _, n in runs) for runs in (q_runs, k_runs, k_runs)]
    shapes = [(n, h, dim) for n, h in zip(counts, (heads[0], heads[1], heads[1]), strict=True)]
    q, k, v = (torch.randn(shape, generator=gen).to(dtype) for shape in shapes)
    return q, k, v


def places(runs: Runs) -> torch.Tensor:
    return torch.tensor([p for s, n in runs for p in range(s, s + n)], dtype=torch.int64)


def check(
    kernel: Block,
    q_runs: Runs,
    k_runs: Runs,
    heads: tuple[int, int],
    dtype: torch.dtype,
    window: int | None = None,
    softcap: float | None = None,
    device: torch.device = CPU,
    dim: int = D,
) -> None:
    """Out and lse against fp64 over the same (rounded) inputs; a query that sees nothing gives
    exactly (0, -inf)."""
    q, k, v = inputs(q_runs, k_runs, heads, dtype, dim)
    spec = LayerSpec(*heads, dim, 0.3, window, softcap)
    part = kernel(q.to(device), k.to(device), v.to(device), q_runs, k_runs, spec)
    assert part.out.shape == q.shape and part.lse.shape == q.shape[:2]
    assert part.lse.dtype == torch.float32
    assert part.out.dtype in (dtype, torch.float32)
    got_out, got_lse = part.out.cpu().double(), part.lse.cpu().double()
    out, lse = full_attention(
        q, k, v, places(q_runs), places(k_runs), scale=0.3, window=window, softcap=softcap
    )
    blind = torch.isneginf(lse)
    assert torch.equal(torch.isneginf(got_lse), blind)
    assert bool((got_out[blind] == 0).all())
    if blind.all():
        return
    limit = LIMITS[dtype]
    assert float((got_out - out).abs().max()) <= limit * float(out.abs().max())
    seen = lse[~blind]
    lse_limit = 5e-6 if dtype == torch.float32 else 1e-2
    assert float((got_lse[~blind] - seen).abs().max()) <= lse_limit * max(
        1.0, float(seen.abs().max())
    )


@st.composite
def disjoint_runs(draw: st.DrawFn) -> Runs:
    """Runs of distinct positions in any storage order, empty ones among them."""
    lengths = draw(st.lists(st.integers(0, 14), max_size=5))
    at, runs = 0, []
    for length in lengths:
        at += draw(st.integers(0, 9))
        runs.append((at, length))
        at += length
    return tuple(draw(st.permutations(runs)))


windows = st.one_of(st.none(), st.integers(1, 40))
dtypes = st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16])


@settings(max_examples=100)
@given(disjoint_runs(), disjoint_runs(), st.sampled_from(HEADS), dtypes, windows)
def test_sdpa_and_reference_equal_fp64(
    q_runs: Runs, k_runs: Runs, heads: tuple[int, int], dtype: torch.dtype, window: int | None
) -> None:
    """Queries before, among and after the keys; some see nothing."""
    check(reference_kernel, q_runs, k_runs, heads, dtype, window)
    check(sdpa_kernel, q_runs, k_runs, heads, dtype, window)


CASES: list[tuple[str, Runs, Runs, int | None, float | None]] = [
    ("T = 1, decode", ((57, 1),), ((0, 58),), None, None),
    ("T = 1, decode over pieces, windowed", ((57, 1),), ((30, 28), (0, 30)), 9, None),
    ("T = 1, nothing seen", ((3, 1),), ((4, 20),), None, None),
    ("T = 0", (), ((0, 20),), None, None),
    ("S = 0", ((5, 20),), (), None, None),
    ("both empty", (), (), 4, None),
    ("empty runs", ((5, 0), (9, 3)), ((0, 0), (2, 9)), None, None),
    ("a window of one", ((0, 40),), ((0, 40),), 1, None),
    ("a window that cuts the keys off", ((50, 8), (10, 8)), ((0, 12),), 5, None),
    ("zigzag", ((0, 9), (27, 9)), ((9, 9), (18, 9)), None, None),
    ("rows beyond one band", ((100, 290),), ((0, 150), (150, 240)), 50, None),
    ("soft cap", ((10, 30),), ((0, 40),), None, 2.0),
    ("soft cap in a window", ((10, 30),), ((0, 40),), 7, 1.5),
]


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=[case[0] for case in CASES])
def test_named_cases(
    case: tuple[str, Runs, Runs, int | None, float | None], dtype: torch.dtype
) -> None:
    _, q_runs, k_runs, window, softcap = case
    for kernel in (reference_kernel, sdpa_kernel):
        check(kernel, q_runs, k_runs, (6, 2), dtype, window, softcap)


@pytest.mark.parametrize("threads", [2, 3, 5, 64])
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_keys_in_parts(monkeypatch: pytest.MonkeyPatch, threads: int, dtype: torch.dtype) -> None:
    """Few heads and many threads: the keys are cut into parts, and the few that are left merged."""
    parts: list[int] = []
    in_parts = sdpa._in_parts

    def counted(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        parts.append(args[-1])
        return in_parts(*args)

    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(sdpa, "PART_KEYS", 7)
    monkeypatch.setattr(sdpa, "_in_parts", counted)
    for heads in HEADS:
        for _, q_runs, k_runs, window, softcap in CASES:
            check(sdpa_kernel, q_runs, k_runs, heads, dtype, window, softcap)
        for keys in range(56, 64):
            check(sdpa_kernel, ((63, 1),), ((0, keys),), heads, dtype)
    assert set(parts) >= ({2} if threads == 2 else {threads} if threads < 8 else {8, 9})


def test_a_query_head_reads_its_own_kv_head() -> None:
    """Head h of H reads KV head h // (H // G): values name their KV head and come back so."""
    q, k, _ = inputs(((0, 5),), ((0, 5),), (6, 3), torch.float32)
    v = torch.arange(3.0)[None, :, None].expand(5, 3, D).contiguous()
    for kernel in (reference_kernel, sdpa_kernel):
        part = kernel(q, k, v, ((0, 5),), ((0, 5),), LayerSpec(6, 3, D, 0.3))
        named = part.out.mean(dim=(0, 2))
        assert named.tolist() == pytest.approx([0.0, 0.0, 1.0, 1.0, 2.0, 2.0], abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("window", [None, 6])
def test_strided_inputs(dtype: torch.dtype, window: int | None) -> None:
    """Views as they come: heads-first queries and slots of the KV pool, keys in wider memory."""
    q_runs, k_runs, heads = ((20, 12),), ((0, 32),), (6, 2)
    q, k, v = inputs(q_runs, k_runs, heads, dtype)
    spec = LayerSpec(*heads, D, 0.3, window)
    pool = KVPool([spec], 50, dtype, CPU)
    slots = torch.arange(9, 41)
    pool.write(0, k.transpose(0, 1), v.transpose(0, 1), slots, ((9, 32),))
    [from_pool] = pool.read(0, [(9, 32)]).pieces
    heads_first = q.transpose(0, 1).contiguous().transpose(0, 1)
    wide = [torch.cat([a, a + 1], dim=-1)[..., :D] for a in (q, k, v)]
    every_other = [torch.stack([a, a - 1], dim=1).flatten(0, 1)[::2] for a in (q, k, v)]
    for kernel in (reference_kernel, sdpa_kernel):
        want = kernel(q, k, v, q_runs, k_runs, spec)
        for x, y, z in ((heads_first, *from_pool), wide, every_other):
            assert not (x.is_contiguous() or y.is_contiguous() or z.is_contiguous())
            kept = x.clone(), y.clone(), z.clone()
            got = kernel(x, y, z, q_runs, k_runs, spec)
            assert torch.allclose(got.out.float(), want.out.float(), atol=LIMITS[dtype], rtol=0)
            assert torch.allclose(got.lse, want.lse, atol=LIMITS[dtype], rtol=LIMITS[dtype])
            assert all(torch.equal(a, b) for a, b in zip((x, y, z), kept, strict=True))


def test_reference_in_slices_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The slices that bound its memory are not seen in the result."""
    monkeypatch.setattr(reference, "SCORE_BYTES", 6 * 70 * 4 * 7)  # seven rows at a time
    check(reference_kernel, ((20, 50), (0, 20)), ((0, 70),), (6, 2), torch.float32, 30)


def test_reference_keeps_fp64() -> None:
    q, k, v = (x.double() for x in inputs(((0, 30),), ((0, 30),), (6, 2), torch.float32))
    part = reference_kernel(q, k, v, ((0, 30),), ((0, 30),), LayerSpec(6, 2, D, 0.3))
    at = torch.arange(30)
    out, lse = full_attention(q, k, v, at, at, scale=0.3)
    assert float((part.out - out).abs().max()) <= 1e-13
    assert float((part.lse - lse).abs().max()) <= 1e-13


@pytest.mark.parametrize("kernel", [reference_kernel, sdpa_kernel])
def test_the_same_bits_each_time(kernel: Block) -> None:
    q_runs, k_runs = ((0, 20), (60, 20)), ((0, 40), (60, 20))
    q, k, v = inputs(q_runs, k_runs, (6, 2), torch.float32)
    first = kernel(q, k, v, q_runs, k_runs, LayerSpec(6, 2, D, 0.3))
    for _ in range(3):
        again = kernel(q, k, v, q_runs, k_runs, LayerSpec(6, 2, D, 0.3))
        assert torch.equal(again.out, first.out) and torch.equal(again.lse, first.lse)


def test_scores_of_any_size_give_no_nan() -> None:
    """Scores up to about 1e5 in fp32, where a softmax without its maximum would overflow."""
    q, k, v = inputs(((0, 20),), ((0, 20),), (4, 2), torch.float32)
    for kernel in (reference_kernel, sdpa_kernel):
        for window in (None, 3):
            spec = LayerSpec(4, 2, D, 0.3, window)
            part = kernel(q * 300, k * 300, v, ((0, 20),), ((0, 20),), spec)
            assert bool(torch.isfinite(part.out).all()) and bool(torch.isfinite(part.lse).all())


# --- choosing one


def test_kernels_by_name() -> None:
    sdpa, plain = Kernel(sdpa_kernel, sdpa_rows), Kernel(reference_kernel, reference_rows)
    assert get_kernel("auto", CPU, torch.float32) == ("sdpa", sdpa)
    assert get_kernel("sdpa", CPU, torch.bfloat16) == ("sdpa", sdpa)
    assert get_kernel("reference", CPU, torch.float32) == ("reference", plain)
    with pytest.raises(ConfigError, match="'fast' is unknown; choose auto, reference, sdpa"):
        get_kernel("fast", CPU, torch.float32)


def test_flash_attn_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even on the right device: told what to install, and auto does without."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    cuda = torch.device("cuda", 0)
    for device in (CPU, cuda):
        with pytest.raises(ConfigError, match="flash-attn is not installed: pip install") as caught:
            get_kernel("flash_attn", device, torch.bfloat16)
        assert "attention.backend" in str(caught.value) and "\n" not in str(caught.value)
    assert get_kernel("auto", cuda, torch.bfloat16)[0] == "sdpa"


def test_flash_attn_that_cannot_run_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_has_flash_attn", lambda: True)
    for device, dtype in ((CPU, torch.bfloat16), (torch.device("cuda", 0), torch.float32)):
        with pytest.raises(ConfigError, match=f"needs a CUDA device with fp16 or bf16.*{dtype}"):
            get_kernel("flash_attn", device, dtype)
        assert get_kernel("auto", device, dtype)[0] == "sdpa"


# --- flash-attn's adapter


def stand_in(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    softmax_scale: float,
    causal: bool,
    window_size: tuple[int, int],
    softcap: float,
    return_attn_probs: bool,
) -> tuple[torch.Tensor, torch.Tensor, None]:
    """``flash_attn_func`` as its documentation says: the mask is aligned to the bottom right, row i
    sees keys ``[i + S - T - left, i + S - T + right]``, -1 means no limit; lse is ``[B, H, T]``."""
    assert return_attn_probs and q.dim() == k.dim() == v.dim() == 4
    num_rows, num_heads, num_keys = q.shape[1], q.shape[2], k.shape[1]
    assert num_rows and num_keys
    left, right = window_size
    right = 0 if causal else right
    assert left >= -1 and right >= -1
    at = torch.arange(num_rows)[:, None] + num_keys - num_rows
    key = torch.arange(num_keys)[None, :]
    seen = torch.ones(num_rows, num_keys, dtype=torch.bool)
    if left >= 0:
        seen &= key >= at - left
    if right >= 0:
        seen &= key <= at + right
    fold = num_heads // k.shape[2]
    k_all, v_all = (x[0].double().repeat_interleave(fold, dim=1) for x in (k, v))
    scores = torch.einsum("thd,shd->hts", q[0].double(), k_all) * softmax_scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~seen, -torch.inf)
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.softmax(scores, dim=-1).nan_to_num(0.0)
    out = torch.einsum("hts,shd->thd", weights, v_all)
    lse = lse.masked_fill(torch.isneginf(lse), torch.inf)
    return out[None].to(q.dtype), lse[None].float(), None


@pytest.fixture(scope="module")
def flash_kernel() -> Iterator[Block]:
    """The adapter, with the stand-in where the package would be."""
    name = "ds_cp.attention.kernels.flash"
    fake: Any = types.ModuleType("flash_attn")
    fake.flash_attn_func, fake.flash_attn_with_kvcache = stand_in, None
    kept = {key: sys.modules.pop(key, None) for key in ("flash_attn", name)}
    sys.modules["flash_attn"] = fake
    try:
        yield importlib.import_module(name).flash_kernel
    finally:
        for key, module in kept.items():
            sys.modules.pop(key, None)
            if module is not None:
                sys.modules[key] = module


@settings(max_examples=50)
@given(disjoint_runs(), disjoint_runs(), st.sampled_from(HEADS), windows)
def test_the_flash_adapter_equals_fp64(
    flash_kernel: Block, q_runs: Runs, k_runs: Runs, heads: tuple[int, int], window: int | None
) -> None:
    check(flash_kernel, q_runs, k_runs, heads, torch.float32, window)


@pytest.mark.parametrize("case", CASES, ids=[case[0] for case in CASES])
def test_named_cases_of_the_flash_adapter(
    flash_kernel: Block, case: tuple[str, Runs, Runs, int | None, float | None]
) -> None:
    _, q_runs, k_runs, window, softcap = case
    for dtype in (torch.float32, torch.bfloat16):
        check(flash_kernel, q_runs, k_runs, (6, 2), dtype, window, softcap)


@pytest.mark.gpu
@needs_cuda
@needs_flash
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=[case[0] for case in CASES])
def test_flash_attn_on_cuda(
    case: tuple[str, Runs, Runs, int | None, float | None], dtype: torch.dtype
) -> None:
    cuda = torch.device("cuda")
    name, kernel = get_kernel("flash_attn", cuda, dtype)
    assert name == get_kernel("auto", cuda, dtype)[0] == "flash_attn"
    _, q_runs, k_runs, window, softcap = case
    check(kernel, q_runs, k_runs, (6, 2), dtype, window, softcap, cuda, dim=64)


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=[case[0] for case in CASES])
def test_sdpa_on_cuda(
    case: tuple[str, Runs, Runs, int | None, float | None], dtype: torch.dtype
) -> None:
    _, q_runs, k_runs, window, softcap = case
    for heads in HEADS:
        for kernel in (sdpa_kernel, reference_kernel):
            cuda = torch.device("cuda")
            check(kernel, q_runs, k_runs, heads, dtype, window, softcap, cuda, dim=64)
