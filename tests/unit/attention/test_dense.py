"""Dense operators: each adapter over an emulation of what it adapts, and which one is taken."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import pytest
import torch

from ds_cp.attention.kernels import dense
from ds_cp.attention.kernels.dense import (
    Candidate,
    DenseError,
    NotInstalledError,
    candidates,
    expanded,
    fault,
    first_right,
    from_package,
)
from ds_cp.attention.spec import LayerSpec
from tests.helpers import flash_attn
from tests.helpers.flash_attn import installed, package

CPU = torch.device("cpu")
BF16 = torch.bfloat16
HEADS = [(2, 2), (6, 2), (8, 1)]


def spec(heads: tuple[int, int] = (6, 2), dim: int = 64, **changes: Any) -> LayerSpec:
    return LayerSpec(*heads, dim, **{"scale": dim**-0.5, **changes})


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize(
    "function", [flash_attn.fa2, flash_attn.fa3, flash_attn.fa3_first, flash_attn.fa4]
)
@pytest.mark.parametrize("dtype", dense.LIMIT, ids=str)
def test_each_flash_attn_is_right(
    function: Callable[..., Any], heads: tuple[int, int], dtype: torch.dtype
) -> None:
    for dim in (8, 64, 256):
        assert fault(from_package(function), spec(heads, dim, scale=0.3), dtype, CPU) == ""


def test_no_lse_is_no_use() -> None:
    found = fault(from_package(flash_attn.fa3_between), spec(), BF16, CPU)
    assert found == "it fails here: flash_attn_func gives no lse"
    found = fault(from_package(lambda q, k, v, softmax_scale, causal: (q, None)), spec(), BF16, CPU)
    assert found == "it fails here: flash_attn_func gives no lse"


def wrong(change: Callable[[Any, Any], Any]) -> dense.Dense:
    def function(q: Any, k: Any, v: Any, softmax_scale: float, causal: bool) -> Any:
        return change(*flash_attn.fa3_first(q, k, v, softmax_scale, causal))

    return from_package(function)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda out, lse: (out, lse / 0.6931), "wrong by"),  # a base-2 logarithm
        (lambda out, lse: (out * 1.05, lse), "wrong by"),
        (lambda out, lse: (out, lse.transpose(1, 2)), "wrong by inf"),  # another layout
        (lambda out, lse: (out.transpose(1, 2), lse), "wrong by inf"),
        (lambda out, lse: (out * torch.nan, lse), "wrong by nan"),
        (lambda out, lse: (out, lse.double()), "wrong by inf"),
    ],
)
def test_what_is_wrong_is_found(change: Callable[[Any, Any], Any], says: str) -> None:
    assert says in fault(wrong(change), spec((6, 2)), BF16, CPU)


def test_a_causal_mask_at_the_wrong_end_or_wrong_heads_are_found() -> None:
    def heads_dealt_out(q: Any, k: Any, v: Any, softmax_scale: float, causal: bool) -> Any:
        k, v = (x.repeat(1, 1, q.shape[2] // k.shape[2], 1) for x in (k, v))  # h % G, not h // fold
        return flash_attn.fa3_first(q, k, v, softmax_scale, causal)

    def no_mask(q: Any, k: Any, v: Any, softmax_scale: float, causal: bool) -> Any:
        return flash_attn.fa3_first(q, k, v, softmax_scale, False)

    for function in (heads_dealt_out, no_mask):
        assert "wrong by" in fault(from_package(function), spec((6, 2)), BF16, CPU)


# --- packages as they are found


def test_packages_are_found_by_their_names() -> None:
    two = package("flash_attn", flash_attn.fa2)
    three = package("flash_attn_interface", flash_attn.fa3)
    wheel = package("flash_attn_3")
    in_wheel = package("flash_attn_3.flash_attn_interface", flash_attn.fa3)
    four = package("flash_attn.cute", flash_attn.fa4)
    folder = types.ModuleType("flash_attn")  # flash-attn 4 alone: a namespace without __file__
    folder.__path__ = []
    loads: dict[str, Callable[[], dense.Dense]] = {
        "2": dense.load_fa2, "3": dense.load_fa3, "4": dense.load_fa4
    }  # fmt: skip
    for modules, there in (
        ((), ""), ((two,), "2"), ((three,), "3"), ((wheel, in_wheel), "3"),
        ((folder, four), "4"), ((two, three, four), "234"),
    ):  # fmt: skip
        with installed(*modules):
            for name, load in loads.items():
                if name in there:
                    assert fault(load(), spec(), BF16, CPU) == ""
                else:
                    with pytest.raises(NotInstalledError):
                        load()


def test_a_newer_package_says_what_is_missing() -> None:
    def renamed(query: Any, key: Any, value: Any, scale: float, causal: bool = False) -> None: ...

    with installed(package("flash_attn")), pytest.raises(DenseError, match="no flash_attn_func"):
        dense.load_fa2()
    newer = package("flash_attn", renamed)
    with installed(newer), pytest.raises(DenseError, match="no argument softmax_scale"):
        dense.load_fa2()


def test_a_broken_package_says_why(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An import that raises, whatever it raises, and one that misses another package."""
    monkeypatch.syspath_prepend(tmp_path)
    for body, says in (
        ("raise OSError('undefined symbol: x\\nmore')", "undefined symbol: x"),
        ("import surely_not_there", "No module named 'surely_not_there'"),
        ("assert False", "AssertionError"),
    ):
        (tmp_path / "flash_attn_interface.py").write_text(body)
        with installed(), pytest.raises(DenseError, match=f"it does not load: {says}$") as found:
            dense.load_fa3()
        assert not isinstance(found.value, NotInstalledError)
        (tmp_path / "flash_attn_interface.py").unlink()


