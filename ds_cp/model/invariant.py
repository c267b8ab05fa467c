"""Layers of a decoder on CUDA whose rows do not depend on the number of rows
(``attention.deterministic``): linear layers by our own product, RMS norms by our own sums, the
model's code untouched."""

from __future__ import annotations

import torch
from torch import nn

from ds_cp.errors import ConfigError
from ds_cp.model.native_norm import fitting, may_be_norm
from ds_cp.model.wiring import Decoder


def make_invariant(model: Decoder, interpreted: bool = False) -> str:
    """Replace what the ``nn.Linear`` modules and RMS norms compute, and return a line for the start
    that also names what is left to torch. Weights stay where they are.

    Raises ``ConfigError`` where Triton is missing.
    """
    try:
        from ds_cp.model.triton_linear import DTYPES, TritonLinear
        from ds_cp.model.triton_norm import TritonNorm
    except ImportError as err:
        raise ConfigError(
            "attention.deterministic is true, but on CUDA it needs Triton for the linear layers, "
            f"which does not load here ({err}); pip install 'ds_cp[cuda]', or set "
            "attention.deterministic to false"
        ) from err
    done, norms = 0, 0
    left: set[str] = set()
    for module in model.modules():
        if "Norm" in type(module).__name__:
            with torch.inference_mode():
                device = next((p.device.type for p in module.parameters()), "")
                may = may_be_norm(module, device, DTYPES)
                norm = fitting(module, TritonNorm) if may else None
            if norm is None:
                left.add(type(module).__name__)
                continue
            setattr(module, "forward", norm)  # noqa: B010
            norms += 1
        if not isinstance(module, nn.Linear):
            continue
        weight = module.weight
        plain = type(module) is nn.Linear and type(weight) is nn.Parameter
        plain = plain and weight.is_contiguous()
        if not plain or "forward" in module.__dict__ or weight.dtype not in DTYPES:
            left.add(type(module).__name__)
            continue
        setattr(module, "forward", TritonLinear(module, interpreted))  # noqa: B010
        done += 1
    line = f"{done} linear layers and {norms} RMS norms by Triton, rows alike in any number"
    if left:
        line += f"; left to torch, whose sums may depend on it: {', '.join(sorted(left))}"
    return line


def restore_layers(model: Decoder) -> None:
    """Give the modules of a model their own ``forward`` again."""
    for module in model.modules():
        if getattr(module.__dict__.get("forward"), "row_invariant", False):
            del module.__dict__["forward"]
