"""Packed linear layers: right against fp64, the same bits in any company, and only where safe."""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from transformers import MixtralConfig, MixtralForCausalLM

from ds_cp.model.linear import candidates, pack_linears, unpack
from ds_cp.model.packed_linear import ISAS, LinearOps, PackedGroup
from ds_cp.model.wiring import probe_layers
from ds_cp.native import Library, load
from tests.helpers.engines import tiny_llama

LIBRARY = load()
pytestmark = pytest.mark.skipif(
    not isinstance(LIBRARY, Library), reason=f"{LIBRARY}: run `python -m ds_cp.native`"
)
RUNS_HERE = LIBRARY.isas if isinstance(LIBRARY, Library) else ()
# N and K: whole panels; tails of a panel, of a unit and of a pair; several blocks of K; one.
SHAPES = ((64, 64), (130, 333), (49, 2100), (576, 1025), (16, 8192), (1, 7), (65, 1))


def ops(isa: str | None = None) -> LinearOps:
    assert isinstance(LIBRARY, Library)
    if isa is not None and isa not in RUNS_HERE:
        pytest.skip(f"this processor or build has no {isa}; run on one that has")
    return LinearOps(LIBRARY, isa)


@pytest.fixture(autouse=True)
def same_threads_after() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def drawn(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("fp32", "bf16"))
@pytest.mark.parametrize("isa", ISAS)
def test_error_is_no_larger_than_torchs(isa: str, dtype: torch.dtype) -> None:
    """Against fp64 over the same numbers, with and without bias, x at any stride."""
    packer = ops(isa)
    for n, k in SHAPES:
        weight, bias = drawn(n, k, dtype=dtype), drawn(n, dtype=dtype)
        x = drawn(23, k + 3, dtype=dtype)[:, 1 : k + 1]
        for b in (bias, None):
            want = nn.functional.linear(
                x.double(), weight.double(), b.double() if b is not None else None
            )
            scale = want.abs().max()
            error = (packer.pack(weight, b)(x).double() - want).abs().max() / scale
            torchs = (nn.functional.linear(x, weight, b).double() - want).abs().max() / scale
            floor = 2e-7 if dtype == torch.float32 else 2**-9
            assert error <= max(1.5 * torchs, floor), (n, k, error, torchs)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("fp32", "bf16"))
@pytest.mark.parametrize("isa", ISAS)
def test_bits_of_a_row_do_not_depend_on_its_company(isa: str, dtype: torch.dtype) -> None:
    """Alone, in any stretch of the batch, with any number of threads, split by columns."""
    packer = ops(isa)
    for n, k in ((576, 1025), (130, 333), (49, 2100)):
        weight, bias = drawn(n, k, dtype=dtype), drawn(n, dtype=dtype)
        layer = packer.pack(weight, bias)
        x = drawn(230, k, dtype=dtype)  # more rows than a task has
        torch.set_num_threads(1)
        whole = layer(x)
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            for begin, end in ((0, 1), (229, 230), (3, 5), (90, 107), (95, 230), (0, 230)):
                assert torch.equal(layer(x[begin:end]), whole[begin:end]), (n, k, threads, begin)
        # Another tensor-parallel split of the columns has the same chains.
        for part in (slice(0, 16), slice(5, 48)):
            assert torch.equal(packer.pack(weight[part], bias[part])(x[:9]), whole[:9, part])


def test_any_leading_dimensions_and_none() -> None:
    weight, bias = drawn(20, 12, dtype=torch.float32), drawn(20, dtype=torch.float32)
    layer = ops().pack(weight, bias)
    for shape in ((12,), (1, 12), (2, 3, 12), (0, 12), (1, 0, 12)):
        x = drawn(*shape, dtype=torch.float32)
        want = nn.functional.linear(x, weight, bias)
        torch.testing.assert_close(layer(x), want, atol=1e-5, rtol=1e-5)
    column_major = drawn(12, 6, dtype=torch.float32).t()
    torch.testing.assert_close(
        layer(column_major), nn.functional.linear(column_major, weight, bias), atol=1e-5, rtol=1e-5
    )


def test_not_finite_inputs_stay_in_their_row() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        layer = ops().pack(drawn(33, 65, dtype=dtype), None)
        x = drawn(8, 65, dtype=dtype)
        clean = layer(x)
        x[3, 5], x[6, 64] = float("nan"), float("inf")
        found = layer(x)
        assert found[3].isnan().all() and not found[6].isfinite().any()
        rest = [0, 1, 2, 4, 5, 7]
        assert torch.equal(found[rest], clean[rest])