def test_the_first_that_is_right_is_taken_and_the_others_are_named() -> None:
    def missing() -> dense.Dense:
        raise NotInstalledError

    def broken() -> dense.Dense:
        raise DenseError("it does not load: no symbol")

    good = from_package(flash_attn.fa2)
    choices = (
        Candidate("a", missing),
        Candidate("b", broken),
        Candidate("c", lambda: wrong(lambda out, lse: (out, lse + 1))),
        Candidate("d", lambda: good),
        Candidate("e", lambda: good),
    )
    found = first_right(choices, spec(), BF16, CPU)
    assert (found.name, found.dense) == ("d", good)
    assert found.notes[0] == "b is not used: it does not load: no symbol"
    assert found.notes[1].startswith("c is not used: it is wrong by") and len(found.notes) == 2
    assert first_right(choices[:3], spec(), BF16, CPU).dense is None
    assert first_right((), spec(), BF16, CPU) == dense.Found("", None, ())


@pytest.mark.parametrize(
    ("layer", "dtype"),
    [
        (spec(dim=100), BF16),
        (spec(dim=264), BF16),
        (spec(), torch.float32),
        (spec(softcap=30.0), BF16),
        (spec(v_head_dim=32), BF16),
    ],
)
def test_layers_that_no_operator_is_asked_for(layer: LayerSpec, dtype: torch.dtype) -> None:
    def load() -> dense.Dense:
        raise AssertionError("asked for")

    assert dense.refusal(layer, dtype)
    assert first_right([Candidate("x", load)], layer, dtype, CPU).dense is None


# --- torch's operators


def heads_first(q: Any, k: Any, v: Any, scale: float, causal: bool) -> Any:
    out, lse = flash_attn.fa3_first(*(x.transpose(1, 2) for x in (q, k, v)), scale, causal)
    return out.transpose(1, 2), lse


def test_the_calls_of_torchs_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against operators of the same schema: arguments by place, lse with a last dimension of one,
    and padded."""

    def cudnn(q: Any, k: Any, v: Any, bias: None, compute_log_sumexp: bool, dropout_p: float,
              is_causal: bool, return_debug_mask: bool, *, scale: float) -> Any:  # fmt: skip
        assert bias is None and compute_log_sumexp and not dropout_p and not return_debug_mask
        out, lse = heads_first(q, k, v, scale, is_causal)
        return out, lse.unsqueeze(-1), None, None, 1, 1, None, None, None

    def flash(q: Any, k: Any, v: Any, dropout_p: float, is_causal: bool,
              return_debug_mask: bool, *, scale: float) -> Any:  # fmt: skip
        assert not dropout_p and not return_debug_mask
        assert k.shape[1] == q.shape[1], "expanded heads"
        out, lse = heads_first(q, k, v, scale, is_causal)
        return out, torch.nn.functional.pad(lse, (0, 28)), None, None, 1, 1, None, None, None

    for name, mine in (("cudnn", cudnn), ("flash", flash)):
        schema = getattr(torch.ops.aten, f"_scaled_dot_product_{name}_attention").default._schema
        wanted = [argument.name for argument in schema.arguments]
        given = list(mine.__annotations__)[: len(wanted)]
        assert wanted[3:] == [{"bias": "attn_bias"}.get(n, n) for n in given][3:]
    fake = types.SimpleNamespace(
        _scaled_dot_product_cudnn_attention=cudnn, _scaled_dot_product_flash_attention=flash
    )
    monkeypatch.setattr(torch.ops, "aten", fake)
    for heads in HEADS:
        found = dense.cudnn_dense(*_inputs(heads), 0.2, True)
        again = expanded(dense.torch_flash_dense)(*_inputs(heads), 0.2, True)
        want = from_package(flash_attn.fa2)(*_inputs(heads), 0.2, True)
        for got in (found, again):
            assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


def _inputs(heads: tuple[int, int]) -> tuple[torch.Tensor, ...]:
    gen = torch.Generator().manual_seed(1)
    return tuple(
        torch.randn(n, 40, 16, generator=gen).to(BF16).transpose(0, 1)
        for n in (heads[0], heads[1], heads[1])
    )


def test_a_cpu_has_none() -> None:
    assert candidates(CPU) == ()


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (10, 0), (12, 0)])
def test_every_operator_is_tried_on_every_gpu(
    capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    names = [choice.name for choice in candidates(torch.device("cuda"))]
    assert len(set(names)) == len(names)
    assert {"flash-attn 2", "flash-attn 4", "cuDNN", "torch's flash operator"} <= set(names)
    assert ("flash-attn 3" in names) == (capability[0] == 9)
    assert names.index("torch's flash operator") < names.index("cuDNN")
    assert names.index("flash-attn 2") < names.index("cuDNN")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", dense.LIMIT, ids=str)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("dim", [64, 128])
def test_some_operator_is_right_on_a_gpu(
    dim: int, heads: tuple[int, int], dtype: torch.dtype
) -> None:
    cuda = torch.device("cuda")
    found = first_right(candidates(cuda), spec(heads, dim), dtype, cuda)
    assert found.dense is not None, found.notes
    print(found.name, found.notes)
