"""The CPU operator: ``PagedKernel`` over packed pages by the native library, in bf16 and fp32.

The work is in ``ds_cp/native/src/attention.cpp`` and ``attention_kernels.cpp``. Here arguments are
checked and handed over: what passes here cannot make the native code read or write out of bounds,
since that looks at every block, place and row number itself.
"""

from __future__ import annotations

import ctypes
import struct
from functools import partial
from typing import Any

import torch

from ds_cp.attention.batch import PagedBatch
from ds_cp.attention.kernels.cpu_partials import TYPES, CpuPartials, indices, run
from ds_cp.attention.kernels.kernel import Call
from ds_cp.attention.pages import Pages
from ds_cp.attention.spec import LayerSpec
from ds_cp.attention.state import NEG_INF, Partial, dense
from ds_cp.native import Library

# The structures of the native code, field by field.
_BATCH = struct.Struct("7q")
_LAYER = struct.Struct("9q2d")
_CALL = struct.Struct("16q")
_WRITE = struct.Struct("18q")
_FAULTS = {
    1: "it does not serve such a layer",
    2: "rows of queries are named that are not there, or a position is below 0",
    3: "a block is named that is not in the pages, or holds more keys than fit",
    4: "there is no memory for its intermediate results",
    5: "its matrix product failed",
}
ISAS = ("avx512bf16", "avx512", "avx2", "baseline")  # by the native code's numbers


class CpuKernel(CpuPartials):
    """``PagedKernel`` of the native library. ``isa``: the variant, one of ``library.isas`` (None:
    the best); ``brgemm``: matrix products of bf16 by ATen's brgemm, which uses AMX where the
    processor has it: not by default, since that has run on no such processor yet. Raises
    ``ValueError`` for what the library cannot do here."""

    name = "cpu"
    packed = True

    def __init__(self, library: Library, isa: str | None = None, brgemm: bool = False) -> None:
        self.isa = library.isas[0] if isa is None else isa
        if self.isa not in library.isas:
            raise ValueError(f"{self.isa} does not run here; choose {' or '.join(library.isas)}")
        able = library.function("ds_cp_brgemm", [], ctypes.c_int64)()
        if brgemm and (not able or self.isa != ISAS[0]):
            raise ValueError("torch has no brgemm for this processor")
        self.brgemm = brgemm
        self._isa = ISAS.index(self.isa)
        super().__init__(library)
        call = ctypes.c_char_p
        self._attend = library.function("ds_cp_paged_attention", [call] * 3, ctypes.c_int64)
        self._write = library.function("ds_cp_write_pages", [call], ctypes.c_int64)

    def refuses(self, spec: LayerSpec, block_size: int, dtype: torch.dtype) -> str:
        """As in ``PagedKernel``."""
        if dtype not in TYPES:
            return f"it serves float32 and bfloat16, not {str(dtype).removeprefix('torch.')}"
        if dtype == torch.bfloat16 and (spec.head_dim % 2 or block_size % 2):
            return (
                f"its bfloat16 pages hold pairs: head_dim {spec.head_dim} and block_size "
                f"{block_size} must be even"
            )
        if not 0 < _rounded(spec.scale) < float("inf"):
            return f"a scale of {spec.scale} is no float32 number above 0"
        if spec.softcap is not None and not 0 < _rounded(spec.softcap) < float("inf"):
            return f"a soft cap of {spec.softcap} is no float32 number above 0"
        return ""

    def paged_attention(
        self,
        q_THD: torch.Tensor,
        q_positions: torch.Tensor,
        pages: Pages,
        batch: PagedBatch,
        spec: LayerSpec,
        into: Partial | None = None,
    ) -> Partial:
        """As in ``PagedKernel``. Raises ``ValueError`` for tensors that do not fit together."""
        fresh = into is None
        if into is None:
            into = _room(q_THD.shape[0], batch, spec)
        self._ready(q_THD, q_positions, pages, batch, spec, into, fresh)()
        return into

    def attending(
        self,
        q_THD: torch.Tensor,
        q_positions: torch.Tensor,
        pages: Pages,
        batch: PagedBatch,
        spec: LayerSpec,
        into: Partial,
    ) -> Call:
        """As in ``PagedKernel``. Raises ``ValueError`` as ``paged_attention``."""
        if q_THD.stride(-1) != 1:  # what is copied now is not what it holds then
            return super().attending(q_THD, q_positions, pages, batch, spec, into)
        return self._ready(q_THD, q_positions, pages, batch, spec, into, False)

    def _ready(
        self,
        q_THD: torch.Tensor,
        q_positions: torch.Tensor,
        pages: Pages,
        batch: PagedBatch,
        spec: LayerSpec,
        into: Partial,
        fresh: bool,
    ) -> Call:
        """``fresh``: what ``into`` holds is not looked at."""
        num_tokens, shape, data = q_THD.shape[0], pages.shape, pages.data
        q_THD = dense(q_THD)
        _check_queries(q_THD, q_positions, pages, spec)
        out, lse = into.out, into.lse
        if (
            out.shape != (num_tokens, spec.num_q_heads, spec.v_dim)
            or lse.shape != out.shape[:2]
            or out.dtype != torch.float32
            or lse.dtype != torch.float32
            or out.stride(2) != 1
            or not out.device.type == lse.device.type == "cpu"
        ):
            raise ValueError(
                f"a partial of {tuple(out.shape)} {out.dtype} and {tuple(lse.shape)} cannot take "
                f"queries of {tuple(q_THD.shape)}"
            )
        layer = _LAYER.pack(
            TYPES[shape.dtype], shape.num_kv_heads, spec.num_q_heads // shape.num_kv_heads,
            shape.k_dim, shape.v_dim, shape.block_size, spec.window or 0, self._isa, self.brgemm,
            spec.scale, spec.softcap or 0.0,
        )  # fmt: skip
        call = _CALL.pack(
            q_THD.data_ptr(), q_THD.stride(0), q_THD.stride(1), q_positions.data_ptr(), num_tokens,
            data.data_ptr(), data.stride(0) * data.itemsize, data.shape[0],
            out.data_ptr(), out.stride(0), out.stride(1),
            lse.data_ptr(), lse.stride(0), lse.stride(1), not fresh, torch.get_num_threads(),
        )  # fmt: skip
        given = _batch_bytes(batch), layer, call
        return partial(run, self._attend, given, _FAULTS, (q_THD, q_positions, data, batch, into))

    def write(
        self,
        pages: Pages,
        k_TGD: torch.Tensor,
        v_TGD: torch.Tensor,
        blocks: torch.Tensor,
        places: torch.Tensor,
    ) -> None:
        """As in ``PagedKernel``. Raises ``ValueError`` for tensors that do not fit together."""
        shape, data = pages.shape, pages.data
        tokens = len(blocks)
        _check_pages(pages)
        if (
            k_TGD.shape != (tokens, shape.num_kv_heads, shape.k_dim)
            or v_TGD.shape != (tokens, shape.num_kv_heads, shape.v_dim)
            or places.shape != blocks.shape
            or not k_TGD.device.type == v_TGD.device.type == "cpu"
        ):
            raise ValueError(
                f"keys {tuple(k_TGD.shape)} and values {tuple(v_TGD.shape)} do not fit {tokens} "
                f"places of {shape}"
            )
        k, v = dense(k_TGD.to(shape.dtype)), dense(v_TGD.to(shape.dtype))
        blocks, places = indices(blocks), indices(places)
        args = _WRITE.pack(
            data.data_ptr(), data.stride(0) * data.itemsize, data.shape[0],
            data.itemsize, shape.num_kv_heads, shape.k_dim, shape.v_dim, shape.block_size,
            k.data_ptr(), v.data_ptr(), k.stride(0), k.stride(1), v.stride(0), v.stride(1),
            blocks.data_ptr(), places.data_ptr(), tokens, torch.get_num_threads(),
        )  # fmt: skip
        if self._write(args):
            raise ValueError("the cpu kernel cannot write a token: its block or place is not there")


