"""What the Triton kernels are asked in tests, on any device: on a GPU as they are, on a CPU by
Triton's interpreter, which has to be chosen before triton is imported:
``TRITON_INTERPRET=1 python -m tests.helpers.triton_cases GROUP``.
"""

from __future__ import annotations

import itertools
import random
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import torch

from ds_cp.attention import LayerSpec
from ds_cp.attention.batch import Block, Blocks, Part, make_batch
from ds_cp.attention.kernels import self_test, triton_decode
from ds_cp.attention.kernels.triton_kernel import TritonKernel
from ds_cp.attention.kernels.triton_merge import merge_stacked
from ds_cp.attention.pages import Pages, PageShape, empty_pages
from ds_cp.attention.state import Partial, empty_partial
from ds_cp.attention.wireform import new_rows
from ds_cp.layout import Runs, positions, total
from ds_cp.model.invariant import make_invariant, restore_layers
from ds_cp.model.triton_linear import TritonLinear
from ds_cp.model.triton_norm import TritonNorm
from tests.helpers.oracle import full_attention

# Largest error of out, relative to the largest reference value; 2 ulps at that scale for halves.
LIMITS = {torch.float32: 2e-6, torch.bfloat16: 2 * 2**-8, torch.float16: 2 * 2**-11}
NAN = float("nan")


@dataclass(frozen=True)
class Request:
    """Queries at ``rows`` over the keys at ``keys``, whose blocks begin with each run; every
    ``step``-th block is here."""

    rows: Runs
    keys: Runs
    step: int = 1


@dataclass(frozen=True)
class Asked:
    """One call, and the layer that asks it."""

    requests: tuple[Request, ...]
    heads: tuple[int, int] = (4, 2)
    dims: tuple[int, int] = (32, 32)
    dtype: torch.dtype = torch.float32
    size: int = 16
    window: int | None = None
    softcap: float | None = None
    into: bool = False
    programs: int = 2048
    split: int = 512  # positions
    spec: LayerSpec = field(init=False)

    def __post_init__(self) -> None:
        spec = LayerSpec(
            *self.heads, self.dims[0], self.dims[0] ** -0.5, self.window, self.softcap,
            v_head_dim=self.dims[1],
        )  # fmt: skip
        object.__setattr__(self, "spec", spec)


def prompt(length: int, past: int = 0) -> Request:
    return Request(((past, length),), ((0, past + length),))


def decode(keys: int, rows: int = 1) -> Request:
    return Request(((keys - rows, rows),), ((0, keys),))


FAR = 3 * 2**20 + 5
ASKED = {
    "prompt and decodes, 3 heads a KV head, D 80": Asked(
        (decode(40), prompt(60), Request((), ((0, 20),)), decode(7), Request(((3, 2),), ())),
        (6, 2), (80, 80),
    ),
    "window, values narrower, one head a KV head": Asked(
        (prompt(70), decode(45)), (2, 2), (96, 64), torch.bfloat16, window=19
    ),
    "V wider than K, blocks of 32, cap": Asked(
        (prompt(80, 50), decode(33)), (8, 1), (16, 48), torch.float16, 32, softcap=3.0
    ),
    "blocks larger than key tiles": Asked((prompt(90, 130), decode(200, 2)), (2, 1), size=128),
    "blocks of 4": Asked((prompt(50), decode(70)), size=4, into=True),
    "three splits, few programs": Asked(
        (decode(301), decode(160, 3), decode(5)), (8, 2), size=64, into=True, programs=3, split=128
    ),
    "every third block, merged with what was there": Asked(
        (Request(((900, 40), (990, 30)), ((0, 1020),), 3), Request(((700, 1),), ((0, 701),), 3)),
        (8, 2), dtype=torch.bfloat16, size=16, into=True,
    ),
    "far keys, runs that begin anywhere, band": Asked(
        (
            Request(((FAR + 30, 50),), ((FAR, 37), (FAR + 41, 20))),
            Request(((FAR + 90, 1),), ((FAR - 7, 60), (FAR + 80, 30))),
        ),
        (4, 4), window=40,
    ),
    "keys of the future only": Asked(
        (Request(((0, 40),), ((40, 20),)), Request(((3, 1),), ((9, 4),))), (4, 1)
    ),
    "40 heads of one KV head": Asked((decode(50), prompt(9)), (40, 1), (16, 16)),
}  # fmt: skip


