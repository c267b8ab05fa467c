"""RMS norms of a loaded decoder computed by one native call, the model's code untouched.

Which formula a norm has is found out by comparing what it computes: the weights multiply before or
after the rounding to the dtype, and as they are or with one added. A module that fits none of these
to rounding stays as it is.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Collection
from typing import Any, TypeVar

import torch
from torch import nn

from ds_cp.model.packed_linear import DTYPES, ISAS
from ds_cp.model.wiring import Decoder
from ds_cp.native import Library, load

EPS = ("variance_epsilon", "eps", "epsilon")  # as transformers' norms name it
ROWS = 4  # of the comparison
# Least share of equal elements of the comparison, in bf16, where the order of a sum seldom shows.
EQUAL = 0.98
NEAR = {
    torch.bfloat16: 2**-7,
    torch.float16: 2**-10,
    torch.float32: 2e-6,
}  # largest relative difference: one rounding
N = TypeVar("N", bound=Callable[..., Any])
_INT, _POINTER = ctypes.c_int64, ctypes.c_void_p


class NativeNorm:
    """``x / sqrt(mean(x^2) + eps) * w`` over the last dim: ``[..., N]`` -> ``[..., N]``. A row's
    bits do not depend on the rows beside it. The weights are as they were when it was made.

    ``own``: the module's own ``forward``, which gets the calls that were not compared: with more
    arguments, or an input of another width, dtype or device."""

    def __init__(
        self,
        library: Library,
        weight: torch.Tensor,
        eps: float,
        round_first: bool,
        add_one: bool,
        own: Callable[..., Any],
    ) -> None:
        self._own = own
        self._dtype, self._n = weight.dtype, weight.numel()
        self._weight = weight.detach().float() + (1.0 if add_one else 0.0)
        self._fixed = (
            self._weight.data_ptr(), self._n, eps, weight.dtype == torch.bfloat16, round_first,
            ISAS.index(library.isas[0]),
        )  # fmt: skip
        i, p = _INT, _POINTER
        self._run: Any = library.function(
            "ds_cp_rms_norm", [p, i, i, p, i, ctypes.c_float, i, i, i, p, i]
        )

    def __call__(self, *given: Any, **named: Any) -> Any:
        if len(given) != 1 or named:
            return self._own(*given, **named)
        x, n = given[0], self._n
        if x.shape[-1:] != (n,) or x.dtype != self._dtype or not x.is_cpu:
            return self._own(x)
        if not x.is_contiguous():
            x = x.contiguous()
        y = torch.empty_like(x)
        if rows := x.numel() // n:
            self._run(x.data_ptr(), rows, n, *self._fixed, y.data_ptr(), torch.get_num_threads())
        return y


def replace_norms(model: Decoder) -> int:
    """Let the library compute the model's RMS norms where it fits them; how many it does."""
    library = load()
    if not isinstance(library, Library) or library.isas[0] == "baseline":
        return 0
    count = 0
    with torch.inference_mode():
        for module in model.modules():
            if not may_be_norm(module, "cpu", DTYPES):
                continue
            norm = fitting(module, lambda *how: NativeNorm(library, *how))
            if norm is not None:
                setattr(module, "forward", norm)  # noqa: B010
                count += 1
    return count


def may_be_norm(module: nn.Module, device: str, dtypes: Collection[torch.dtype]) -> bool:
    """Whether it looks like an RMS norm with weights of ``dtypes`` on such a ``device``."""
    weight = getattr(module, "weight", None)
    return (
        type(module).__name__.endswith("RMSNorm")
        and "forward" not in module.__dict__
        and isinstance(weight, torch.Tensor)
        and weight.dim() == 1
        and weight.dtype in dtypes
        and weight.device.type == device
        and [name for name, _ in module.named_parameters()] == ["weight"]
        and not any(True for _ in module.buffers())
    )


def fitting(module: nn.Module, make: Callable[..., N]) -> N | None:
    """The norm that computes what ``module`` does, to rounding. ``make`` is called with weight,
    eps, round_first, add_one and the module's own function."""
    weight: Any = module.weight
    eps = next((e for n in EPS if isinstance(e := getattr(module, n, None), float)), None)
    if eps is None:
        return None
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(ROWS, weight.numel(), generator=generator)
    x *= torch.tensor([[1.0], [30.0], [eps**0.5], [0.03]])  # eps counts in one row
    x = x.to(weight.device, weight.dtype)
    try:
        want = module(x)
    except (TypeError, RuntimeError, ValueError):  # it takes something else
        return None
    if not isinstance(want, torch.Tensor) or want.dtype != x.dtype or want.shape != x.shape:
        return None
    for round_first in (True, False):
        for add_one in (False, True):
            norm = make(weight, eps, round_first, add_one, module.forward)
            got = norm(x)
            equal = float((got == want).float().mean())
            near = (got.float() - want.float()).abs() <= NEAR[x.dtype] * want.float().abs()
            if bool(near.all()) and (equal >= EQUAL or x.dtype == torch.float32):
                return norm
    return None
