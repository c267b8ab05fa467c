"""The CPU operator: keys that a row does not see, whatever they hold, and NaN in those it sees."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ds_cp.attention.batch import Part, make_batch
from ds_cp.attention.kernels.cpu import CpuKernel
from ds_cp.attention.pages import PageShape, empty_pages
from ds_cp.attention.spec import LayerSpec
from ds_cp.attention.state import Partial
from ds_cp.layout import Block, Blocks
from tests.unit.attention.test_cpu_kernel import LIMIT, VARIANTS, make_kernel

# block size, head dim, window, length, the row looked at
LAYERS = (
    (8, 64, None, 64, 31),  # tiles are repacked: blocks are no whole vectors
    (16, 72, None, 64, 31),  # and dims are none
    (16, 64, 569, 660, 600),  # a window that begins in the middle of a step of four vectors
    (16, 64, None, 64, 31),
)
CPU = torch.device("cpu")


@pytest.fixture(params=VARIANTS, ids=lambda v: v[0] + ("-brgemm" if v[1] else ""))
def kernel(request: pytest.FixtureRequest) -> CpuKernel:
    return make_kernel(*request.param)


@pytest.fixture(params=LIMIT, ids=lambda d: str(d)[6:])
def dtype(request: pytest.FixtureRequest, kernel: CpuKernel) -> torch.dtype:
    if kernel.brgemm and request.param == torch.float32:
        pytest.skip("brgemm is for bf16 only: run the other variant")
    found: torch.dtype = request.param
    return found


def attend(
    kernel: CpuKernel,
    spec: LayerSpec,
    size: int,
    q: torch.Tensor,
    first: int,
    k: torch.Tensor,
    v: torch.Tensor,
    held: int | None = None,
) -> Partial:
    """Rows ``q`` at ``first`` on over the first ``held`` tokens of ``k`` and ``v``, or all."""
    pages = empty_pages(PageShape.of(spec, size, k.dtype, True), -(-len(k) // size), CPU)
    at = torch.arange(len(k))
    kernel.write(pages, k, v, at // size, at % size)
    held = len(k) if held is None else held
    blocks = Blocks([Block(i // size, i, min(size, held - i)) for i in range(0, held, size)])
    batch = make_batch([Part(((first, len(q)),), blocks)], CPU)
    return kernel.paged_attention(q, torch.arange(first, first + len(q)), pages, batch, spec)


def drawn(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("layer", LAYERS, ids=lambda x: f"block{x[0]}-dim{x[1]}-window{x[2]}")
@pytest.mark.parametrize("fold", [1, 6])
def test_a_hidden_key_changes_no_bit(
    kernel: CpuKernel, dtype: torch.dtype, layer: tuple[int, int, int | None, int, int], fold: int
) -> None:
    size, dim, window, length, row = layer
    spec = LayerSpec(fold, 1, dim, dim**-0.5, window)
    k, v = (drawn((length, 1, dim), dtype, i) for i in (1, 2))
    q = drawn((length, fold, dim), dtype, 3)
    plain = attend(kernel, spec, size, q[row : row + 1], row, k, v)
    huge = q[row, 0] * (1e3 / (spec.scale * float(q[row, 0].float().square().sum())))
    for hidden in (row + 1, row + 9, *((5, 31) if window else ())):
        other = k.clone()
        other[hidden, 0] = huge  # a score of 1000
        got = attend(kernel, spec, size, q[row : row + 1], row, other, v)
        assert torch.equal(got.out, plain.out) and torch.equal(got.lse, plain.lse), hidden
    begin = max(0, length - 96)
    whole = attend(kernel, spec, size, q[begin:], begin, k, v)
    for chunk in (1, 7, 32):
        for at in range(begin, length, chunk):
            end = min(at + chunk, length)
            got = attend(kernel, spec, size, q[at:end], at, k, v, end)
            rows = slice(at - begin, end - begin)
            assert torch.equal(got.out, whole.out[rows]), (chunk, at)
            assert torch.equal(got.lse, whole.lse[rows]), (chunk, at)


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_nan_comes_out_of_rows_that_see_it_and_of_no_others(
    kernel: CpuKernel, dtype: torch.dtype, softcap: float | None
) -> None:
    for size, dim, window, length, _ in LAYERS:
        spec = LayerSpec(4, 2, dim, dim**-0.5, window, softcap)
        k, v = (drawn((length, 2, dim), dtype, i) for i in (1, 2))
        q = drawn((length, 4, dim), dtype, 3)
        plain = attend(kernel, spec, size, q, 0, k, v)
        at = torch.arange(length)
        for key in (0, 3, 40):
            other = k.clone()
            other[key, 1, dim // 2] = torch.nan
            got = attend(kernel, spec, size, q, 0, other, v)
            seen = (at >= key) & (at < key + (window or length))
            assert got.out[seen, 2:].isnan().all() and got.lse[seen, 2:].isnan().all(), key
            for ours, right in ((got.out, plain.out), (got.lse, plain.lse)):
                assert torch.equal(ours[:, :2], right[:, :2])
                assert torch.equal(ours[~seen, 2:], right[~seen, 2:])


FAILS = """
import torch
from tests.unit.attention.test_cpu_hidden import LayerSpec, attend, drawn, make_kernel
kernel = make_kernel("avx512bf16", True)
q = drawn((1, 2, 16), torch.bfloat16, 1)
try:
    attend(kernel, LayerSpec(2, 2, 16, 0.25), 16, q, 0, q, q)
except ValueError as err:
    print(err)
"""


def run(code: str, **env: str) -> str:
    """What a process of its own prints, for what oneDNN reads once."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | env, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-500:]
    return done.stdout


def test_a_product_that_fails_is_an_error_of_the_call() -> None:
    """oneDNN refuses bf16 when it is told that the processor is an older one."""
    make_kernel("avx512bf16", True)
    assert "its matrix product failed" in run(FAILS, ONEDNN_MAX_CPU_ISA="AVX2")


MANY = """
import os
import torch
from tests.unit.attention.test_cpu_hidden import LayerSpec, attend, drawn, make_kernel
kernel = make_kernel("avx512bf16", True)
k, q = drawn((200, 2, 32), torch.bfloat16, 1), drawn((40, 4, 32), torch.bfloat16, 2)
os.chdir("FOLDER")
for first in range(0, 150, 7):
    for rows in (1, 2, 3, 5, 9, 17, 30):
        attend(kernel, LayerSpec(4, 2, 32, 0.25), 16, q[:rows], first, k, k, first + rows)
print(len(os.listdir()))
"""


def test_products_by_brgemm_have_few_shapes(tmp_path: Path) -> None:
    """ATen compiles a kernel for each and keeps it for good, in each thread."""
    make_kernel("avx512bf16", True)
    code = MANY.replace("FOLDER", str(tmp_path))
    assert 0 < int(run(code, ONEDNN_JIT_DUMP="1")) <= 24
