"""Which kernel serves a model: the first that can and is right, or the one asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from ds_cp.attention.kernels.cuda import CudaKernel
from ds_cp.attention.kernels.dense import DenseError, NotInstalledError, candidates
from ds_cp.attention.kernels.kernel import PagedKernel
from ds_cp.attention.kernels.reference import ReferenceKernel
from ds_cp.attention.kernels.self_test import fault
from ds_cp.attention.spec import LayerSpec
from ds_cp.errors import ConfigError, is_out_of_memory


class KernelUnavailableError(Exception):
    """A kernel cannot run here; the message is the reason, as the end of a sentence."""


# On CUDA, those whose rows do not depend on how prompts are cut.
DETERMINISTIC = ("triton", "reference")

# makes a kernel for a device and a model's dtype, or raises ``KernelUnavailableError``
Maker = Callable[[torch.device, torch.dtype], PagedKernel]


@dataclass(frozen=True)
class Choice:
    """The kernel, and a line for the user for each one that would have come before it."""

    kernel: PagedKernel
    notes: tuple[str, ...] = ()


class Told(NamedTuple):
    """What a rank tells the others: the kernels that it can use, and of others by name, why
    not."""

    names: tuple[str, ...]
    problems: dict[str, str]


@dataclass(frozen=True)
class Candidates:
    """What can serve a model on this rank. ``kernels``: those that can, the preferred one first;
    ``problems``: of the others by name, why not; ``order``: every name that was asked for, the
    preferred one first; ``notes``: lines for the user if that kernel is taken."""

    kernels: tuple[PagedKernel, ...]
    problems: dict[str, str]
    order: tuple[str, ...]
    notes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def told(self) -> Told:
        """The same, for the other ranks."""
        return Told(tuple(kernel.name for kernel in self.kernels), self.problems)


def makers(device: torch.device) -> dict[str, Maker]:
    """Every kernel for that kind of device by name, the preferred one first."""
    if device.type == "cuda":
        return {"cuda": _cuda, "triton": _triton, "sdpa": _torch, "reference": _reference}
    return {"cpu": _cpu, "sdpa": _torch, "reference": _reference}


def find_kernels(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    layers: Sequence[LayerSpec],
    block_size: int,
    *,
    check: bool = True,
    enough: int = 1,
    deterministic: bool = False,
) -> Candidates:
    """The kernels called ``name``, or with "auto" the first ``enough``, that can serve ``layers``
    on this rank and, with ``check``, pass the self-test; with ``deterministic`` only those whose
    rows do not depend on how prompts are cut. Without ``check``, "auto" on CUDA begins with triton:
    which dense operator is right is only known by a trial. Raises ``ConfigError`` for a name that
    is not for this device, and the error of an allocation that fails."""
    known = makers(device)
    if name == "flash_attn" and device.type == "cuda":
        known = {"flash_attn": _flash}
    if deterministic and device.type == "cuda":
        if name != "auto" and name not in DETERMINISTIC:
            raise ConfigError(
                f"attention.deterministic is true, but on CUDA attention.backend {name} cuts a "
                "prompt where its chunks end: set attention.backend to auto or to one of "
                f"{', '.join(DETERMINISTIC)}"
            )
        known = {"triton": lambda device, dtype: _triton(device, dtype, deterministic=True),
                 "reference": _reference}  # fmt: skip
    if name == "auto" and device.type == "cpu":
        known["cpu"] = _fast_cpu
    if name != "auto" and name not in known:
        raise ConfigError(
            f"attention.backend {name!r} is not for {device.type}: set attention.backend to auto "
            f"or to one of {', '.join(known)}"
        )
    if name == "auto" and not check:
        known.pop("cuda", None)
    found: list[PagedKernel] = []
    problems: dict[str, str] = {}
    notes: dict[str, tuple[str, ...]] = {}
    order = tuple(known) if name == "auto" else (name,)
    for each in order:
        if len(found) == enough:
            break
        tried = _try(known[each], device, dtype, layers, block_size, check)
        if isinstance(tried, str):
            problems[each] = tried
            continue
        found.append(tried)
        if isinstance(tried, CudaKernel):
            notes[tried.name] = tuple(tried.notes(layers, dtype))
    return Candidates(tuple(found), problems, order, notes)


def _try(
    make: Maker,
    device: torch.device,
    dtype: torch.dtype,
    layers: Sequence[LayerSpec],
    block_size: int,
    check: bool,
) -> PagedKernel | str:
    """The kernel, or why not. Whatever it raises is a reason; only a lack of memory is an error of
    its own, with a way out that no other kernel is."""
    try:
        kernel = make(device, dtype)
        reasons = (kernel.refuses(spec, block_size, dtype) for spec in layers)
        problem = next(filter(None, reasons), "")
        if check and not problem:
            problem = fault(kernel, layers, block_size, dtype, device)
        return problem or kernel
    except KernelUnavailableError as err:
        if err.__cause__ is not None and is_out_of_memory(err.__cause__):
            raise err.__cause__ from None
        return str(err)
    except Exception as err:  # a compiler, a driver, a package made for another torch
        if is_out_of_memory(err):
            raise
        return f"it fails in the check at start ({_first(err)})"


def choose_kernel(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    layers: Sequence[LayerSpec],
    block_size: int,
    check: bool = True,
) -> Choice:
    """The first of ``find_kernels``. Raises ``ConfigError`` when there is none."""
    found = find_kernels(name, device, dtype, layers, block_size, check=check)
    return agree_on_kernel(name, found, [found.told()])


def agree_on_kernel(
    name: str, mine: Candidates, ranks: Sequence[Told], hosts: Sequence[str] = ()
) -> Choice:
    """The first kernel that every rank has: pages travel, and all read them alike. ``ranks``: what
    each rank found, mine included; ``hosts``: of each rank, for the lines. Raises ``ConfigError``,
    which names a rank that lacks the kernel and why, when there is none."""
    have = {kernel.name: kernel for kernel in mine.kernels}
    notes: list[str] = []
    for each in _in_order(mine, ranks):
        lacking = [rank for rank, told in enumerate(ranks) if each not in told.names]
        if not lacking:
            kernel = have[each]
            said = (*notes, *_consequence(notes, each), *mine.notes.get(each, ()))
            return Choice(kernel, said)
        reasons = (ranks[rank].problems.get(each) for rank in lacking)
        why = next(filter(None, reasons), "it is not there")
        where = ""
        if len(lacking) < len(ranks):
            where = f"rank {lacking[0]}{f' on {hosts[lacking[0]]}' if hosts else ''}: "
        notes.append(f"kernel {each} is not used: {where}{why}")
    if name == "auto":
        first = notes[0] if notes else "none is known for this device"
        raise ConfigError(
            f"no attention kernel serves this model on every rank ({first}): {_way_out(mine.order)}"
        )
    why = "; ".join(notes) or "no kernel is known for this device"
    raise ConfigError(f"attention.backend is {name}, but {why}: set attention.backend to auto")


def _way_out(order: Sequence[str]) -> str:
    """What to set when all of ``order`` failed."""
    if "triton" not in order:
        return "run `ds-cp doctor`, or set attention.backend to sdpa"
    if "sdpa" in order:
        return "set device to cpu, or attention.backend to sdpa"
    return "set device to cpu, or attention.deterministic to false"


def _in_order(mine: Candidates, ranks: Sequence[Told]) -> list[str]:
    """Every kernel that a rank has or tried, the preferred one first: all ranks prefer alike."""
    known = {name for told in ranks for name in (*told.names, *told.problems)}
    # One that is asked for by another name, as flash_attn, comes behind the name.
    found = (name for told in ranks for name in told.names)
    return [name for name in dict.fromkeys((*mine.order, *found)) if name in known]


def _consequence(notes: Sequence[str], name: str) -> list[str]:
    """What it means that the native kernel is not used."""
    if name != "sdpa" or not any(note.startswith("kernel cpu ") for note in notes):
        return []
    return [
        "attention runs on torch's operators, which are slower, in bfloat16 about 2.5 times: "
        "`ds-cp doctor` says what the native kernel needs"
    ]


def _cpu(device: torch.device, dtype: torch.dtype) -> PagedKernel:
    from ds_cp.attention.kernels.cpu import CpuKernel
    from ds_cp.native import load

    library = load()
    if isinstance(library, str):
        raise KernelUnavailableError(library)
    return CpuKernel(library)


def _fast_cpu(device: torch.device, dtype: torch.dtype) -> PagedKernel:
    """The same, unless only its baseline runs here: torch's operators are faster than that."""
    kernel = _cpu(device, dtype)
    if getattr(kernel, "isa", "") == "baseline":
        raise KernelUnavailableError("this processor has no AVX2, or its compiler did not know it")
    return kernel


