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
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from ds_cp.attention.kernels.reference import reference_kernel, reference_rows
from ds_cp.attention.kernels.sdpa import sdpa_kernel, sdpa_rows
from ds_cp.attention.spec import LayerSpec, Padding
from ds_cp.attention.state import Partial
from ds_cp.errors import ConfigError
from ds_cp.layout import Runs

FLASH_CAPABILITY = (8, 0)  # of CUDA devices, at least (Ampere)

Block = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Runs, Runs, LayerSpec], Partial]
Rows = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Padding, LayerSpec], Partial]


@dataclass(frozen=True)
class Kernel:
    """One implementation: ``block`` (what a call does) over positions, ``rows`` over padded keys of
    many sequences. ``note``: one line for the user when another kernel would have been chosen."""

    block: Block
    rows: Rows
    note: str = ""

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
    """The kernel called ``name`` ("auto" picks) and its own name.

    "auto" is flash_attn for fp16 and bf16 on CUDA where that package works, else sdpa; a package
    that is there and does not work is named in the kernel's ``note``. Raises ``ConfigError`` when
    a kernel asked for by name cannot run on this device, dtype or installation.
    """
    half_on_gpu = device.type == "cuda" and dtype in (torch.float16, torch.bfloat16)
    if name == "auto":
        if half_on_gpu and _has_flash_attn():
            flash, problem = _flash_attn(device)
            if flash is not None:
                return "flash_attn", flash
            return "sdpa", Kernel(sdpa_kernel, sdpa_rows, f"flash-attn is not used: {problem}")
        return "sdpa", Kernel(sdpa_kernel, sdpa_rows)
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
                "attention.backend flash_attn needs a CUDA device with fp16 or bf16, "
                f"not {device.type} with {dtype}: "
                "set dtype to bf16, or attention.backend to sdpa"
            )
        flash, problem = _flash_attn(device)
        if flash is None:
            raise ConfigError(
                f"attention.backend is flash_attn, but {problem}: install a flash-attn 2.x built "
                "for this torch and device, or set attention.backend to auto"
            )
        return name, flash
    raise ConfigError(
        f"attention.backend {name!r} is unknown; choose auto, reference, sdpa or flash_attn"
    )


def kernel_notes(name: str, kernel: Kernel, layers: Iterable[LayerSpec]) -> list[str]:
    """Lines for the user: why another kernel than the one asked for or expected computes some or
    all of ``layers``."""
    notes = [kernel.note] if kernel.note else []
    if name != "flash_attn":
        return notes
    from ds_cp.attention.kernels.flash import HEAD_DIM, HEAD_DIM_STEP, takes_head_dim

    odd = sorted({spec.head_dim for spec in layers if not takes_head_dim(spec.head_dim)})
    if odd:
        notes.append(
            f"layers with head_dim {', '.join(map(str, odd))} use torch's attention: "
            f"flash-attn has multiples of {HEAD_DIM_STEP} up to {HEAD_DIM}"
        )
    return notes


def _has_flash_attn() -> bool:
    return importlib.util.find_spec("flash_attn") is not None


def _flash_attn(device: torch.device) -> tuple[Kernel | None, str]:
    """The kernel over the installed flash-attn package; None and the reason when it cannot be."""
    if torch.cuda.is_available():
        found = torch.cuda.get_device_capability(device)
        if found < FLASH_CAPABILITY:  # the package would raise at the first call
            need = ".".join(map(str, FLASH_CAPABILITY))
            return None, (
                f"it needs CUDA devices of compute capability {need} or above, "
                f"this one has {found[0]}.{found[1]}"
            )
    try:
        from ds_cp.attention.kernels.flash import flash_kernel, flash_rows
    except Exception as err:  # a build for another torch may raise anything at import
        first = (str(err).splitlines() or [""])[0][:200]
        return None, f"the installed package cannot be imported ({type(err).__name__}: {first})"
    return Kernel(flash_kernel, flash_rows), ""
