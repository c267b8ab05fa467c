"""Partials by the native library: their merge, and their rows on the wire. The work is in
``ds_cp/native/src/pages.cpp``."""

from __future__ import annotations

import ctypes
import struct
from functools import partial
from typing import Any

import torch

from ds_cp.attention.kernels.by_torch import ByTorch
from ds_cp.attention.kernels.kernel import Call, Merge
from ds_cp.attention.state import Partial, dense, merge_rows
from ds_cp.native import Library

_MERGE = struct.Struct("20q")
_PACK = struct.Struct("12q")
_FAULTS = {1: "a row to be merged into is not there"}
TYPES = {torch.float32: 0, torch.bfloat16: 1}  # of elements, by the native code's numbers


class CpuPartials(ByTorch):
    """The part of ``CpuKernel`` that is about partials."""

    def __init__(self, library: Library) -> None:
        call = [ctypes.c_char_p]
        self._merge = library.function("ds_cp_merge_rows", call, ctypes.c_int64)
        self._pack = library.function("ds_cp_pack_rows", call, ctypes.c_int64)

    def merge_rows(self, into: Partial, part: Partial, rows: torch.Tensor | None) -> None:
        """As in ``PagedKernel``."""
        out, lse = part.out, part.lse
        if not _is_plain(into):
            merge_rows(into, part, rows)
            return
        if out.dtype not in TYPES or out.stride(2) != 1:
            out = dense(out.to(torch.float32))
        if lse.dtype != torch.float32:
            lse = lse.to(torch.float32)
        num_rows, heads, dim = out.shape
        if (
            into.out.shape[1:] != (heads, dim)
            or not out.device.type == lse.device.type == "cpu"
            or lse.shape != (num_rows, heads)
            or (rows is None and num_rows != len(into.out))
        ):
            raise ValueError(f"{tuple(out.shape)} does not fold into {tuple(into.out.shape)}")
        size = out.itemsize
        found = (
            TYPES[out.dtype], out.data_ptr(), out.stride(0) * size, out.stride(1) * size,
            lse.data_ptr(), lse.stride(0) * 4, lse.stride(1) * 4,
        )  # fmt: skip
        rows = None if rows is None else indices(rows)
        where = _where(0 if rows is None else rows, num_rows)
        self._fold(into, found, where, (out, lse, rows))()

    def packing(self, part: Partial, dtype: torch.dtype, packed: torch.Tensor) -> Call:
        """As in ``PagedKernel``. Raises ``ValueError`` for tensors that do not fit together."""
        out, lse = part.out, part.lse
        if dtype not in TYPES or not _is_plain(part):
            return super().packing(part, dtype, packed)
        num_rows, heads, dim = out.shape
        _check_packed(packed, (num_rows, heads * (dim * dtype.itemsize + 4)))
        args = _PACK.pack(
            out.data_ptr(), out.stride(0), out.stride(1),
            lse.data_ptr(), lse.stride(0), lse.stride(1),
            packed.data_ptr(), TYPES[dtype], num_rows, heads, dim, torch.get_num_threads(),
        )  # fmt: skip
        return partial(run, self._pack, (args,), _FAULTS, (part, packed))

    def merging(
        self,
        packed: torch.Tensor,
        dtype: torch.dtype,
        rows: torch.Tensor | int,
        num_heads: int,
        v_dim: int,
    ) -> Merge:
        """As in ``PagedKernel``. Raises ``ValueError`` for tensors that do not fit together; what
        it gives does so for partials, and the call for rows that are not there."""
        if dtype not in TYPES:
            return super().merging(packed, dtype, rows, num_heads, v_dim)
        num_rows, at, size = len(packed), packed.data_ptr(), dtype.itemsize
        cut = num_heads * v_dim * size
        width = cut + num_heads * 4
        _check_packed(packed, (num_rows, width))
        part = TYPES[dtype], at, width, v_dim * size, at + cut, width, 4
        rows = rows if isinstance(rows, int) else indices(rows)
        where = _where(rows, num_rows)
        other = super().merging(packed, dtype, rows, num_heads, v_dim)

        def ready(into: Partial) -> Call:
            if not _is_plain(into):
                return other(into)
            if into.out.shape[1:] != (num_heads, v_dim):
                raise ValueError(f"rows of {width} bytes do not fold into {tuple(into.out.shape)}")
            return self._fold(into, part, where, (packed, rows))

        return ready

    def _fold(
        self, into: Partial, part: tuple[int, ...], where: tuple[int, ...], kept: object
    ) -> Call:
        """``part``: type, then address and strides in bytes of out and of lse."""
        out, lse = into.out, into.lse
        num_rows, heads, dim = out.shape
        args = _MERGE.pack(
            out.data_ptr(), out.stride(0), out.stride(1),
            lse.data_ptr(), lse.stride(0), lse.stride(1), num_rows, *part,
            *where, heads, dim, torch.get_num_threads(),
        )  # fmt: skip
        return partial(run, self._merge, (args,), _FAULTS, (into, kept))


def _where(rows: torch.Tensor | int, num_rows: int) -> tuple[int, int, int]:
    """``rows``, dense indices or the first row, as the native code takes them."""
    if isinstance(rows, int):
        return 0, rows, num_rows
    if len(rows) != num_rows:
        raise ValueError(f"{num_rows} rows do not fold into {len(rows)}")
    return rows.data_ptr(), 0, num_rows


def run(function: Any, arguments: tuple[bytes, ...], faults: dict[int, str], kept: object) -> None:
    """Call the native code. ``kept``: what lives as long as its addresses are in ``arguments``."""
    if fault := function(*arguments):
        raise ValueError(f"the cpu kernel cannot serve this call: {faults[fault]}")


def _is_plain(part: Partial) -> bool:
    """Whether the native code can read and write it: fp32, dense in its last dimension, here.
    Raises ``ValueError`` where out and lse do not fit together."""
    out, lse = part.out, part.lse
    if lse.shape != out.shape[:2]:
        raise ValueError(f"lse {tuple(lse.shape)} is not of out {tuple(out.shape)}")
    return (
        out.dtype == lse.dtype == torch.float32
        and out.stride(2) == 1
        and out.device.type == lse.device.type == "cpu"
    )


def _check_packed(packed: torch.Tensor, shape: tuple[int, int]) -> None:
    if (
        packed.shape != shape
        or packed.dtype != torch.uint8
        or packed.device.type != "cpu"
        or not packed.is_contiguous()
    ):
        raise ValueError(
            f"{tuple(packed.shape)} {packed.dtype} is no {shape[0]} rows of {shape[1]} bytes"
        )


def indices(x: torch.Tensor) -> torch.Tensor:
    """A dense int64 vector on the CPU: ``x`` itself, mostly."""
    if x.dtype != torch.int64 or x.device.type != "cpu" or x.dim() != 1:
        raise ValueError(f"indices are int64 vectors on the CPU, not {x.dtype} on {x.device}")
    return x.contiguous()