@dataclass(frozen=True)
class Built:
    """The tensors of one call. Slots that belong to no block of it hold NaN."""

    pages: Pages
    q: torch.Tensor
    q_positions: torch.Tensor
    parts: tuple[Part, ...]
    keys: tuple[torch.Tensor, ...]
    values: tuple[torch.Tensor, ...]
    places: tuple[torch.Tensor, ...]


def build(asked: Asked, device: torch.device, lead: int = 3) -> Built:
    gen = torch.Generator().manual_seed(3)
    heads, groups = asked.heads
    shape = PageShape(asked.size, groups, *asked.dims, asked.dtype)
    chosen = [_blocks(request, asked.size) for request in asked.requests]
    numbers = list(range(1, sum(map(len, chosen)) + 2))
    random.Random(1).shuffle(numbers)
    room = torch.full((len(numbers) + 1, 2 * shape.stride), NAN, dtype=asked.dtype, device=device)
    pages = Pages(room[:, shape.stride // 2 : shape.stride // 2 + shape.stride], shape)
    parts, keys, values, places = [], [], [], []
    for request, blocks in zip(asked.requests, chosen, strict=True):
        named = Blocks(Block(numbers.pop(), first, count) for first, count in blocks)
        places.append(torch.tensor([f + j for f, n in blocks for j in range(n)], dtype=torch.int64))
        shapes = [(len(places[-1]), groups, dim) for dim in asked.dims]
        k, v = (torch.randn(s, generator=gen).to(asked.dtype) for s in shapes)
        keys.append(k)
        values.append(v)
        pages.data[torch.tensor(named.numbers, dtype=torch.int64, device=device)] = 0.0
        slots = [(block.number, j) for block in named for j in range(block.keys)]
        at = torch.tensor(slots, dtype=torch.int64, device=device).view(-1, 2)
        TritonKernel().write(pages, k.to(device), v.to(device), at[:, 0].clone(), at[:, 1].clone())
        parts.append(Part(request.rows, named))
    rows = [p for request in asked.requests for p in positions(request.rows)]
    q = torch.randn(len(rows) + 2 * lead, heads, asked.dims[0], generator=gen).to(asked.dtype)
    at_rows = torch.tensor([0] * lead + rows + [0] * lead, device=device)
    return Built(pages, q.to(device), at_rows, tuple(parts), *map(tuple, (keys, values, places)))


def _blocks(request: Request, size: int) -> list[tuple[int, int]]:
    cut = [(s + at, min(size, n - at)) for s, n in request.keys for at in range(0, n, size)]
    return cut[:: request.step]


def run(asked: Asked, built: Built, into: Partial | None, lead: int = 3) -> Partial:
    batch = make_batch(built.parts, built.q.device, lead)
    with mock.patch.multiple(triton_decode, PROGRAMS=asked.programs, SPLIT=asked.split):
        return TritonKernel().paged_attention(
            built.q, built.q_positions, built.pages, batch, asked.spec, into
        )


def check_attention(asked: Asked, device: torch.device) -> None:
    """Against fp64 of the same (rounded) inputs, merged in fp64 with what was there."""
    built, lead = build(asked, device), 3
    into = None
    if asked.into:
        into = empty_partial(len(built.q), asked.heads[0], asked.dims[1], device)
        into.out[::2], into.lse[::2] = 0.25, 0.5
        into.out[1::2] = NAN  # an empty side may hold anything
        before = Partial(into.out.cpu().double(), into.lse.cpu().double())
    got = run(asked, built, into)
    assert got.out.dtype == got.lse.dtype == torch.float32
    got = Partial(got.out.cpu().double(), got.lse.cpu().double())
    row = lead
    for request, k, v, at in zip(
        asked.requests, built.keys, built.values, built.places, strict=True
    ):
        rows = slice(row, row + total(request.rows))
        row = rows.stop
        q, q_pos = built.q[rows].cpu(), built.q_positions[rows].cpu()
        out, lse = full_attention(
            q, k, v, q_pos, at, scale=asked.spec.scale, window=asked.window, softcap=asked.softcap
        )
        if asked.into:
            both = torch.logaddexp(before.lse[rows], lse)
            safe = both.masked_fill(both.isneginf(), 0.0)
            weights = (before.lse[rows] - safe).exp(), (lse - safe).exp()
            there = before.out[rows].nan_to_num(0.0)
            out = there * weights[0].unsqueeze(-1) + out * weights[1].unsqueeze(-1)
            lse = both
        same(Partial(got.out[rows], got.lse[rows]), Partial(out, lse), LIMITS[asked.dtype])
    others = [*range(lead), *range(row, len(built.q))]
    if asked.into:
        assert torch.equal(got.lse[others], before.lse[others])
    else:
        assert bool(got.lse[others].isneginf().all()) and not bool(got.out[others].any())


def same(got: Partial, want: Partial, limit: float) -> None:
    empty = want.lse.isneginf()
    assert torch.equal(got.lse.isneginf(), empty)
    assert not bool(got.out[empty].any())
    if bool(empty.all()):
        return
    error = float((got.out - want.out).abs().max() / want.out.abs().max())
    assert error <= limit, error
    lse = float((got.lse - want.lse)[~empty].abs().max() / want.lse[~empty].abs().max().clamp(1.0))
    assert lse <= (5e-6 if limit < 1e-5 else 1e-2), lse


def check_self_test(device: torch.device) -> None:
    """The start's own check; where it is interpreted with fewer keys, 8 query heads a KV head only,
    and each kind of call alone or folded in turn: the cases above have the other numbers."""

    def in_turn(size: int, own: Sequence[int] = ()) -> list[self_test.Case]:
        return [
            replace(case, alone=number % 2 == 0, folded=number % 2 == 1)
            for number, case in enumerate(all_cases(size, own))
        ]

    layer, all_cases = LayerSpec(8, 1, 16, 0.25), self_test.cases
    fewer = {"FAR": 70, "GROUPS": {8: 1}, "DEEP": 100, "DEEP_ROWS": 9, "cases": in_turn}
    small = mock.patch.multiple(self_test, **fewer) if device.type == "cpu" else nullcontext()
    with small:
        assert self_test.fault(TritonKernel(), [layer], 16, torch.float32, device) == ""


def check_company(device: torch.device) -> None:
    """A request's bits alone, among others, over fewer programs, and over a list of blocks cut
    where its window begins."""
    wanted = Request(((330, 2),), ((0, 332),))
    shared: Any = {"heads": (2, 1), "dtype": torch.float16, "split": 64}
    for window in (None, 200):
        alone = Asked((wanted,), window=window, **shared)
        built = build(alone, device)
        one = run(alone, built, None)
        few = run(Asked((wanted,), window=window, programs=2, **shared), built, None)
        assert torch.equal(one.out, few.out) and torch.equal(one.lse, few.lse)
        blocks = built.parts[0].blocks
        seen = blocks if window is None else blocks.within(330 - window + 1, 400)
        parts = (
            Part(((40, 1),), blocks[:3]), Part(wanted.rows, seen), Part(((20, 9),), blocks[:2]),
        )  # fmt: skip
        at = torch.tensor([0] * 3 + [40, 330, 331] + [*range(20, 29)], device=device)
        q = torch.zeros(len(at), *built.q.shape[1:], dtype=built.q.dtype, device=device)
        q[4:6] = built.q[3:5]
        among = Built(built.pages, q, at, parts, (), (), ())
        got = run(alone, among, None)
        assert torch.equal(got.out[4:6], one.out[3:5]), window
        assert torch.equal(got.lse[4:6], one.lse[3:5]), window


def check_deterministic(device: torch.device) -> None:
    """A prompt in one piece and in pieces of any length, one row among them: the same bits."""
    gen = torch.Generator().manual_seed(2)
    spec, length = LayerSpec(2, 1, 16, 0.25), 40
    pages = empty_pages(PageShape(16, 1, 16, 16, torch.float16), 3, device)
    k, v, q = (torch.randn(length, n, 16, generator=gen).half().to(device) for n in (1, 1, 2))
    at = torch.arange(length, device=device)
    kernel = TritonKernel(deterministic=True)
    kernel.write(pages, k, v, at // 16, at % 16)
    blocks = Blocks(Block(i, 16 * i, min(16, length - 16 * i)) for i in range(3))
    found = []
    for cuts in ((0, length), (0, 1, 23, 39, length)):
        parts = []
        for low, high in itertools.pairwise(cuts):
            batch = make_batch([Part(((low, high - low),), blocks)], device)
            parts.append(kernel.paged_attention(q[low:high], at[low:high], pages, batch, spec))
        found.append(torch.cat([part.out for part in parts]))
    assert torch.equal(*found)


def check_merge(device: torch.device) -> None:
    """Four partials into rows of a running one, with empty sides that hold NaN, against fp64; all
    rows; views of what came over a wire."""
    gen = torch.Generator().manual_seed(1)
    heads, dim, rows = 3, 24, torch.tensor([6, 0, 3, 9, 4])
    for dtype, where in ((torch.float32, rows), (torch.bfloat16, rows), (torch.float32, None)):
        count = 10 if where is None else len(rows)
        out = torch.randn(4, count, heads, dim, generator=gen).to(dtype)
        lse = 5 * torch.randn(4, count, heads, generator=gen)
        lse[torch.rand(lse.shape, generator=gen) < 0.4] = -torch.inf
        lse[:, 0], lse[:, 1, 0] = -torch.inf, torch.tensor([-200.0, 150.0, -torch.inf, 149.0])
        out[lse.isneginf()] = NAN
        into = Partial(
            torch.randn(10, heads, dim, generator=gen), torch.randn(10, heads, generator=gen)
        )
        into.lse[3], into.out[3] = -torch.inf, NAN
        into.lse[0] = -torch.inf
        all_rows = rows if where is not None else torch.arange(10)
        sides = torch.cat([into.lse[all_rows][None].double(), lse.double()])
        values = torch.cat([into.out[all_rows][None].double(), out.double()])
        weights = torch.softmax(sides, 0).nan_to_num(0.0).unsqueeze(-1)
        want = Partial((values.nan_to_num(0.0) * weights).sum(0), torch.logsumexp(sides, 0))
        wire = torch.full((4, count, heads, dim + 5), NAN, dtype=dtype)
        wire[..., 5:] = out
        merged = Partial(into.out.to(device, copy=True), into.lse.to(device, copy=True))
        index = None if where is None else where.to(device)
        merge_stacked(merged, wire.to(device)[..., 5:], lse.to(device), index)
        got = Partial(merged.out.cpu().double(), merged.lse.cpu().double())
        same(Partial(got.out[all_rows], got.lse[all_rows]), want, 2e-6)
        others = [r for r in range(10) if r not in all_rows.tolist()]
        assert torch.equal(got.lse[others], into.lse[others].double())


def check_answers(device: torch.device) -> None:
    """Rows on the wire of three ranks folded by one call, and one by one: the same bits."""
    gen, heads, dim = torch.Generator().manual_seed(6), 3, 24
    spec, kernel = LayerSpec(heads, 1, dim, 0.2), TritonKernel()
    for dtype in (torch.bfloat16, torch.float32):
        packed = new_rows(3 * 5, spec, dtype, torch.empty(0, device=device)).view(3, 5, -1)
        for rows in packed:
            out = torch.randn(5, heads, dim, generator=gen)
            lse = 5 * torch.randn(5, heads, generator=gen)
            lse[2], lse[4, 1] = -torch.inf, -torch.inf
            part = Partial(out.to(device), lse.to(device))
            kernel.packing(part, dtype, rows)()
        base = torch.randn(9, heads, dim, generator=gen), torch.randn(9, heads, generator=gen)
        for where in (2, torch.tensor([7, 0, 3, 8, 1], device=device)):
            ours, theirs = (Partial(*(x.to(device, copy=True) for x in base)) for _ in range(2))
            cut, to = slice(1, 5), where + 1 if isinstance(where, int) else where[1:]
            kernel.merging(packed[:, cut], dtype, to, heads, dim)(ours)()
            for rows in packed:
                kernel.merging(rows[cut], dtype, to, heads, dim)(theirs)()
            assert torch.equal(ours.out, theirs.out) and torch.equal(ours.lse, theirs.lse)
            assert not torch.equal(ours.out.cpu(), base[0])


def check_write(device: torch.device) -> None:
    """Bit by bit what indexing stores, from any strides, and nothing beside it."""
    for dtype, dims in ((torch.bfloat16, (20, 36)), (torch.float32, (16, 16))):
        shape = PageShape(8, 3, *dims, dtype)
        room = torch.arange(12 * (shape.stride + 64), device=device).remainder(64)
        room = room.to(dtype).view(12, -1)
        ours, theirs = (Pages(room.clone()[:, 32 : 32 + shape.stride], shape) for _ in range(2))
        k = torch.randn(3, 70, dims[0], device=device).to(dtype).transpose(0, 1)
        v = torch.randn(70, 3, dims[1] + 3, device=device).to(dtype)[..., 3:]
        slots = torch.randperm(12 * 8, generator=torch.Generator().manual_seed(0))[:70].to(device)
        TritonKernel().write(ours, k, v, slots // 8, slots % 8)
        theirs.write(k, v, slots // 8, slots % 8)
        bits = torch.int16 if dtype is torch.bfloat16 else torch.int32
        assert torch.equal(ours.data.view(bits), theirs.data.view(bits))


def check_large_pool(device: torch.device) -> None:
    """Pages and offsets beyond 2^31 elements: rows so far apart that 32 bits do not reach."""
    shape = PageShape(16, 2, 16, 16, torch.float16)
    room = torch.empty(2**32 + 2**20, dtype=torch.float16, device=device)  # touched where written
    pages = Pages(room.as_strided((9, shape.stride), (2**29, 1), 64), shape)
    gen = torch.Generator().manual_seed(4)
    k, v = (torch.randn(48, 2, 16, generator=gen).half().to(device) for _ in range(2))
    q = torch.randn(41, 4, 16, generator=gen).half().to(device)
    blocks = Blocks(Block(n, 16 * i, 16) for i, n in enumerate((8, 5, 7)))
    numbers = torch.tensor(blocks.numbers, device=device).repeat_interleave(16)
    TritonKernel().write(pages, k, v, numbers, torch.arange(48, device=device) % 16)
    at = torch.tensor([*range(8, 48), 47], device=device)
    batch = make_batch((Part(((8, 40),), blocks), Part(((47, 1),), blocks)), device)
    spec = LayerSpec(4, 2, 16, 0.25)
    got = TritonKernel().paged_attention(q, at, pages, batch, spec)
    out, lse = full_attention(*(x.cpu() for x in (q, k, v, at)), torch.arange(48), scale=0.25)
    same(Partial(got.out.cpu().double(), got.lse.cpu().double()), Partial(out, lse), 2 * 2**-11)


def check_linear(device: torch.device) -> None:
    """Rows are the same bits for every number of rows, wherever they are among these; near fp64."""
    gen = torch.Generator().manual_seed(3)
    for dtype, depth, columns, bias in (
        (torch.float32, 80, 70, True), (torch.bfloat16, 200, 130, False),
        (torch.float16, 64, 1, True),
    ):  # fmt: skip
        layer = torch.nn.Linear(depth, columns, bias=bias)
        for parameter in layer.parameters():
            parameter.data = torch.randn(parameter.shape, generator=gen)
        layer = layer.to(device, dtype)
        x = torch.randn(1, 70, depth, generator=gen).to(device, dtype)
        linear = TritonLinear(layer, interpreted=device.type == "cpu")
        with torch.inference_mode():
            got = linear(x)
            want = layer.double()(x.double())
            layer.to(dtype)
            for first, end in [(0, 1), (0, 2), (5, 21), (3, 36), (33, 34), (1, 70)]:
                assert torch.equal(linear(x[:, first:end]), got[:, first:end]), (first, end)
            assert linear(x[:, :0]).shape == (1, 0, columns)
        error = float((got.double() - want).abs().max() / want.abs().max())
        assert got.dtype == dtype and error <= LIMITS[dtype], (dtype, error)


def check_norm(device: torch.device) -> None:
    """The same of RMS norms."""
    gen = torch.Generator().manual_seed(4)
    for dtype in (torch.float32, torch.bfloat16):
        weight = torch.randn(96, generator=gen).to(device, dtype)
        x = torch.randn(40, 96, generator=gen).to(device, dtype)
        norm = TritonNorm(weight, 1e-5, False, True, torch.nn.Identity())
        got = norm(x)
        wide = x.double()
        want = wide / (wide.square().mean(-1, True) + 1e-5).sqrt() * (1 + weight.double())
        assert float((got - want).abs().max() / want.abs().max()) <= LIMITS[dtype]
        for first, end in ((0, 1), (7, 24), (1, 40)):
            assert torch.equal(norm(x[first:end]), got[first:end])


def check_model(device: torch.device) -> None:
    """A decoder's layers, found and replaced: its logits to rounding; through the layers a row's
    bits are those alone; and given back."""
    from tests.helpers.engines import tiny_llama

    model = tiny_llama().to(device)
    ids = torch.arange(24, device=device)[None]
    with torch.inference_mode():
        want = model(ids).logits
        line = make_invariant(model, interpreted=device.type == "cpu")
        got = model(ids).logits
        layer = model.model.layers[0]
        x = torch.randn(1, 50, 64, generator=torch.Generator().manual_seed(8)).to(device)
        many = layer.mlp(layer.input_layernorm(x))
        for row in (0, 31, 32, 49):
            one = layer.mlp(layer.input_layernorm(x[:, row : row + 1]))
            assert torch.equal(one, many[:, row : row + 1]), row
    assert line == "15 linear layers and 5 RMS norms by Triton, rows alike in any number", line
    assert float((got - want).abs().max() / want.abs().max()) < 1e-5
    restore_layers(model)
    assert not any("forward" in module.__dict__ for module in model.modules())


Check = Callable[[torch.device], None]
GROUPS: dict[str, dict[str, Check]] = {
    "attention": {
        name: lambda device, asked=asked: check_attention(asked, device)
        for name, asked in ASKED.items()
    },
    "others": {
        "self-test": check_self_test,
        "company": check_company,
        "deterministic": check_deterministic,
        "merge": check_merge,
        "answers of ranks": check_answers,
        "write": check_write,
        "linear": check_linear,
        "norm": check_norm,
        "a model's layers": check_model,
        "large pool": check_large_pool,
    },
}


def main(group: str) -> int:
    torch.set_num_threads(1)
    failed = 0
    for name, check in GROUPS[group].items():
        begin: Any = time.perf_counter()
        try:
            check(torch.device("cpu"))
        except Exception:
            failed += 1
            print(f"FAILED {name}: {traceback.format_exc(limit=-4)[-1500:]}")
        else:
            print(f"ok {name}: {time.perf_counter() - begin:.2f} s")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