def test_wrong_inputs_are_refused() -> None:
    layer = ops().pack(drawn(4, 6, dtype=torch.float32), None)
    for x in (torch.zeros(2, 5), torch.zeros(2, 6, dtype=torch.bfloat16), torch.zeros(2, 7)):
        with pytest.raises(ValueError, match="takes 6 features"):
            layer(x)
    for weight in (torch.zeros(3, 3, dtype=torch.float16), torch.zeros(3), torch.zeros(0, 3)):
        with pytest.raises(ValueError, match="cannot be packed"):
            ops().pack(weight, None)


# --- which layers of a model


class Odd(nn.Module):
    """Layers that must be left alone beside one that need not."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(4, 8)
        self.plain = nn.Linear(8, 8)
        self.read = nn.Linear(8, 8, bias=False)  # its weight is used by name
        self.bias_read = nn.Linear(8, 8)
        self.unreached = nn.Linear(8, 8)
        self.normed = parametrizations.weight_norm(nn.Linear(8, 8))
        self.own = nn.Linear(8, 8)
        setattr(self.own, "forward", lambda x: x)  # noqa: B010
        self.halves = nn.Linear(8, 8, dtype=torch.float16)
        self.joined = nn.ModuleList(nn.Linear(8, 4, bias=False) for _ in range(2))
        self.tied = nn.Linear(8, 4, bias=False)
        self.tied.weight = self.embedding.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        x = self.plain(x.to(self.plain.weight.dtype))  # asking for the dtype is not reading
        x = self.read(x) + x @ self.read.weight
        x = self.bias_read(x) * self.bias_read.bias
        x = self.own(self.normed(x))
        self.halves(x.half())
        x = torch.cat([one(x) for one in self.joined], -1)
        x = nn.functional.linear(x, torch.cat([one.weight for one in self.joined]))
        return self.tied(x)


def test_only_layers_that_nobody_else_reads() -> None:
    model = Odd().eval()
    ids = torch.tensor([[1, 2, 3]])
    with torch.inference_mode():
        want = model(ids)
        found = candidates(model, lambda: model(ids))
        assert {one.name: one.shared for one in found} == {"plain": False, "tied": True}
        line = pack_linears(found, ops(), keep=False)
        torch.testing.assert_close(model(ids), want)
        unpack(model)  # of no use where the weights are gone
        torch.testing.assert_close(model(ids), want)
    assert line.startswith("linear layers: 2 packed for ")
    assert model.plain.weight.device.type == "meta" and model.plain.weight.shape == (8, 8)
    assert not model.plain._forward_hooks and not model.plain._forward_pre_hooks


@pytest.mark.parametrize("tied", (False, True))
def test_a_decoder_computes_the_same_and_can_be_given_back(tied: bool) -> None:
    model = tiny_llama(tie_word_embeddings=tied)
    ids = torch.arange(40)[None]
    with torch.inference_mode():
        want = model(input_ids=ids).logits
        found = candidates(model, lambda: probe_layers(model))
        model.set_attn_implementation("sdpa")
        assert len(found) == 2 * 7 + 1
        assert [one.name for one in found if one.shared] == (["lm_head"] if tied else [])
        pack_linears(found, ops(), keep=True)
        got = model(input_ids=ids).logits
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
        unpack(model)
        assert torch.equal(model(input_ids=ids).logits, want)


def test_memory_of_the_originals_is_given_back_but_not_of_tied_ones() -> None:
    model = tiny_llama(tie_word_embeddings=True).to(torch.bfloat16)
    with torch.inference_mode():
        found = candidates(model, lambda: probe_layers(model))
        line = pack_linears(found, ops(), keep=False)
    assert "tied weights stay too" in line
    assert model.lm_head.weight.device.type == "cpu"
    assert model.dtype == torch.bfloat16 and model.device.type == "cpu"
    layer = model.model.layers[0].mlp.up_proj
    assert layer.weight.device.type == "meta" and layer.weight.numel() == 64 * 128


def test_experts_in_one_parameter_stay_as_they_are() -> None:
    config = MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    model = MixtralForCausalLM(config).eval()
    with torch.inference_mode():
        found = candidates(model, lambda: probe_layers(model))
    names = {one.name.rsplit(".", 1)[-1] for one in found}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "lm_head"}


# --- layers with one input


def test_layers_of_one_input_are_computed_together_with_the_same_bits() -> None:
    """Whatever the caller does between: skips one, changes the order, calls one again."""
    packer = ops()
    weights = [drawn(n, 70, dtype=torch.bfloat16) for n in (48, 130, 1)]
    single = [packer.pack(w, None) for w in weights]
    joined = [packer.pack(w, torch.zeros(len(w), dtype=torch.bfloat16)) for w in weights]
    PackedGroup(packer, joined)
    x, other = drawn(5, 70, dtype=torch.bfloat16), drawn(2, 70, dtype=torch.bfloat16)
    calls = [(0, x), (1, x), (2, x), (0, other), (2, other), (1, x), (0, x), (0, other), (1, other),
             (1, other), (2, x), (2, other), (0, x[:3])]  # fmt: skip
    for place, given in calls:
        assert torch.equal(joined[place](given), single[place](given)), place


def test_layers_of_one_input_are_found_in_the_order_of_their_calls() -> None:
    model = tiny_llama()
    with torch.inference_mode():
        found = candidates(model, lambda: probe_layers(model))
    groups: dict[int, list[str]] = {}
    for one in found:
        groups.setdefault(one.input, []).append(one.name.rsplit(".", 1)[-1])
    layer = [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    assert list(groups.values()) == [*layer, *layer, ["lm_head"]]


class Between(nn.Module):
    """Two layers of one tensor, and something done in between."""

    def __init__(self, between: Callable[[torch.Tensor, torch.Tensor], object]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(4, 8)  # a model's first parameter says where it is
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.between = between

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        before = x.view(-1)
        y: torch.Tensor = self.first(x)
        self.between(before, x)
        return y.add(self.second(x))


@pytest.mark.parametrize(
    ("between", "groups"),
    (
        (lambda view, x: None, 1),
        (lambda view, x: x.shape[0] + x.dim(), 1),
        (lambda view, x: torch.zeros(3).add_(1), 1),
        (lambda view, x: x.mul_(2), 2),
        (lambda view, x: view.mul_(2), 2),
        (lambda view, x: x[0].fill_(3), 2),
        (lambda view, x: x.__setitem__(0, 3.0), 2),
        (lambda view, x: torch.add(x, 1, out=x), 2),
        (lambda view, x: torch._foreach_mul_([x], 2), 2),
    ),
)
def test_a_tensor_that_is_changed_between_two_layers_is_not_one_input(
    between: Callable[[torch.Tensor, torch.Tensor], object], groups: int
) -> None:
    model: Any = Between(between).eval()
    with torch.inference_mode():
        want = model(torch.ones(2, 8))
        found = candidates(model, lambda: model(torch.ones(2, 8)))
        assert len({one.input for one in found}) == groups and len(found) == 2
        pack_linears(found, ops(), keep=True)
        torch.testing.assert_close(model(torch.ones(2, 8)), want)


def test_what_was_computed_ahead_is_dropped_at_the_next_call() -> None:
    """Of a group that was not finished, by whatever layer follows."""
    packer = ops()
    layers = [packer.pack(drawn(16, 8, dtype=torch.float32), None) for _ in range(5)]
    group, other, lone = layers[:2], layers[2:4], layers[4]
    for each in (group, other):
        PackedGroup(packer, each)
    y = drawn(2, 8, dtype=torch.float32)
    follows: list[Callable[[], object]] = [
        lambda: lone(y), lambda: other[0](y), lambda: other[1](y), lambda: group[1](y),
    ]  # fmt: skip
    for call in follows:
        x = drawn(3, 8, dtype=torch.float32)
        given = weakref.ref(x)
        group[0](x)
        del x
        assert given() is not None
        call()
        assert given() is None


def test_threads_do_not_share_where_a_call_writes() -> None:
    packer = ops()
    both = threading.Barrier(2)
    seen: list[int] = []

    def run(layers: int, count: int, x: int, m: int, stride: int, to: int, threads: int) -> None:
        both.wait(60)
        seen.append(ctypes.c_void_p.from_address(to).value or 0)

    packer._run = run
    layer = packer.pack(drawn(4, 6, dtype=torch.float32), None)
    results: list[torch.Tensor] = []
    callers = [
        threading.Thread(target=lambda: results.append(layer(torch.zeros(1, 6)))) for _ in range(2)
    ]
    for each in callers:
        each.start()
    for each in callers:
        each.join()
    assert sorted(seen) == sorted(y.data_ptr() for y in results)
