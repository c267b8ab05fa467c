"""The kernels against fp64, for any runs, windows, head counts and dtypes.

flash-attn is not installed on a CPU machine: its adapter runs here over an emulation of that
package's rules (tests/helpers/flash_attn.py), and on the real one under the ``gpu`` marker.
"""

from __future__ import annotations

import importlib.util
import random
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_cp.attention import Kernel, LayerSpec, get_kernel, kernels
from ds_cp.attention.kernels import Block, kernel_notes, reference, sdpa
from ds_cp.attention.kernels.reference import reference_kernel, reference_rows
from ds_cp.attention.kernels.sdpa import sdpa_kernel, sdpa_rows
from ds_cp.attention.spec import Padding
from ds_cp.attention.tiles import cover
from ds_cp.errors import ConfigError
from ds_cp.kv.pool import KVPool
from ds_cp.layout import Runs, join
from tests.helpers import flash_attn
from tests.helpers.attention_cases import laid_out
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
    scale = 0.3 if dim <= 64 else 0.05
    spec = LayerSpec(*heads, dim, scale, window, softcap)
    part = kernel(q.to(device), k.to(device), v.to(device), q_runs, k_runs, spec)
    assert part.out.shape == q.shape and part.lse.shape == q.shape[:2]
    assert part.lse.dtype == torch.float32
    assert part.out.dtype in (dtype, torch.float32)
    got_out, got_lse = part.out.cpu().double(), part.lse.cpu().double()
    out, lse = full_attention(
        q, k, v, places(q_runs), places(k_runs), scale=scale, window=window, softcap=softcap
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


@pytest.mark.parametrize("how", ["swapped", "every_other", "expanded"])
@pytest.mark.parametrize("strided", ["q", "k", "v", "qkv"])
def test_a_last_dimension_that_is_not_dense(how: str, strided: str) -> None:
    """Against fp64 of the same values: every case by every kernel, and rows of padded keys."""

    def spread(**named: torch.Tensor) -> list[torch.Tensor]:
        return [laid_out(x, how) if name in strided else x for name, x in named.items()]

    with flash_attn.emulated() as adapter:
        for kernel in (reference_kernel, sdpa_kernel, adapter.flash_kernel):
            for _, q_runs, k_runs, window, softcap in CASES:
                q, k, v = inputs(q_runs, k_runs, (6, 2), torch.float32)
                q, k, v = spread(q=q, k=k, v=v)
                spec = LayerSpec(6, 2, D, 0.3, window, softcap)
                part = kernel(q, k, v, q_runs, k_runs, spec)
                out, lse = full_attention(
                    q, k, v, places(q_runs), places(k_runs),
                    scale=0.3, window=window, softcap=softcap,
                )  # fmt: skip
                seen = ~torch.isneginf(lse)
                assert torch.equal(~torch.isneginf(part.lse), seen)
                if seen.any():
                    assert float((part.out - out).abs().max()) <= 2e-6 * float(out.abs().max())
                    assert float((part.lse - lse)[seen].abs().max()) <= 1e-5
        lengths = torch.tensor([5, 16, 1], dtype=torch.int32)
        mask = torch.zeros(3, 1, 1, 16).masked_fill_(
            (torch.arange(16) >= lengths[:, None])[:, None, None], -torch.inf
        )
        q, k, v = spread(
            q=torch.randn(3, 6, D), k=torch.randn(3, 2, 16, D), v=torch.randn(3, 2, 16, D)
        )
        for rows in (reference_rows, sdpa_rows, adapter.flash_rows):
            part = rows(q, k, v, Padding(lengths, mask), LayerSpec(6, 2, D, 0.3))
            for row, n in enumerate(lengths.tolist()):
                keys, values = k[row, :, :n].transpose(0, 1), v[row, :, :n].transpose(0, 1)
                at = torch.arange(n)
                out, _ = full_attention(q[row : row + 1], keys, values, at[-1:], at, scale=0.3)
                assert float((part.out[row] - out[0]).abs().max()) <= 2e-6 * float(
                    values.abs().max()
                )


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
    """Even on the right device: the error says what to install, and auto does without."""
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


def wrong_arguments(q: Any, k: Any, v: Any, softmax_scale: Any = None, causal: Any = False) -> None:
    """``flash_attn_func`` of a version without windows."""


class Broken(types.ModuleType):
    """A package that raises when a name of it is imported, as one built for another torch does."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(f"undefined symbol: {name}\nand a second line")


def broken() -> types.ModuleType:
    module = Broken("flash_attn")
    module.__spec__ = flash_attn.package().__spec__
    module.__path__ = []
    return module


INSTALLATIONS = {
    "a newer one without the function": (
        lambda: flash_attn.package(flash_attn_varlen_func=None),
        "cannot import name 'flash_attn_func'",
    ),
    "one without an argument": (
        lambda: flash_attn.package(
            flash_attn_func=wrong_arguments,
            flash_attn_with_kvcache=flash_attn.flash_attn_with_kvcache,
        ),
        "wrong_arguments has no argument window_size, softcap, return_attn_probs",
    ),
    "one for another torch": (broken, "RuntimeError: undefined symbol: flash_attn_func"),
}


@pytest.mark.parametrize("name", INSTALLATIONS)
def test_flash_attn_that_is_broken(name: str) -> None:
    """auto goes on with torch's attention and says why in a line; asked for by name it is the
    user's error."""
    make, why = INSTALLATIONS[name]
    cuda = torch.device("cuda", 0)
    with flash_attn.installed(make()):
        found, kernel = get_kernel("auto", cuda, torch.bfloat16)
        assert (found, kernel.block, kernel.rows) == ("sdpa", sdpa_kernel, sdpa_rows)
        assert why in kernel.note and "\n" not in kernel.note
        assert kernel_notes(found, kernel, []) == [kernel.note]
        with pytest.raises(ConfigError, match="attention.backend is flash_attn, but") as caught:
            get_kernel("flash_attn", cuda, torch.float16)
        assert why in str(caught.value) and "\n" not in str(caught.value)
        assert get_kernel("auto", CPU, torch.bfloat16)[1].note == ""


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (12, 0)])
def test_flash_attn_on_a_device_that_is_too_old(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]
) -> None:
    """flash-attn 2 imports there and raises at the first call: it is for Ampere and newer."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    cuda = torch.device("cuda", 0)
    with flash_attn.emulated() as adapter:
        name, kernel = get_kernel("auto", cuda, torch.float16)
        if capability >= (8, 0):
            assert (name, kernel.block) == ("flash_attn", adapter.flash_kernel)
            return
        assert (name, kernel.block) == ("sdpa", sdpa_kernel)
        assert "capability 8.0 or above, this one has 7.5" in kernel.note
        with pytest.raises(ConfigError, match=r"has 7\.5: install .* or set attention\.backend"):
            get_kernel("flash_attn", cuda, torch.float16)


def test_flash_attn_that_works_is_chosen_and_says_what_it_cannot() -> None:
    cuda = torch.device("cuda", 0)
    with flash_attn.emulated() as adapter:
        name, kernel = get_kernel("auto", cuda, torch.bfloat16)
        assert (name, kernel.block) == ("flash_attn", adapter.flash_kernel)
        fits = [LayerSpec(4, 2, dim, 1.0) for dim in (64, 80, 128, 256)]
        assert kernel_notes(name, kernel, fits) == [] and kernel.note == ""
        odd = [*fits, LayerSpec(4, 2, 320, 1.0), LayerSpec(4, 2, 100, 1.0)]
        [note] = kernel_notes(name, kernel, odd)
        assert note.startswith("layers with head_dim 100, 320 use torch's attention: ")
        assert kernel_notes("sdpa", Kernel(sdpa_kernel, sdpa_rows), odd) == []


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
        assert mask.stride(-1) == 1 and mask.stride(-2) % 8 == 0
    out, lse = in_fp64(q, k, v, scale, mask)
    room = torch.full((*lse.shape[:2], -(-rows // 32) * 32), torch.nan)
    room[:, :, :rows] = lse
    return out, room


def in_fp64(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    assert q.shape[:2] == k.shape[:2] == v.shape[:2] and q.shape[3] % 8 == 0
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    scores = torch.matmul(q.double(), k.double().transpose(2, 3)) * scale + mask.double()
    weights = torch.softmax(scores, dim=-1).nan_to_num(0.0)
    return torch.matmul(weights, v.double()).to(q.dtype), torch.logsumexp(scores, -1).float()


@pytest.mark.parametrize("dim", [16, 20, 100, 264])
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_what_cuda_operators_are_given(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, dim: int
) -> None:
    """Any head_dim: padded to what the operators take, and to the one that takes that many."""
    monkeypatch.setattr(sdpa, "_cuda_flash", cuda_flash)
    monkeypatch.setattr(sdpa, "_cuda_efficient", cuda_efficient)
    monkeypatch.setattr(sdpa, "_cpu_op", sdpa._cuda_op)
    for _, q_runs, k_runs, window, softcap in CASES:
        check(sdpa_kernel, q_runs, k_runs, (6, 2), dtype, window, softcap, dim=dim)
    q, k, v = torch.randn(3, 2, 2, dim), torch.randn(3, 2, 32, dim), torch.randn(3, 2, 32, dim)
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    mask = torch.zeros(3, 2, 2, 32, dtype=dtype)
    mask[..., 20:] = -torch.inf
    out, lse = sdpa._cuda_masked(q, k, v, 0.3, mask)
    want = torch.matmul(q.double(), k.double().transpose(2, 3)) * 0.3 + mask.double()
    exact = torch.matmul(want.softmax(-1), v.double())
    assert out.shape == q.shape and lse.shape == q.shape[:3]
    assert float((out.double() - exact).abs().max()) <= LIMITS[dtype] * float(v.abs().max())
    assert float((lse - want.logsumexp(-1)).abs().max()) <= 1e-5


# --- flash-attn's adapter


@pytest.fixture(scope="module")
def flash_kernel() -> Iterator[Block]:
    """The adapter, over the emulation of the package."""
    with flash_attn.emulated() as adapter:
        yield adapter.flash_kernel


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


def block_layout(rng: random.Random) -> tuple[Runs, Runs, int]:
    """A rank's blocks of a sequence dealt out over ranks, and a later chunk of queries: bands with
    fewer keys than rows and with more."""
    size, window = rng.choice([16, 64]), rng.choice([64, 100, 128, 300, 512, 1024])
    blocks = rng.choice([6, 10, 14])
    held = sorted(rng.sample(range(blocks), rng.randint(1, blocks // 2)))
    queries = (rng.randrange(blocks) * size, rng.choice([1, 64, 256, 300]))
    return (queries,), join((block * size, size) for block in held), window


def test_windows_of_the_flash_adapter_over_300_block_layouts(flash_kernel: Block) -> None:
    """The package drops a window side that is longer than the keys: with fewer keys than rows it
    would hide keys that a row sees, in 13 of these layouts."""
    rng, narrow = random.Random(1), 0
    for _ in range(300):
        q_runs, k_runs, window = block_layout(rng)
        bands = [tile for tile in cover(q_runs, k_runs, window) if tile.kind == "band"]
        narrow += any(tile.keys < tile.rows for tile in bands)
        check(flash_kernel, q_runs, k_runs, (2, 1), torch.float32, window, dim=8)
    assert narrow > 50
    check(flash_kernel, ((704, 256),), ((193, 63),), (4, 2), torch.float32, 512)


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("dim", [4, 20, 100, 264])
def test_head_dims_that_flash_attn_does_not_have(
    flash_kernel: Block, dim: int, window: int | None
) -> None:
    """The emulation refuses them, as the package does; torch's operators compute the layer."""
    check(flash_kernel, ((40, 30),), ((0, 70),), (6, 2), torch.float32, window, dim=dim)


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
