"""The CPU operator: a few rows are served for several KV heads at once, many rows head by head, and
their bits are the same."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch

from ds_cp.attention.batch import Part, make_batch
from ds_cp.attention.kernels.cpu import CpuKernel
from ds_cp.attention.pages import Pages, PageShape
from ds_cp.attention.spec import LayerSpec
from ds_cp.attention.state import Partial
from ds_cp.layout import Block, Blocks
from tests.unit.attention.test_cpu_kernel import LIMIT, VARIANTS, make_kernel

# query heads of a KV head, KV heads, head dims of K and V, block size, window, soft cap
LAYERS = (
    (4, 8, 128, 128, 64, None, None),  # as long a stretch as the processor reads ahead by itself
    (1, 16, 64, 128, 64, None, 3.0),
    (3, 3, 64, 64, 16, 300, None),  # several blocks a step
    (2, 8, 128, 96, 48, None, None),
    (8, 16, 64, 64, 64, 500, None),  # more rows than a task takes
    (4, 2, 80, 80, 8, None, None),  # tiles are repacked, head by head
)
TOKENS = 13  # more rows than are few, with one head a KV head too
BEGIN, KEYS = 1800, 560  # positions on both sides of a split's end
CPU = torch.device("cpu")


@pytest.fixture(params=VARIANTS, ids=lambda v: v[0] + ("-brgemm" if v[1] else ""))
def kernel(request: pytest.FixtureRequest) -> CpuKernel:
    return make_kernel(*request.param)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", LIMIT, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("layer", LAYERS, ids=lambda x: "-".join(map(str, x[:5])))
@pytest.mark.usefixtures("threads")
def test_a_few_rows_have_the_bits_of_many(
    kernel: CpuKernel, layer: tuple[int, ...], dtype: torch.dtype
) -> None:
    if kernel.brgemm and dtype == torch.float32:
        pytest.skip("brgemm is for bf16 only: run the other variant")
    fold, heads, k_dim, v_dim, size, window, softcap = layer
    spec = LayerSpec(fold * heads, heads, k_dim, k_dim**-0.5, window, softcap, v_head_dim=v_dim)
    rng, gen = random.Random(7), torch.Generator().manual_seed(7)
    shape = PageShape.of(spec, size, dtype, True)
    begin, end = BEGIN // size * size, BEGIN + KEYS
    starts = [at for at in range(begin, end, size) if rng.random() < 0.9 or at + size > end]
    numbers = rng.sample(range(len(starts) + 2), len(starts))
    blocks = Blocks(
        [Block(n, at, min(size, end - at)) for n, at in zip(numbers, starts, strict=True)]
    )
    data = torch.randn(len(starts) + 2, shape.stride, generator=gen).to(dtype)
    q = torch.randn(TOKENS, spec.num_q_heads, k_dim, generator=gen).to(dtype)

    def rows(parts: list[tuple[int, int]]) -> Partial:
        """Tokens [low, high) of the last ones, each part a request of its own."""
        runs = [((end - TOKENS + low, high - low),) for low, high in parts]
        at = torch.cat([torch.arange(low, high) for low, high in parts])
        batch = make_batch([Part(run, blocks) for run in runs], CPU)
        pages = Pages(data, shape)
        return kernel.paged_attention(q[at], at + end - TOKENS, pages, batch, spec)

    torch.set_num_threads(1)
    many = rows([(0, TOKENS)])
    last = TOKENS - 1
    for count in (1, 2, 3, 7):
        torch.set_num_threads(count)
        for parts in ([(last, TOKENS)], [(0, 3)], [(last, TOKENS), (4, 5), (6, 8), (0, TOKENS)]):
            got = rows(parts)
            at = torch.cat([torch.arange(low, high) for low, high in parts])
            assert torch.equal(got.out, many.out[at]), (count, parts)
            assert torch.equal(got.lse, many.lse[at]), (count, parts)
