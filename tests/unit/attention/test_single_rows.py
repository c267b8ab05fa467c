"""Many decoding requests in one call, against fp64 attention of each alone; and what a request's
company and the place of its blocks must not change: a bit."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_cp.attention import LayerSpec
from ds_cp.attention.batch import Part, make_batch
from ds_cp.attention.kernels import PagedKernel, single_rows
from ds_cp.attention.kernels.single_rows import SingleRows
from ds_cp.attention.kernels.torch_ops import TorchKernel
from ds_cp.layout import Runs
from tests.helpers.paged import (
    LIMITS,
    Request,
    call,
    check,
    kernels,
    own_rows,
    request,
    stored,
)

HEADS = [(4, 4), (6, 2), (9, 3), (5, 1)]
D = 16
KERNELS = kernels()
HOW = "run `pytest -m gpu tests/unit/attention` on a machine with a CUDA device"


def decode(spec: LayerSpec, k_runs: Runs, dtype: torch.dtype, seed: int) -> Request:
    """The newest token of a sequence, its own key last."""
    last = max(start + length for start, length in k_runs) - 1
    return request(((last, 1),), k_runs, spec, dtype, seed)


@st.composite
def sequences(draw: st.DrawFn) -> list[Runs]:
    """Up to nine sequences; of some, this rank holds pieces."""
    found = []
    for _ in range(draw(st.integers(1, 9))):
        at, runs = 0, []
        for _ in range(draw(st.integers(1, 3))):
            at += draw(st.sampled_from([0, 0, 8, 40]))
            length = draw(st.integers(1, 40))
            runs.append((at, length))
            at += length
        found.append(tuple(runs))
    return found


@settings(max_examples=60)
@given(
    sequences(), st.sampled_from(HEADS), st.sampled_from(list(LIMITS)),
    st.one_of(st.none(), st.integers(1, 60)), st.sampled_from([4, 8, 64]),
)  # fmt: skip
def test_every_row_equals_fp64(
    runs: list[Runs], heads: tuple[int, int], dtype: torch.dtype, window: int | None, size: int
) -> None:
    spec = LayerSpec(*heads, D, 0.3, window)
    requests = [decode(spec, k_runs, dtype, seed) for seed, k_runs in enumerate(runs)]
    for kernel in KERNELS.values():
        if not kernel.refuses(spec, size, dtype):
            check(kernel, requests, spec, size)


LENGTHS = (3, 200, 170, 1, 190, 64, 65, 128)


@pytest.fixture(params=["reference", "sdpa", "cpu"])
def kernel(request: pytest.FixtureRequest) -> PagedKernel:
    if request.param not in KERNELS:
        pytest.skip(f"kernel {request.param} does not run here: run `python -m ds_cp.native` first")
    return KERNELS[request.param]


@pytest.mark.parametrize(("window", "softcap"), [(None, None), (None, 1.5), (33, None), (1, 2.0)])
@pytest.mark.parametrize("size", [1, 16, 64])
def test_rows_of_many_lengths(
    kernel: PagedKernel, window: int | None, softcap: float | None, size: int
) -> None:
    for dims in ((D, D), (24, D)):
        spec = LayerSpec(6, 2, dims[0], 0.3, window, softcap, v_head_dim=dims[1])
        many = [decode(spec, ((0, n),), torch.float32, n) for n in LENGTHS]
        check(kernel, many, spec, size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [1, 16, 64])
@pytest.mark.parametrize("window", [None, 70])
def test_company_changes_no_bit(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, size: int, window: int | None
) -> None:
    """Each request alone with its blocks in a row, and all of them in any order with theirs
    anywhere; copied or read where they lie, in pieces of any size."""
    spec = LayerSpec(6, 2, D, 0.3, window)
    many = [decode(spec, ((0, n),), dtype, n) for n in (*LENGTHS, 700)]
    alone = [own_rows(call(TorchKernel(), [r], spec, size, shuffle=False)) for r in many]
    for seed, (view, gathered) in enumerate(((1, 4 << 20), (1 << 40, 4 << 20), (1 << 40, 1))):
        monkeypatch.setattr(single_rows, "VIEW_BYTES", view)
        monkeypatch.setattr(single_rows, "GATHER_BYTES", gathered)
        order = random.Random(seed).sample(range(len(many)), len(many))
        prompt = request(((40, 9),), ((0, 49),), spec, dtype)
        for shuffle in (True, False):
            together = [many[i] for i in order] + [prompt]
            part = own_rows(call(TorchKernel(), together, spec, size, shuffle=shuffle))
            for row, i in enumerate(order):
                assert torch.equal(part.out[row], alone[i].out[0]), (i, view, shuffle)
                assert torch.equal(part.lse[row], alone[i].lse[0])


def plan_of(lengths: list[int], size: int, window: int | None, shuffle: bool) -> SingleRows:
    spec = LayerSpec(6, 2, D, 0.3, window)
    many = [decode(spec, ((0, n),), torch.float32, n) for n in lengths]
    pages, blocks = stored(TorchKernel(), many, spec, size, shuffle=shuffle)
    batch = make_batch(
        [Part(r.q_runs, mine) for r, mine in zip(many, blocks, strict=True)], torch.device("cpu")
    )
    return SingleRows(batch, torch.tensor([n - 1 for n in lengths]), pages.shape, spec)


def test_blocks_in_a_row_are_read_where_they_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    block_bytes = 64 * 2 * 2 * D * 4
    monkeypatch.setattr(single_rows, "VIEW_BYTES", 3 * block_bytes)
    monkeypatch.setattr(single_rows, "GATHER_BYTES", 2 * block_bytes)
    plan = plan_of([640, 64, 64], 64, None, shuffle=False)
    assert [(p.begin, p.end, p.number) for p in plan._pieces] == [(0, 12, 0)]
    pieces = plan_of([640, 64, 64], 64, None, shuffle=True)._pieces
    assert [(p.begin, p.end) for p in pieces if p.number < 0][0] == (0, 2)
    assert sum(p.end - p.begin for p in pieces) == 12


def test_a_window_reads_no_block_that_it_hides() -> None:
    assert plan_of([640, 64, 63], 64, None, True).num_chunks == 12
    assert plan_of([640, 64, 63], 64, 64, True).num_chunks == 3
    assert plan_of([640, 64, 63], 64, 65, True).num_chunks == 4


def test_small_blocks_share_chunks_that_begin_at_the_same_places() -> None:
    """Whatever blocks are there: chunks are cut at multiples of CHUNK_KEYS in positions."""
    owner = np.zeros(9, dtype=np.int64)
    firsts = np.array([0, 16, 48, 64, 80, 112, 128, 200, 208])
    chunk, slot = single_rows._chunks(owner, firsts, 4, 16)
    assert chunk.tolist() == [0, 0, 0, 1, 1, 1, 2, 3, 3]
    assert slot.tolist() == [0, 1, 2, 0, 1, 2, 0, 0, 1]
    many = np.arange(6)  # runs of one key each: more blocks than a chunk has slots
    chunk, slot = single_rows._chunks(np.zeros(6, dtype=np.int64), many, 4, 16)
    assert chunk.tolist() == [0, 0, 0, 0, 1, 1] and slot.tolist() == [0, 1, 2, 3, 0, 1]


def test_layers_of_different_widths_share_one_batch() -> None:
    """As in a model whose layers differ in heads, head size and window."""
    specs = [
        LayerSpec(4, 4, 8, 0.3),
        LayerSpec(6, 2, D, 0.3, 7),
        LayerSpec(6, 3, D, 0.3, 7, v_head_dim=8),
        LayerSpec(4, 4, 8, 0.3),
        LayerSpec(8, 2, D, 0.3, 7),
    ]
    lists = [[decode(spec, ((0, n),), torch.float32, n) for n in (20, 30)] for spec in specs]
    pools = [stored(TorchKernel(), many, s, 16) for many, s in zip(lists, specs, strict=True)]
    batch = make_batch(
        [Part(r.q_runs, mine) for r, mine in zip(lists[0], pools[0][1], strict=True)],
        torch.device("cpu"),
    )
    at = torch.tensor([19, 29])
    for spec, many, (pages, _) in zip(specs, lists, pools, strict=True):
        q = torch.cat([r.q for r in many])
        part = TorchKernel().paged_attention(q, at, pages, batch, spec)
        want = own_rows(call(TorchKernel(), many, spec, 16))
        assert torch.equal(part.out, want.out) and torch.equal(part.lse, want.lse)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason=f"no CUDA device: {HOW}")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (None, 1.5), (33, None)])
def test_on_cuda(dtype: torch.dtype, window: int | None, softcap: float | None) -> None:
    """Every kernel that runs there."""
    cuda = torch.device("cuda")
    for kernel in kernels(cuda).values():
        spec = LayerSpec(6, 2, 64, 0.3, window, softcap)
        if not kernel.refuses(spec, 16, dtype):
            many = [decode(spec, ((0, n),), dtype, n) for n in LENGTHS]
            check(kernel, many, spec, 16, cuda)
