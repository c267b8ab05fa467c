"""Block kernels behind one signature, chosen by name when an engine is built.

``kernel(q_THD, k_SGD, v_SGD, q_runs, k_runs, spec) -> Partial``: attention of T queries at the
positions ``q_runs`` over S keys at ``k_runs``, causal and windowed by position, natural-log lse
fp32, ``(0, -inf)`` for a query that sees nothing. Sinks are not the kernel's: they enter once, at
the end.

``kernel.rows(q_BHD, k_BGSD, v_BGSD, padding, spec) -> Partial``: attention of B queries, query b
over the first ``padding.lengths[b]`` keys of its own row (at least one), without any mask by
position.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ds_cp.attention.kernels.reference import reference_kernel, reference_rows
from ds_cp.attention.kernels.sdpa import sdpa_kernel, sdpa_rows
from ds_cp.attention.spec import LayerSpec, Padding
from ds_cp.attention.state import Partial
from ds_cp.errors import ConfigError
from ds_cp.layout import Runs

Block = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Runs, Runs, LayerSpec], Partial]
Rows = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Padding, LayerSpec], Partial]


@dataclass(frozen=True)
class Kernel:
    """One implementation: ``block`` (what a call does) over positions, ``rows`` over padded keys of
    many sequences."""

    block: Block
    rows: Rows

    def __call__(
        self,
        q_THD: torch.Tensor,
        k_SGD: torch.Tensor,
        v_SGD: torch.Tensor,
        q_runs: Runs,
        k_runs: Runs,
        spec: LayerSpec,
    ) -> Partial:
        return self.block(q_THD, k_SGD, v_SGD, q_runs, k_runs, spec)


def get_kernel(name: str, device: torch.device, dtype: torch.dtype) -> tuple[str, Kernel]:
    """The kernel called ``name`` ("auto" picks) and the name it goes by.

    Raises ``ConfigError`` when it cannot run on this device, dtype or installation.
    """
    half_on_gpu = device.type == "cuda" and dtype in (torch.float16, torch.bfloat16)
    if name == "auto":
        name = "flash_attn" if half_on_gpu and _has_flash_attn() else "sdpa"
    if name == "reference":
        return name, Kernel(reference_kernel, reference_rows)
    if name == "sdpa":
        return name, Kernel(sdpa_kernel, sdpa_rows)
    if name == "flash_attn":
        if not _has_flash_attn():
            raise ConfigError(
                "attention.backend is flash_attn, but the package flash-attn is not installed: "
                "pip install 'ds_cp[flash]' on a CUDA machine, or set attention.backend to auto"
            )
        if not half_on_gpu:
            raise ConfigError(
                "attention.backend flash_attn needs a CUDA device with fp16 or bf16, not "
                f"{device.type} "
                f"with {dtype}: set dtype to bf16, or attention.backend to sdpa"
            )
        from ds_cp.attention.kernels.flash import flash_kernel, flash_rows

        return name, Kernel(flash_kernel, flash_rows)
    raise ConfigError(
        f"attention.backend {name!r} is unknown; choose auto, reference, sdpa or flash_attn"
    )


def _has_flash_attn() -> bool:
    return importlib.util.find_spec("flash_attn") is not None
