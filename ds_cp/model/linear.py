"""Linear layers of a loaded decoder computed by a packed operator, the model's code untouched.

What is replaced is the ``forward`` of single ``nn.Linear`` modules, and only of those that compute
nothing but ``x @ W^T + b`` and whose weight nobody else reads: a trial call shows who does. The
packed weights take the place of the originals, of which shape and dtype stay (on the meta device,
so that a reader fails instead of getting wrong numbers).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ds_cp.model.native_norm import NativeNorm
from ds_cp.model.packed_linear import (
    DTYPES,
    MOST,
    LinearOps,
    PackedGroup,
    PackedLinear,
    memory_for,
)
from ds_cp.model.wiring import Decoder
from ds_cp.native import Library, load

# What may be asked of a weight without reading it.
_SHAPE = frozenset(
    {torch.Tensor.size, torch.Tensor.dim, torch.Tensor.numel,
     *(getattr(torch.Tensor, name).__get__ for name in ("shape", "dtype", "ndim", "requires_grad"))}
)  # fmt: skip


@dataclass(frozen=True)
class Candidate:
    """A linear layer that may be packed. ``shared``: its weight is another module's too, which goes
    on reading it, so that it stays where it is. ``input``: layers with the same number follow one
    another and get the same tensor, which nothing else is given in between."""

    name: str
    module: nn.Linear
    shared: bool
    input: int


def candidates(model: Decoder, call: Callable[[], object]) -> list[Candidate]:
    """The layers that may be packed; ``call`` runs the model once, on a token or more.

    Left out: subclasses and layers with a ``forward`` of their own, quantized or other dtypes,
    layers that ``call`` does not reach, and those whose weight would go although other code than
    their own call reads it. Experts that are held as one parameter are no linear layers.
    """
    owners: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(module)
    found = {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Linear and _is_plain(module)
    }
    with _Uses(list(found.values())) as uses:
        call()
    first = next(iter(model.parameters()), None)  # says on which device the model is
    names = {module: name for name, module in found.items()}
    made = []
    for module, number in uses.calls.items():  # in the order of the calls
        shared = any(owner is not module for owner in owners[id(module.weight)])
        if shared or (module not in uses.foreign and module.weight is not first):
            made.append(Candidate(names[module], module, shared, number))
    return made


def _is_plain(module: nn.Linear) -> bool:
    tensors = [t for t in (module.weight, module.bias) if t is not None]
    return (
        "forward" not in module.__dict__
        and all(type(t) is nn.Parameter and t.device.type == "cpu" for t in tensors)
        and module.weight.dtype in DTYPES
        and module.weight.numel() > 0
        and module.weight.is_contiguous()
        and all(t.dtype == module.weight.dtype for t in tensors)
    )


class _Uses(TorchFunctionMode):
    """Within: notes who reads the weights and biases of ``modules``."""

    def __init__(self, modules: Sequence[nn.Linear]) -> None:
        super().__init__()
        self._owner = {
            id(t): module for module in modules for t in (module.weight, module.bias)
            if t is not None
        }  # fmt: skip
        self._modules = modules
        self._inside: list[nn.Module] = []
        self.calls: dict[nn.Linear, int] = {}  # in their order, with the number of the input
        self.foreign: set[nn.Module] = set()  # whose weight or bias other code read
        self._last: torch.Tensor | None = None  # input
        self._inputs = 0
        self._hooks: list[Any] = []

    def __enter__(self) -> _Uses:
        for module in self._modules:
            self._hooks.append(module.register_forward_pre_hook(self._enter, prepend=True))
            self._hooks.append(module.register_forward_hook(self._leave, prepend=True))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        for hook in self._hooks:
            hook.remove()

    def _enter(self, module: nn.Linear, args: Any) -> None:
        self._inside.append(module)
        given = args[0] if args else None
        if given is None or given is not self._last or module in self.calls:
            self._inputs += 1  # one that is called twice shares its input with nobody
        self._last = None if module in self.calls else given
        self.calls[module] = self._inputs

    def _leave(self, module: nn.Module, *_: Any) -> None:
        self._inside.pop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _SHAPE:
            return func(*args, **(kwargs or {}))
        inside = self._inside[-1] if func is nn.functional.linear and self._inside else None
        for argument in _tensors((*args, *(kwargs or {}).values())):
            owner = self._owner.get(id(argument))
            if owner is not None and owner is not inside:
                self.foreign.add(owner)
            if inside is None and self._last is not None and _same_memory(argument, self._last):
                self._last = None  # it may be changed in place
        return func(*args, **(kwargs or {}))


def _tensors(given: Iterable[Any]) -> Iterator[torch.Tensor]:
    """The tensors of a call's arguments and of the lists among these, as those of ``cat``."""
    for argument in given:
        for one in argument if isinstance(argument, list | tuple) else (argument,):
            if isinstance(one, torch.Tensor):
                yield one


def _same_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a is b or a.layout is not torch.strided or b.layout is not torch.strided:
        return a is b
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def pack_linears(found: Sequence[Candidate], ops: LinearOps, keep: bool) -> str:
    """Replace what the layers compute; one line that says what was done.

    ``keep``: leave the original weights in place (a model that the caller goes on using). Weights
    that another module shares, such as tied embeddings, stay in any case. What is computed is that
    of the weights as they are now, also where they stay and are changed later.
    """
    doubled = at = 0
    memory = memory_for(sum(ops.bytes_of(one.module.weight) for one in found))
    groups: dict[int, list[PackedLinear]] = {}
    for one in found:
        layer = one.module
        size = ops.bytes_of(layer.weight)
        computed = ops.pack(layer.weight, layer.bias, memory[at : at + size])
        groups.setdefault(one.input, []).append(computed)
        setattr(layer, "forward", computed)  # noqa: B010
        at += size
        if keep or one.shared:
            doubled += size
            continue
        empty = torch.empty_like(layer.weight, device="meta")
        layer.weight = nn.Parameter(empty, requires_grad=False)
    for group in groups.values():
        if 1 < len(group) <= MOST:
            PackedGroup(ops, group)
    line = f"linear layers: {len(found)} packed for {ops.isa}, {at / 2**20:.0f} MiB"
    if doubled:
        why = "the caller's model keeps its weights" if keep else "tied weights stay too"
        line += f" ({why}: {doubled / 2**20:.0f} MiB twice)"
    return line


def unpack(model: Decoder) -> None:
    """Give the modules of a model their own ``forward`` again, but those whose weights are gone."""
    for module in model.modules():
        forward = module.__dict__.get("forward")
        packed = isinstance(forward, PackedLinear) and not cast(nn.Linear, module).weight.is_meta
        if packed or isinstance(forward, NativeNorm):
            del module.__dict__["forward"]


def is_packed(model: Decoder) -> bool:
    """Whether some layers of the model compute with packed weights."""
    return any(isinstance(m.__dict__.get("forward"), PackedLinear) for m in model.modules())


def packing_ops() -> LinearOps | str:
    """What packs here, or why nothing does."""
    library = load()
    if not isinstance(library, Library):
        return library
    if library.isas[0] == "baseline":
        return "this processor has no AVX2"
    return LinearOps(library)


def torch_uses_amx(dtype: torch.dtype) -> bool:
    """Whether torch's linear layers use AMX, which packed ones do not: for many rows faster, in an
    order of sums that depends on how many there are."""
    return dtype == torch.bfloat16 and bool(torch.cpu.get_capabilities().get("amx_tile"))
