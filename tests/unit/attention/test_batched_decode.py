"""Many sequences' newest tokens in one kernel call, against fp64 attention of each alone.

flash-attn's decode kernel runs here over an emulation of that package's rules, and for real under
the ``gpu`` marker.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_cp.attention import BatchedDecode, Kernel, LayerSpec, batched_decode, get_kernel
from ds_cp.attention.kernels.reference import reference_kernel, reference_rows
from ds_cp.attention.kernels.sdpa import sdpa_kernel, sdpa_rows
from tests.helpers import flash_attn
from tests.helpers.oracle import full_attention

CPU = torch.device("cpu")
KERNELS = {
    "reference": Kernel(reference_kernel, reference_rows),
    "sdpa": Kernel(sdpa_kernel, sdpa_rows),
}
HEADS = [(4, 4), (6, 2), (9, 3), (5, 1)]
D = 16
LIMITS = {torch.float32: 2e-6, torch.bfloat16: 2 * 2**-8, torch.float16: 2 * 2**-11}
HOW = "run `pytest -m gpu tests/unit/attention` on a machine with a CUDA device"
Extents = list[tuple[int, int]]


def check(
    kernel: Kernel,
    extents: list[Extents],
    heads: tuple[int, int],
    dtype: torch.dtype,
    window: int | None = None,
    softcap: float | None = None,
    device: torch.device = CPU,
    dim: int = D,
) -> BatchedDecode:
    """Every row against fp64. Slots that no sequence holds are NaN and must not be read."""
    gen = torch.Generator().manual_seed(3)
    num_q, num_kv = heads
    slots = max(slot + n for parts in extents for slot, n in parts) + 3
    held = torch.tensor([s for parts in extents for at, n in parts for s in range(at, at + n)])
    kv = torch.full((2, num_kv, slots, dim), torch.nan)
    kv[:, :, held] = torch.randn(2, num_kv, len(held), dim, generator=gen)
    kv = kv.to(dtype)
    q = torch.randn(num_q, len(extents), dim, generator=gen).to(dtype).transpose(0, 1)
    spec = LayerSpec(num_q, num_kv, dim, 0.3, window, softcap)
    attention = BatchedDecode(extents, dtype, device)
    for _ in range(2):  # a layer, and the next one like it
        part = attention(q.to(device), kv.to(device), kernel, spec)
    assert part.out.shape == q.shape and part.lse.shape == q.shape[:2]
    assert part.lse.dtype == torch.float32
    for row, parts in enumerate(extents):
        at = torch.tensor([s for slot, n in parts for s in range(slot, slot + n)])
        k, v = kv[:, :, at].transpose(1, 2)
        places = torch.arange(len(at))
        out, lse = full_attention(
            q[row : row + 1], k, v, places[-1:], places, scale=0.3, window=window, softcap=softcap
        )
        worst = float((part.out[row].cpu().double() - out[0]).abs().max())
        assert worst <= LIMITS[dtype] * float(v.double().abs().max()), (row, worst)
        off = float((part.lse[row].cpu().double() - lse[0]).abs().max())
        assert off <= (5e-6 if dtype == torch.float32 else 1e-2) * max(1.0, float(lse.abs().max()))
    return attention


@st.composite
def stored(draw: st.DrawFn) -> list[Extents]:
    """Sequences of one to three extents, anywhere in the pool."""
    at, found = 0, []
    for _ in range(draw(st.integers(1, 9))):
        parts = []
        for _ in range(draw(st.integers(1, 3))):
            at += draw(st.integers(0, 5))
            length = draw(st.integers(1, 40))
            parts.append((at, length))
            at += length
        found.append(draw(st.permutations(parts)))
    return draw(st.permutations(found))


@settings(max_examples=80)
@given(
    stored(), st.sampled_from(HEADS), st.sampled_from(list(LIMITS)),
    st.one_of(st.none(), st.integers(1, 60)),
)  # fmt: skip
def test_every_row_equals_fp64(
    extents: list[Extents], heads: tuple[int, int], dtype: torch.dtype, window: int | None
) -> None:
    for kernel in KERNELS.values():
        check(kernel, extents, heads, dtype, window)


MIXED: list[Extents] = [[(0, 3)], [(5, 200)], [(300, 90), (210, 80)], [(400, 1)], [(410, 190)]]


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (None, 1.5), (33, None), (1, 2.0)])
def test_rows_of_many_lengths(name: str, window: int | None, softcap: float | None) -> None:
    check(KERNELS[name], MIXED, (6, 2), torch.float32, window, softcap)


def test_lengths_are_grouped_within_their_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Little padding, and no copy larger than allowed; all rows in their order again."""
    attention = check(KERNELS["sdpa"], MIXED, (6, 2), torch.float32)
    [groups] = attention._groups.values()
    assert [group.rows.tolist() for group in groups] == [[3], [0], [1, 2, 4]]
    monkeypatch.setattr(batched_decode, "GATHERED", 400)
    attention = check(KERNELS["sdpa"], MIXED, (6, 2), torch.float32)
    [groups] = attention._groups.values()
    assert [len(group.rows) for group in groups] == [1, 1, 2, 1]


def test_layers_of_different_widths_share_one_object() -> None:
    """As in a model whose layers differ in heads, head size and window."""
    extents: list[Extents] = [[(0, 20)], [(20, 30)]]
    attention = BatchedDecode(extents, torch.float32, CPU)
    for heads, dim, window in (((4, 4), 8, None), ((6, 2), 16, 7), ((4, 4), 8, None)):
        kv, q = torch.randn(2, heads[1], 50, dim), torch.randn(2, heads[0], dim)
        spec = LayerSpec(*heads, dim, 0.3, window)
        part = attention(q, kv, KERNELS["sdpa"], spec)
        for row, ((slot, n),) in enumerate(extents):
            k, v = kv[:, :, slot : slot + n].transpose(1, 2)
            at = torch.arange(n)
            out, _ = full_attention(q[row : row + 1], k, v, at[-1:], at, scale=0.3, window=window)
            assert float((part.out[row] - out[0]).abs().max()) <= 2e-6 * float(v.abs().max())


# --- flash-attn's adapter


@pytest.fixture
def flash() -> Iterator[Kernel]:
    """The adapter, over the emulation of the package."""
    with flash_attn.emulated() as adapter:
        yield Kernel(adapter.flash_kernel, adapter.flash_rows)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (None, 1.5), (33, None)])
def test_the_flash_adapter(
    flash: Kernel, dtype: torch.dtype, window: int | None, softcap: float | None
) -> None:
    check(flash, MIXED, (6, 2), dtype, window, softcap)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason=f"no CUDA device: {HOW}")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (None, 1.5), (33, None)])
def test_on_cuda(dtype: torch.dtype, window: int | None, softcap: float | None) -> None:
    """The kernel that auto takes there, and torch's."""
    cuda = torch.device("cuda")
    for name in {get_kernel("auto", cuda, dtype)[0], "sdpa"}:
        kernel = get_kernel(name, cuda, dtype)[1]
        check(kernel, MIXED, (6, 2), dtype, window, softcap, cuda, dim=64)
