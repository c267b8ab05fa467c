"""The CUDA kernel's choice of who computes what, on the CPU: the reference kernel over pages, an
emulated flash-attn for what is dense."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from ds_cp.attention.batch import Part, make_batch
from ds_cp.attention.kernels import cuda
from ds_cp.attention.kernels import dense as dense_module
from ds_cp.attention.kernels.choose import find_kernels, makers
from ds_cp.attention.kernels.cuda import CudaKernel
from ds_cp.attention.kernels.dense import Candidate, Dense, from_package
from ds_cp.attention.kernels.reference import ReferenceKernel
from ds_cp.attention.kernels.self_test import fault
from ds_cp.attention.pages import Fresh, Pages, PageShape, empty_pages
from ds_cp.attention.spec import LayerSpec
from ds_cp.attention.state import Partial, empty_partial
from ds_cp.comm.wire import World
from ds_cp.errors import ConfigError
from ds_cp.layout import Block, Blocks, Runs, positions, total
from ds_cp.sampling_params import SamplingParams
from ds_cp.topology.hosts import Topology
from tests.helpers import flash_attn
from tests.helpers.engines import engine_on, tiny_llama

CPU = torch.device("cpu")
BF16 = torch.bfloat16
SIZE = 16


class Watched:
    """An emulated operator that notes what it is asked for: (rows, keys, causal)."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int, bool]] = []
        self.seen: list[tuple[int, int]] = []  # where its keys and values lie
        self._dense = from_package(flash_attn.fa3)

    def load(self) -> Dense:
        def dense(q: Any, k: Any, v: Any, scale: float, causal: bool) -> Any:
            self.asked.append((len(q), len(k), causal))
            self.seen.append((k.data_ptr(), v.data_ptr()))
            return self._dense(q, k, v, scale, causal)

        return dense


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Squares and rectangles of a few rows are dense already."""
    monkeypatch.setattr(cuda, "SQUARE_ROWS", 3)
    monkeypatch.setattr(cuda, "EARLIER_KEYS", 2 * SIZE)
    monkeypatch.setattr(cuda, "SLICE_KEYS", 3 * SIZE)


def kernel_of(watched: Watched) -> CudaKernel:
    return CudaKernel(ReferenceKernel(), [Candidate("fa", watched.load)], CPU)


def layer(**changes: Any) -> LayerSpec:
    return LayerSpec(4, 2, 16, **{"scale": 0.25, **changes})


class Case:
    """Requests over pages of random keys: ``(first row's runs, keys)`` each, keys from 0 on unless
    given as runs; blocks out of order."""

    def __init__(self, requests: Sequence[tuple[Runs, Runs]], seed: int = 0) -> None:
        gen, rng = torch.Generator().manual_seed(seed), random.Random(seed)
        count = sum(-(-n // SIZE) + 1 for _, keys in requests for _, n in keys)
        numbers = rng.sample(range(count), count)
        self.shape = PageShape(SIZE, 2, 16, 16, BF16)
        self.pages = empty_pages(self.shape, count, CPU)
        rows = sum(total(q_runs) for q_runs, _ in requests)
        self.q, self.k, self.v = (
            torch.randn(heads, rows, 16, generator=gen).to(BF16).transpose(0, 1)
            for heads in (4, 2, 2)
        )
        self.q_positions = torch.tensor([p for q, _ in requests for p in positions(q)])
        parts, row = [], 0
        for q_runs, keys in requests:
            blocks = Blocks()
            for start, length in keys:
                at = start
                while at < start + length:
                    end = min((at // SIZE + 1) * SIZE, start + length)
                    blocks.append(numbers.pop(), at, end - at)
                    at = end
            fresh = {p: row + i for i, p in enumerate(positions(q_runs))}
            for number, first, held in zip(blocks.numbers, blocks.firsts, blocks.keys, strict=True):
                for place in range(held):  # new keys are the layer's, earlier ones random
                    if (mine := fresh.get(first + place)) is not None:
                        k, v = self.k[mine], self.v[mine]
                    else:
                        k, v = (torch.randn(2, 16, generator=gen).to(BF16) for _ in range(2))
                    self.pages.write(
                        k[None], v[None], torch.tensor([number]), torch.tensor([place])
                    )
            parts.append(Part(q_runs, blocks))
            row += total(q_runs)
        self.parts = parts
        self.batch = make_batch(parts, CPU)

    def to(self, device: torch.device) -> Case:
        """The same on another device."""
        for name in ("q", "k", "v", "q_positions"):
            setattr(self, name, getattr(self, name).to(device))
        self.pages = Pages(self.pages.data.to(device), self.shape)
        self.batch = make_batch(self.parts, device)
        return self

    def fresh(self) -> Pages:
        return Pages(self.pages.data, self.shape, Fresh(self.q, self.k, self.v))

    def run(
        self, kernel: Any, spec: LayerSpec, pages: Pages, into: Partial | None = None
    ) -> Partial:
        return kernel.paged_attention(
            self.q, self.q_positions, pages, make_batch(self.parts, self.q.device), spec, into
        )

    def check(self, kernel: CudaKernel, spec: LayerSpec, pages: Pages | None = None) -> None:
        want = self.run(ReferenceKernel(), spec, self.pages)
        got = self.run(kernel, spec, pages or self.pages)
        assert got.out.dtype == got.lse.dtype == torch.float32
        empty = torch.isneginf(want.lse)
        assert torch.equal(torch.isneginf(got.lse), empty)
        torch.testing.assert_close(got.out, want.out, atol=2e-2, rtol=0)
        torch.testing.assert_close(got.lse[~empty], want.lse[~empty], atol=2e-2, rtol=0)


def prompt(keys: int, start: int = 0) -> tuple[Runs, Runs]:
    return ((start, keys - start),), ((0, keys),)


@pytest.mark.parametrize("with_fresh", [True, False])
@pytest.mark.parametrize(
    ("requests", "asked"),
    [
        ([prompt(50)], [(50, 50, True)]),
        ([prompt(2)], []),
        ([prompt(41), prompt(9)], [(41, 41, True), (9, 9, True)]),
        ([prompt(60, 20)], [(40, 40, True)]),  # one whole earlier block: for the paged kernel
        ([prompt(60, 40)], [(20, 40, False), (20, 20, True)]),
        ([prompt(130, 101)], [(29, 48, False), (29, 48, False), (29, 5, False), (29, 29, True)]),
        ([prompt(30, 29), prompt(40), prompt(7, 6)], [(40, 40, True)]),  # beside decodes
        ([(((0, 16), (48, 16)), ((0, 16), (48, 16)))], [(16, 16, True), (16, 16, True)]),  # zigzag
        ([(((32, 20),), ((0, 40),))], []),  # some of its keys are elsewhere
        ([(((32, 20),), ((0, 16), (32, 20)))], [(20, 20, True)]),
        ([(((32, 20),), ())], []),
    ],
)
def test_who_computes_what(
    small: None, requests: Any, asked: list[tuple[int, int, bool]], with_fresh: bool
) -> None:
    case, watched = Case(requests), Watched()
    kernel = kernel_of(watched)
    assert kernel.refuses(layer(), SIZE, BF16) == "" and kernel.operator(layer(), BF16) == "fa"
    watched.asked.clear()
    case.check(kernel, layer(), case.fresh() if with_fresh else None)
    assert watched.asked == asked


def test_fresh_keys_are_read_where_the_layer_left_them(small: None) -> None:
    case, watched = Case([prompt(30), prompt(90, 40)]), Watched()
    case.check(kernel_of(watched), layer(), case.fresh())
    causal = [at for at, (_, _, how) in zip(watched.seen, watched.asked, strict=True) if how][-2:]
    assert causal == [(case.k[row:].data_ptr(), case.v[row:].data_ptr()) for row in (0, 30)]
    other = Pages(case.pages.data, case.shape, Fresh(case.q.clone(), case.v, case.k))
    case.check(kernel_of(watched), layer(), other)  # of other queries: not looked at


@pytest.mark.parametrize("window", [1, 16, 29, 30, 31, 60, 500])
def test_windows_are_never_a_dense_operators(small: None, window: int) -> None:
    """Only where it hides nothing: a square that is no longer than the window."""
    case, watched = Case([prompt(30), prompt(75, 45), prompt(20, 19)]), Watched()
    case.check(kernel_of(watched), layer(window=window))
    squares = [asked for asked in watched.asked[4:]]  # behind those of the check at start
    assert squares == ([(30, 30, True), (30, 30, True)] if window >= 30 else [])


def test_layers_without_an_operator_are_the_paged_kernels(small: None) -> None:
    case, watched = Case([prompt(50)]), Watched()
    case.check(kernel_of(watched), layer(softcap=5.0), case.fresh())
    assert watched.asked == []
    case.check(CudaKernel(ReferenceKernel(), (), CPU), layer(), case.fresh())


def test_into_and_rows_of_nobody(small: None) -> None:
    """Folded into what is there; the same whether the partial is given or made."""
    case, watched = Case([prompt(50), prompt(70, 50)]), Watched()
    kernel, spec = kernel_of(watched), layer()
    before = empty_partial(len(case.q), 4, 16)
    before.out[::2], before.lse[::2] = 0.5, 1.0
    want = Partial(before.out.clone(), before.lse.clone())
    case.run(ReferenceKernel(), spec, case.pages, want)
    got = case.run(kernel, spec, case.fresh(), before)
    assert got is before
    torch.testing.assert_close(got.out, want.out, atol=2e-2, rtol=0)
    torch.testing.assert_close(got.lse, want.lse, atol=2e-2, rtol=0)


def test_the_self_test_of_every_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """With squares of two rows nearly every case has one."""
    monkeypatch.setattr(cuda, "SQUARE_ROWS", 2)
    monkeypatch.setattr(cuda, "EARLIER_KEYS", 1)
    watched = Watched()
    assert fault(kernel_of(watched), [layer()], SIZE, BF16, CPU) == ""
    assert len(watched.asked) > 30


class NoEarlier(CudaKernel):
    def _fold(self, square: Any, *given: Any) -> None:
        super()._fold(square._replace(earlier=None), *given)


class StaleFresh(CudaKernel):
    """Reads what the layer left one row off."""

    def paged_attention(self, q: Any, at: Any, pages: Any, *given: Any) -> Any:
        if pages.fresh is not None:
            fresh = pages.fresh._replace(v=pages.fresh.v.roll(1, 0))
            pages = Pages(pages.data, pages.shape, fresh)
        return super().paged_attention(q, at, pages, *given)


class WrongWhole(CudaKernel):
    def prefill(self, *given: Any) -> Any:
        found = super().prefill(*given)
        return None if found is None else found.flip(1)


class NoSlices(CudaKernel):
    """Of many earlier keys only the first copy."""

    def _fold(self, square: Any, *given: Any) -> None:
        if square.earlier is not None:
            first, entries, keys = square.earlier
            entries, keys = min(entries, 4), min(keys, 4 * SIZE)
            square = square._replace(earlier=(first, entries, keys))
        super()._fold(square, *given)


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        (CudaKernel, ""), (NoEarlier, "many rows behind"), (NoSlices, "many rows behind"),
        (StaleFresh, "many rows "), (WrongWhole, "many rows "),
    ],
)  # fmt: skip
def test_the_self_test_reaches_every_dense_way(
    kind: type[CudaKernel], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With more rows than any other case has."""
    monkeypatch.setattr(cuda, "SQUARE_ROWS", 90)
    monkeypatch.setattr(cuda, "EARLIER_KEYS", 128)
    monkeypatch.setattr(cuda, "SLICE_KEYS", 4 * SIZE)
    watched = Watched()
    kernel = kind(ReferenceKernel(), [Candidate("fa", watched.load)], CPU)
    kernel.refuses(layer(), SIZE, BF16)
    watched.asked.clear()
    problem = fault(kernel, [layer()], SIZE, BF16, CPU)
    assert problem.startswith(f"it is wrong by {problem.split()[4]} for {says}") if says else (
        problem == ""
    )  # fmt: skip
    if not says:
        assert {how for rows, _, how in watched.asked if rows in (90, 103)} == {True, False}


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [(32, 8), (9, 3), (4, 4)])
@pytest.mark.parametrize("dim", [64, 128])
def test_the_self_test_on_a_gpu(heads: tuple[int, int], dim: int) -> None:
    device, spec = torch.device("cuda"), LayerSpec(*heads, dim, dim**-0.5)
    kernel = makers(device)["cuda"](device, BF16)
    assert isinstance(kernel, CudaKernel) and kernel.operator(spec, BF16)
    assert fault(kernel, [spec], SIZE, BF16, device) == ""


