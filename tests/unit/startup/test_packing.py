"""When linear layers are packed, what the start says of it, and the ways back to torch's."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from ds_cp.errors import ConfigError
from ds_cp.model.borrowed import Borrowed
from ds_cp.model.packed_linear import LinearOps
from ds_cp.native import Library, load
from ds_cp.startup import packing
from ds_cp.startup.packing import plan_packing
from tests.helpers.engines import tiny_llama

LIBRARY = load()
needs_library = pytest.mark.skipif(
    not isinstance(LIBRARY, Library) or LIBRARY.isas[0] == "baseline",
    reason=f"needs the native library and AVX2: {LIBRARY}",
)


NO_TRITON = "triton is not installed: pip install 'ds_cp[cuda]'"


def world(kind: str = "cpu") -> Any:
    topology = SimpleNamespace(local_size=lambda rank: 1)
    return SimpleNamespace(device=torch.device(kind), topology=topology, rank=0)


@needs_library
def test_packed_by_default_and_given_back() -> None:
    model = tiny_llama()
    ids = torch.arange(20)[None]
    with torch.inference_mode():
        want = model(input_ids=ids).logits
        with Borrowed(model):
            line = plan_packing("auto", model, world(), kept=True)()
            assert line.startswith("linear layers: 15 packed for ") and "5 RMS norms" in line
            model.set_attn_implementation("sdpa")
            torch.testing.assert_close(model(input_ids=ids).logits, want, atol=1e-5, rtol=1e-5)
        assert torch.equal(model(input_ids=ids).logits, want)
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_torch_and_other_devices_change_nothing() -> None:
    model = tiny_llama()
    assert plan_packing("torch", model, world(), kept=True)() == ""
    assert plan_packing("auto", model, world("cuda"), kept=True)() == ""
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_deterministic_on_cuda_needs_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ds_cp.model.triton_linear", None)
    model = tiny_llama()
    with pytest.raises(ConfigError, match="set attention.deterministic to false$") as caught:
        plan_packing("auto", model, world("cuda"), kept=True, deterministic=True)()
    assert "needs Triton" in str(caught.value) and "\n" not in str(caught.value)
    assert plan_packing("torch", model, world(), kept=True, deterministic=True)() == ""


class Unfit(nn.Module):
    """Computes with weights of its own that no kernel of ours reads."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.zeros(2, 4, 4))


def test_deterministic_layers_are_found_named_and_given_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    triton_linear = pytest.importorskip("ds_cp.model.triton_linear", reason=NO_TRITON)
    with pytest.raises(ConfigError, match="does not work here"):  # on a CPU it compiles nothing
        plan_packing("auto", tiny_llama(), world("cuda"), kept=True, deterministic=True)()
    monkeypatch.setattr(triton_linear.TritonLinear, "check", lambda self: None)
    model = tiny_llama()
    model.model.layers[0].mlp.more = Unfit()
    model.model.layers[0].mlp.norm = nn.LayerNorm(8)
    with Borrowed(model):
        # Norms are tried, so they cannot be replaced here; see tests/helpers/triton_cases.py.
        for module in model.modules():
            if type(module).__name__ == "LlamaRMSNorm":
                module.eps_there, module.variance_epsilon = module.variance_epsilon, None
        line = plan_packing("auto", model, world("cuda"), kept=True, deterministic=True)()
        assert line == (
            "15 linear layers and 0 RMS norms by Triton, rows alike in any number; left to torch, "
            "whose sums may depend on it: LayerNorm, LlamaRMSNorm, Unfit"
        )
        linear = model.model.layers[0].mlp.up_proj
        assert isinstance(linear.__dict__["forward"], triton_linear.TritonLinear)
        for wrong in (torch.zeros(2, 7), torch.zeros(2, 64, dtype=torch.bfloat16),
                      torch.zeros(2, 64, device="meta")):  # fmt: skip
            with pytest.raises(ValueError, match="a linear layer of 64 columns, torch.float32 on"):
                linear(wrong)
    assert not any("forward" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("why", ("no library", "no memory", "no layers"))
def test_what_cannot_be_packed_stays_and_is_said(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    if why == "no library":
        monkeypatch.setattr(packing, "packing_ops", lambda: "the native library is not built")
        said = "the native library is not built"
    elif isinstance(LIBRARY, str):
        pytest.skip(f"{LIBRARY}: run `python -m ds_cp.native`")
    elif why == "no memory":
        monkeypatch.setattr(packing, "packing_ops", lambda: LinearOps(LIBRARY))
        monkeypatch.setattr(packing, "free_bytes", lambda world: (1000, 1))
        said = "more than 60% of 0.0 GiB free"
    else:
        monkeypatch.setattr(packing, "packing_ops", lambda: LinearOps(LIBRARY))
        model = model.to(torch.float16)
        said = "none that can be packed"
    line = plan_packing("auto", model, world(), kept=True)()
    assert line.startswith("linear layers: torch's operators (") and said in line
    assert not any("forward" in module.__dict__ for module in model.modules())
    if why != "no memory":
        with pytest.raises(ConfigError, match="linear_layers is packed, but"):
            plan_packing("packed", model, world(), kept=True)


@needs_library
def test_with_amx_packed_is_what_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor that has it; the packed layers are those of AVX512-BF16."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_tile": True})
    model = tiny_llama().to(torch.bfloat16)
    line = plan_packing("auto", model, world(), kept=True)()
    assert line == "linear layers: torch's operators (with AMX, which packed ones do not use)"
    assert not any("forward" in module.__dict__ for module in model.modules())
    with torch.inference_mode():
        line = plan_packing("packed", model, world(), kept=True)()
    assert line.startswith("linear layers: 15 packed for ") and "AMX, faster for long" in line
    single = tiny_llama()
    with torch.inference_mode():
        assert "15 packed" in plan_packing("auto", single, world(), kept=True)()
