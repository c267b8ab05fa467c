"""Native RMS norms: each formula that transformers has is recognized, others are left alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from ds_cp.model.native_norm import replace_norms
from ds_cp.native import Library, load

LIBRARY = load()
pytestmark = pytest.mark.skipif(
    not isinstance(LIBRARY, Library) or LIBRARY.isas[0] == "baseline",
    reason=f"needs the native library and AVX2: {LIBRARY}",
)
KINDS = (LlamaRMSNorm, Gemma2RMSNorm, Olmo2RMSNorm, Qwen3RMSNorm)


class OddRMSNorm(LlamaRMSNorm):
    """One that does something else with its weight."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states) * 1.01


def norm_of(kind: type[nn.Module], size: int, dtype: torch.dtype) -> nn.Module:
    norm = kind(size, eps=1e-5)
    torch.manual_seed(size)
    with torch.no_grad():
        norm.weight.add_(0.3 * torch.randn(size))
    return norm.to(dtype)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("fp32", "bf16"))
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@torch.inference_mode()
def test_same_numbers_to_rounding_and_bits_in_any_company(
    kind: type[nn.Module], dtype: torch.dtype
) -> None:
    for size in (64, 576, 77, 5):
        norm = norm_of(kind, size, dtype)
        x = (torch.randn(70, size) * torch.logspace(-3, 2, 70)[:, None]).to(dtype)
        want = norm(x)
        exact = norm.double()(x.double())
        assert replace_norms(norm.to(dtype)) == 1
        got = norm(x)
        assert got.dtype == dtype
        scale = exact.abs().amax(dim=1, keepdim=True)
        error = ((got.double() - exact).abs() / scale).max()
        torchs = ((want.double() - exact).abs() / scale).max()
        assert error <= max(1.2 * torchs, 3e-7), (size, error, torchs)
        if dtype == torch.bfloat16:
            assert (got == want).float().mean() > 0.99
        for begin, end in ((0, 1), (3, 9), (69, 70)):
            assert torch.equal(norm(x[begin:end]), got[begin:end])
        strided = x[:, None].expand(70, 3, size)[1:60:7]
        assert torch.equal(norm(strided), norm(strided.contiguous()))


@torch.inference_mode()
def test_another_formula_is_left_alone() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        norm = norm_of(OddRMSNorm, 64, dtype)
        assert replace_norms(norm) == 0 and "forward" not in norm.__dict__
        assert replace_norms(nn.RMSNorm(64, eps=1e-5, dtype=dtype)) == 1


class GatedRMSNorm(LlamaRMSNorm):
    """One that is called with more than was compared."""

    def forward(
        self, hidden_states: torch.Tensor, gate: torch.Tensor | None = None
    ) -> torch.Tensor:
        found = super().forward(hidden_states)
        return found if gate is None else found * gate


@torch.inference_mode()
def test_calls_that_were_not_compared_are_the_modules_own() -> None:
    norm, native = (norm_of(GatedRMSNorm, 64, torch.bfloat16) for _ in range(2))
    assert replace_norms(native) == 1
    x, gate = torch.randn(3, 64, dtype=torch.bfloat16), torch.randn(64)
    narrow = torch.randn(3, 1, dtype=torch.bfloat16)
    for given, named in (
        ((x, gate), {}), ((x,), {"gate": gate}), ((), {"hidden_states": x}),
        ((x.float(),), {}), ((narrow,), {}), ((narrow[0, 0],), {}),
    ):  # fmt: skip
        got, want = native(*given, **named), norm(*given, **named)
        assert got.dtype == want.dtype and torch.equal(got, want)
    for wrong in (torch.zeros(2, 7, dtype=torch.bfloat16), x.to("meta")):
        for module in (native, norm):
            with pytest.raises(RuntimeError):
                module(wrong)
    assert native(torch.zeros(0, 64, dtype=torch.bfloat16)).shape == (0, 64)