def _rounded(x: float) -> float:
    """To float32, as the native code takes it: 0 or inf where it does not fit."""
    return ctypes.c_float(x).value


def _room(num_tokens: int, batch: PagedBatch, spec: LayerSpec) -> Partial:
    """A partial to be written: rows that belong to no request are empty, the others arbitrary."""
    out = torch.empty(num_tokens, spec.num_q_heads, spec.v_dim, dtype=torch.float32)
    lse = torch.empty(num_tokens, spec.num_q_heads, dtype=torch.float32)
    begin, end = batch.first_row, batch.first_row + batch.num_rows
    for rows in (slice(0, begin), slice(end, num_tokens)):
        if rows.start < rows.stop:
            out[rows] = 0.0
            lse[rows] = NEG_INF
    return Partial(out, lse)


def _batch_bytes(batch: PagedBatch) -> bytes:
    """The batch as the native code takes it, packed once a step."""
    known: Any = batch.derived.get(CpuKernel)
    if known is None:
        vectors = [
            indices(x)
            for x in (batch.q_starts, batch.block_starts, batch.blocks, batch.firsts, batch.keys)
        ]
        parts, entries = len(batch.parts), len(batch.blocks)
        lengths = [len(x) for x in vectors]
        if lengths != [parts + 1, parts + 1, entries, entries, entries]:
            raise ValueError(f"a batch of {parts} requests has vectors of {lengths}")
        packed = _BATCH.pack(parts, entries, *(x.data_ptr() for x in vectors))
        known = packed, vectors  # the vectors live as long as their addresses are in use
        batch.derived[CpuKernel] = known
    return bytes(known[0])


def _check_pages(pages: Pages) -> None:
    shape, data = pages.shape, pages.data
    if (
        not shape.packed
        or shape.dtype not in TYPES
        or data.dtype != shape.dtype
        or data.device.type != "cpu"
        or data.dim() != 2
        or data.shape[1] < shape.elements
        or (data.stride(1) != 1 and data.shape[1] > 1)
    ):
        raise ValueError(
            f"the cpu kernel reads packed pages of float32 or bfloat16, not {tuple(data.shape)} "
            f"{data.dtype} of {shape}"
        )


def _check_queries(
    q_THD: torch.Tensor, q_positions: torch.Tensor, pages: Pages, spec: LayerSpec
) -> None:
    _check_pages(pages)
    shape = pages.shape
    if (
        q_THD.shape[1:] != (spec.num_q_heads, shape.k_dim)
        or q_THD.dtype != shape.dtype
        or not q_THD.device.type == q_positions.device.type == "cpu"
        or q_positions.shape != q_THD.shape[:1]
        or q_positions.dtype != torch.int64
        or not q_positions.is_contiguous()
        or (spec.num_kv_heads, spec.head_dim, spec.v_dim)
        != (shape.num_kv_heads, shape.k_dim, shape.v_dim)
    ):
        raise ValueError(
            f"queries {tuple(q_THD.shape)} {q_THD.dtype} at {tuple(q_positions.shape)} positions "
            f"do not fit {spec.num_q_heads} heads over {shape}"
        )