@pytest.mark.gpu
@pytest.mark.parametrize("with_fresh", [True, False])
@pytest.mark.parametrize(
    "requests",
    [
        [prompt(300)],
        [prompt(700), prompt(40, 39), prompt(256)],
        [prompt(700, 300)],
        [prompt(5000, 4500), prompt(900)],
        [(((0, 304), (608, 304)), ((0, 304), (608, 304)))],
    ],
)
def test_who_computes_what_on_a_gpu(requests: Any, with_fresh: bool) -> None:
    """The real sizes and a real operator, in bf16."""
    device = torch.device("cuda")
    case, kernel = Case(requests).to(device), makers(device)["cuda"](device, BF16)
    assert isinstance(kernel, CudaKernel) and kernel.operator(layer(), BF16)
    case.check(kernel, layer(), case.fresh() if with_fresh else None)
    case.check(kernel, layer(window=400))
    if with_fresh:
        got = kernel.prefill(case.q, case.k, case.v, case.batch, layer(), SIZE)
        whole = all(q_runs == keys and len(keys) == 1 for q_runs, keys in requests)
        assert (got is not None) == (whole and all(n >= 256 for ((_, n),), _ in requests))
        if got is not None:
            want = case.run(ReferenceKernel(), layer(), case.pages)
            torch.testing.assert_close(got.float(), want.out, atol=2e-2, rtol=0)


