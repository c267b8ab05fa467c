"""Layers of a decoder on CUDA whose rows do not depend on the number of rows
(``attention.deterministic``): linear layers by our own product, RMS norms by our own sums, the
model's code untouched."""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch import nn

from ds_cp.errors import ConfigError, is_out_of_memory
from ds_cp.model.native_norm import fitting, may_be_norm
from ds_cp.model.wiring import Decoder


def make_invariant(model: Decoder, interpreted: bool = False) -> str:
    """Replace what the ``nn.Linear`` modules and RMS norms compute, and return a line for the start
    that also names what is left to torch. Weights stay where they are, and what is computed is that
    of the weights as they are then, but for norms: as they are now.

    ``interpreted``: on a CPU, for tests. Raises ``ConfigError`` where Triton cannot do it.
    """
    try:
        from ds_cp.model.triton_linear import DTYPES, TritonLinear
        from ds_cp.model.triton_norm import TritonNorm
    except Exception as err:  # a build for another torch may raise anything at import
        raise _unable(err) from err

    checked: set[torch.dtype] = set()

    def replacement(module: nn.Module) -> TritonLinear | TritonNorm | None:
        if _is_plain(module) and module.weight.dtype in DTYPES:
            linear = TritonLinear(module, interpreted)
            if module.weight.dtype not in checked:
                linear.check()
                checked.add(module.weight.dtype)
            return linear
        device = next((p.device.type for p in module.parameters(recurse=False)), "")
        return fitting(module, TritonNorm) if may_be_norm(module, device, DTYPES) else None

    linears = norms = 0
    left: set[str] = set()
    with torch.inference_mode():
        for module in model.modules():
            try:
                forward = replacement(module)
            except Exception as err:  # whatever the compiler, the linker or the driver says
                if is_out_of_memory(err):
                    raise
                raise _unable(err) from err
            if forward is not None:
                setattr(module, "forward", forward)  # noqa: B010
                linears += isinstance(forward, TritonLinear)
                norms += isinstance(forward, TritonNorm)
            elif _sums(module):
                left.add(type(module).__name__)
    line = f"{linears} linear layers and {norms} RMS norms by Triton, rows alike in any number"
    if left:
        line += f"; left to torch, whose sums may depend on it: {', '.join(sorted(left))}"
    return line


def _is_plain(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether it computes nothing but ``x W^T + b`` over weights that a kernel can read."""
    if type(module) is not nn.Linear or "forward" in module.__dict__:
        return False
    tensors = [t for t in (module.weight, module.bias) if t is not None]
    return all(type(t) is nn.Parameter and t.is_contiguous() for t in tensors)


def _sums(module: nn.Module) -> bool:
    """Whether it is likely to sum over its own weights: anything with a matrix but a table of which
    rows are read (experts, routers, convolutions), norms."""
    if isinstance(module, nn.Embedding):
        return False
    own = list(module.parameters(recurse=False))
    return any(p.ndim > 1 for p in own) or (bool(own) and "Norm" in type(module).__name__)


def _unable(err: Exception) -> ConfigError:
    first = (str(err).strip() or type(err).__name__).splitlines()[0][:200]
    return ConfigError(
        "attention.deterministic is true, but on CUDA it needs Triton for the linear layers, which "
        f"does not work here ({first}); pip install 'ds_cp[cuda]', or set attention.deterministic "
        "to false"
    )


def restore_layers(model: Decoder) -> None:
    """Give the modules of a model their own ``forward`` again."""
    for module in model.modules():
        if getattr(module.__dict__.get("forward"), "row_invariant", False):
            del module.__dict__["forward"]
