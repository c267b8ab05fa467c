"""Which kernel serves a model: the first that can and is right, or the one asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ds_cp.attention.kernels.kernel import PagedKernel
from ds_cp.attention.kernels.reference import ReferenceKernel
from ds_cp.attention.kernels.self_test import fault
from ds_cp.attention.spec import LayerSpec
from ds_cp.errors import ConfigError


class KernelUnavailable(Exception):
    """A kernel cannot run here; the message is the reason, as the end of a sentence."""


# name -> makes the kernel for a device and dtype, or raises ``KernelUnavailable``
Maker = Callable[[torch.device, torch.dtype], PagedKernel]


@dataclass(frozen=True)
class Choice:
    """The kernel, and a line for the user for each one that would have come before it."""

    kernel: PagedKernel
    notes: tuple[str, ...] = ()


def makers(device: torch.device) -> dict[str, Maker]:
    """Every kernel for that kind of device by name, the preferred one first."""
    return {"reference": lambda device, dtype: ReferenceKernel()}


def choose_kernel(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    layers: Sequence[LayerSpec],
    block_size: int,
    check: bool = True,
) -> Choice:
    """The kernel called ``name``, or with "auto" the first that can serve ``layers`` and, with
    ``check``, passes the self-test. Raises ``ConfigError`` when one asked for by name does not."""
    known = makers(device)
    if name != "auto" and name not in known:
        raise ConfigError(
            f"attention.backend {name!r} is not for {device.type}; choose auto or one of "
            f"{', '.join(known)}"
        )
    notes: list[str] = []
    for each in known if name == "auto" else (name,):
        try:
            kernel = known[each](device, dtype)
            problem = _refusal(kernel, layers, block_size, dtype)
            if check and not problem:
                problem = fault(kernel, layers, block_size, dtype, device)
        except KernelUnavailable as err:
            problem = str(err)
        if not problem:
            return Choice(kernel, tuple(notes))
        notes.append(f"kernel {each} is not used: {problem}")
    raise ConfigError(f"attention.backend is {name}, but {problem}: set attention.backend to auto")


def _refusal(
    kernel: PagedKernel, layers: Sequence[LayerSpec], block_size: int, dtype: torch.dtype
) -> str:
    for spec in layers:
        if reason := kernel.refuses(spec, block_size, dtype):
            return reason
    return ""