def _cuda(device: torch.device, dtype: torch.dtype) -> PagedKernel:
    return CudaKernel(_triton(device, dtype), candidates(device), device)


def _flash(device: torch.device, dtype: torch.dtype) -> PagedKernel:
    """The kernel "cuda" with that package or not at all."""
    chosen, why = [one for one in candidates(device) if one.name.startswith("flash-attn")], ""
    for one in chosen:
        try:
            one.load()
            return CudaKernel(_triton(device, dtype), chosen, device)
        except NotInstalledError:
            pass
        except DenseError as err:
            why = why or f"{one.name} cannot be used: {err}"
    raise KernelUnavailableError(why or "the package flash-attn is not installed")


def _triton(device: torch.device, dtype: torch.dtype, deterministic: bool = False) -> PagedKernel:
    try:
        from ds_cp.attention.kernels.triton_kernel import make_triton
    except Exception as err:  # a build for another torch may raise anything at import
        raise KernelUnavailableError(_import_failed("triton", err)) from err
    return make_triton(device, dtype, deterministic)


def _torch(device: torch.device, dtype: torch.dtype) -> PagedKernel:
    from ds_cp.attention.kernels.torch_ops import TorchKernel

    return TorchKernel()


def _reference(device: torch.device, dtype: torch.dtype) -> PagedKernel:
    return ReferenceKernel()


def _import_failed(package: str, err: Exception) -> str:
    return f"{package} cannot be imported ({_first(err)})"


def _first(err: Exception) -> str:
    """An error's type and first line."""
    return f"{type(err).__name__}: {(str(err).splitlines() or [''])[0][:200]}"