def test_steps_of_whole_prompts_spare_the_partial(small: None) -> None:
    watched = Watched()
    kernel, spec = kernel_of(watched), layer()
    case = Case([prompt(50), prompt(17)])
    got = kernel.prefill(case.q, case.k, case.v, case.batch, spec, SIZE)
    want = case.run(ReferenceKernel(), spec, case.pages)
    assert got is not None and got.dtype == BF16 and got.shape == (67, 4, 16)
    torch.testing.assert_close(got.float(), want.out, atol=2e-2, rtol=0)
    for requests, changes in (
        ([prompt(50), prompt(70, 50)], {}),  # earlier keys
        ([prompt(50), prompt(2)], {}),  # too few rows
        ([prompt(50)], {"sinks": torch.zeros(4)}),
        ([prompt(50)], {"window": 30}),
        ([prompt(50)], {"softcap": 4.0}),
    ):
        other = Case(requests)
        batch = other.batch
        found = kernel.prefill(other.q, other.k, other.v, batch, layer(**changes), SIZE)
        assert found is None, (requests, changes)
    assert kernel.prefill(case.q[:60], case.k, case.v, case.batch, spec, SIZE) is None


def test_a_plan_is_made_once_for_a_window(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    case, kernel, made = Case([prompt(50)]), kernel_of(Watched()), []
    real = cuda._make_plan
    monkeypatch.setattr(cuda, "_make_plan", lambda *a: made.append(a[1]) or real(*a))
    for spec in (layer(), layer(window=60), layer(), layer(window=60), layer(window=8)):
        kernel.paged_attention(case.q, case.q_positions, case.pages, case.batch, spec)
    assert made == [None, 60, 8]


def test_layers_alike_but_for_values_or_dtype_have_verdicts_of_their_own() -> None:
    kernel = kernel_of(Watched())
    assert kernel.operator(layer(v_head_dim=32), BF16) == ""
    assert kernel.operator(layer(), BF16) == "fa"
    assert kernel.operator(layer(), torch.float32) == ""
    assert kernel.operator(layer(), BF16) == "fa"


def test_any_layout(small: None) -> None:
    """Chunks that begin anywhere, several runs, keys that are partly elsewhere."""
    rng = random.Random(7)
    for seed in range(24):
        requests: list[tuple[Runs, Runs]] = []
        for _ in range(rng.randint(1, 3)):
            keys = rng.randint(1, 120)
            start = rng.randrange(keys)
            if rng.random() < 0.5:
                requests.append(prompt(keys, start))
                continue
            cuts = sorted(rng.sample(range(keys + 1), min(4, keys + 1) // 2 * 2))
            runs = tuple((a, b - a) for a, b in zip(cuts[::2], cuts[1::2], strict=True))
            held = ((0, keys),) if rng.random() < 0.5 else runs
            requests.append((runs, held))
        case = Case(requests, seed)
        spec = layer(window=rng.choice([None, None, 5, 40]))
        case.check(kernel_of(Watched()), spec, case.fresh() if rng.random() < 0.5 else None)


def test_it_is_the_first_choice_on_cuda_unless_rows_must_not_depend_on_chunks() -> None:
    device = torch.device("cuda")
    assert list(makers(device))[:2] == ["cuda", "triton"]
    with pytest.raises(ConfigError, match="or to one of triton, reference$"):
        find_kernels("cuda", device, BF16, [layer()], SIZE, deterministic=True)


def test_an_engine_gives_the_same_tokens(monkeypatch: pytest.MonkeyPatch, small: None) -> None:
    """Whole prompts, later chunks beside decodes, shared prefixes. In fp32, so that rounding
    decides nothing."""
    calls: list[bool] = []

    def exact(q: Any, k: Any, v: Any, scale: float, causal: bool) -> Any:
        calls.append(causal)
        seen = torch.ones(len(q), len(k), dtype=torch.bool)
        out, lse = flash_attn._attend(q, k, v, seen.tril() if causal else seen, scale)
        return out, lse.transpose(0, 1)

    def tokens(dense: bool) -> list[Any]:
        world = World(0, Topology(("here",)), CPU, 60.0, joined=False)
        config = {
            "kv_cache": {"tokens_per_rank": 2048, "block_size": SIZE},
            "attention": {"backend": "reference"},
            "scheduler": {"max_num_batched_tokens": 96},
        }
        engine = engine_on(world, tiny_llama(initializer_range=0.2), config)
        if dense:
            kernel = CudaKernel(ReferenceKernel(), [Candidate("fp64", lambda: exact)], CPU)
            object.__setattr__(engine._worker.layers, "kernel", kernel)
        common = [(5 * i) % 128 for i in range(150)]
        found = []
        for prompts in ([[1] * 40, [2, 3] * 20], [common], [[*common, 7, 8, 9, 10], [4] * 33]):
            params = SamplingParams(max_tokens=6, temperature=0.0)
            found += [o.outputs[0].token_ids for o in engine.generate(prompts, params)]
        return found

    monkeypatch.setitem(dense_module.LIMIT, torch.float32, 1e-5)
    plain = tokens(False)
    assert not calls
    whole = counted(monkeypatch, "prefill")
    assert tokens(True) == plain
    assert True in calls and False in calls and any(whole)


def counted(monkeypatch: pytest.MonkeyPatch, name: str) -> list[bool]:
    """Whether each call of that method gave something."""
    real, found = getattr(CudaKernel, name), []

    def call(*args: Any) -> Any:
        result = real(*args)
        found.append(result is not None)
        return result

    monkeypatch.setattr(CudaKernel, name, call)
    return found


def test_blocks_are_cut_at_a_position() -> None:
    blocks = Blocks([Block(5, 0, 16), Block(2, 16, 16), Block(9, 40, 8)])
    for position in range(50):
        cut = cuda._before(blocks, position)
        assert cut.runs() == tuple(
            (s, min(n, position - s)) for s, n in blocks.runs() if s < position
        )
        assert cut.num_keys == sum(cut.keys)
    assert blocks.num_keys == 40
