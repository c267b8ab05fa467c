"""A linear layer whose weights were packed once for the processor: ``y = x @ W^T + b``.

A row of y has the same bits whatever the number of rows beside it and the number of threads (see
``ds_cp/native/src/linear.h``). bf16 and fp32; sums in fp32, rounded once.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from ds_cp.native.library import Library
from ds_cp.native.memory import huge_pages

ISAS = ("avx512bf16", "avx512", "avx2", "baseline")  # by their numbers in ds_cp/native/src/isa.h
DTYPES = (torch.bfloat16, torch.float32)
ALIGN = 64  # bytes
UNIT = 16  # columns: biases are padded to a multiple of it
MOST = 8  # layers of one call
_INT, _POINTER = ctypes.c_int64, ctypes.c_void_p


class _Linear(ctypes.Structure):
    """``Linear`` of ds_cp/native/src/linear.h."""

    _fields_ = [
        ("packed", _POINTER), ("bias", _POINTER),
        ("n", _INT), ("k", _INT), ("bf16", _INT), ("isa", _INT),
    ]  # fmt: skip


class LinearOps:
    """The functions of the library for linear layers. ``isa``: one of ``library.isas``; the best
    one by default. ``kept``: what the layers packed by it computed ahead of its call."""

    def __init__(self, library: Library, isa: str | None = None) -> None:
        self.isa = isa or library.isas[0]
        self.kept: Kept | None = None
        int_, pointer = _INT, _POINTER
        self._elements = library.function("ds_cp_linear_elements", [int_] * 3, int_)
        self._pack = library.function(
            "ds_cp_linear_pack", [pointer, int_, int_, int_, int_, pointer, int_]
        )
        self._run = library.function(
            "ds_cp_linear", [pointer, int_, pointer, int_, int_, pointer, int_]
        )

    def bytes_of(self, weight: torch.Tensor) -> int:
        """Bytes of the packed form of ``weight`` (fp32 or bf16 ``[N, K]``), whole lines of it."""
        n, k = weight.shape
        count: int = self._elements(n, k, weight.dtype == torch.bfloat16)
        return -(-count * weight.element_size() // ALIGN) * ALIGN

    def pack(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        into: torch.Tensor | None = None,
    ) -> PackedLinear:
        """``weight [N, K]`` and ``bias [N]`` packed, copies of both. ``into``: ``bytes_of(weight)``
        bytes (uint8, aligned to ``ALIGN``) for the weights, else they get memory of their own.
        Raises ``ValueError`` for others than fp32 and bf16 matrices on the CPU."""
        if weight.dtype not in DTYPES or weight.dim() != 2 or weight.device.type != "cpu":
            raise ValueError(
                f"a {weight.dim()}-dimensional {weight.dtype} weight on {weight.device} cannot be "
                "packed"
            )
        if 0 in weight.shape:
            raise ValueError("an empty weight cannot be packed")
        if into is None:
            into = memory_for(self.bytes_of(weight))
        return PackedLinear(self, weight.detach(), None if bias is None else bias.detach(), into)


def memory_for(size: int) -> torch.Tensor:
    """``size`` bytes for packed weights, uint8, in huge pages where the system has them."""
    return torch.frombuffer(huge_pages(size), dtype=torch.uint8)


class PackedLinear:
    """Computes one linear layer: ``[..., K]`` -> ``[..., N]`` in the dtype of the weights."""

    def __init__(
        self, ops: LinearOps, weight: torch.Tensor, bias: torch.Tensor | None, into: torch.Tensor
    ) -> None:
        self.n, self.k = weight.shape
        self.dtype = weight.dtype
        weight = weight if weight.stride(1) == 1 else weight.contiguous()
        half = weight.dtype == torch.bfloat16
        self._packed = into
        ops._pack(
            weight.data_ptr(), weight.stride(0), self.n, self.k, half, self._packed.data_ptr(),
            torch.get_num_threads(),
        )  # fmt: skip
        self._bias: torch.Tensor | None = None
        if bias is not None:
            self._bias = torch.zeros(-(-self.n // UNIT) * UNIT)
            self._bias[: self.n] = bias
        self._struct = _Linear(
            self._packed.data_ptr(), None if self._bias is None else self._bias.data_ptr(),
            self.n, self.k, half, ISAS.index(ops.isa),
        )  # fmt: skip
        self.address = ctypes.addressof(self._struct)
        self._ops = ops
        self._alone = _Call([self], ops._run)
        self._group: PackedGroup | None = None
        self._place = 0

    def join(self, group: PackedGroup, place: int) -> None:
        """Compute together with the layers of ``group``, of which this is number ``place``."""
        self._group, self._place = group, place

    def __call__(self, input: torch.Tensor) -> torch.Tensor:
        """Raises ``ValueError`` for an input of another width, dtype or device."""
        if self._group is None:
            self._ops.kept = None
            return self._alone(input)[0]
        return self._group.of(self._place, input)

    def alone(self, input: torch.Tensor) -> torch.Tensor:
        """The same outside of any group."""
        return self._alone(input)[0]


class _Call:
    """One call of the library for some layers that have the same input."""

    def __init__(self, layers: Sequence[PackedLinear], run: Any) -> None:
        self._widths = [layer.n for layer in layers]
        self._k, self._dtype = layers[0].k, layers[0].dtype
        self._run = run
        self._layers = (_POINTER * len(layers))(*(layer.address for layer in layers))
        self._pointers = _POINTER * len(layers)
        self._arguments = ctypes.addressof(self._layers), len(layers)

    def __call__(self, input: torch.Tensor) -> list[torch.Tensor]:
        *ahead, k = input.shape
        if k != self._k or input.dtype != self._dtype or not input.is_cpu:
            raise ValueError(
                f"a packed layer takes {self._k} features of {self._dtype} on the CPU, got {k} of "
                f"{input.dtype} on {input.device}"
            )
        x, stride = input, k
        if not input.is_contiguous():
            rows = input.reshape(-1, k)
            x = rows if rows.stride(1) == 1 else rows.contiguous()
            stride = x.stride(0)
        found = [x.new_empty((*ahead, n)) for n in self._widths]
        count = x.numel() // k
        if count:
            to = self._pointers(*(y.data_ptr() for y in found))  # of this call alone: of its thread
            self._run(
                *self._arguments, x.data_ptr(), count, stride, ctypes.addressof(to),
                torch.get_num_threads(),
            )  # fmt: skip
        return found


class Kept(NamedTuple):
    """Outputs of the layers of ``group`` for ``input`` that were not asked for yet."""

    group: PackedGroup
    input: torch.Tensor
    outputs: list[torch.Tensor | None]


class PackedGroup:
    """Layers that are called one after the other with the same tensor: the first call computes
    all of them. A call with another tensor than the first one's computes that layer alone.

    Which tensor it is, is told by its identity. So the numbers in it must not change between the
    calls: ``candidates`` of ``linear.py`` makes no group where something else is given that tensor
    or a view of it in between. What is computed ahead is dropped when a layer is called that is not
    of the group, so at most one group's outputs are held.
    """

    def __init__(self, ops: LinearOps, layers: Sequence[PackedLinear]) -> None:
        self._layers = list(layers)
        self._ops = ops
        self._call = _Call(self._layers, ops._run)
        for place, layer in enumerate(self._layers):
            layer.join(self, place)

    def of(self, place: int, input: torch.Tensor) -> torch.Tensor:
        """The output of layer ``place``."""
        if place == 0:
            first, *others = self._call(input)
            self._ops.kept = Kept(self, input, [None, *others])
            return first
        kept = self._ops.kept
        if kept is None or kept.group is not self or kept.input is not input:
            self._ops.kept = None
            return self._layers[place].alone(input)
        found, kept.outputs[place] = kept.outputs[place], None
        if place + 1 == len(self._layers):
            self._ops.kept = None
        return self._layers[place].alone(input) if found is None else found
