"""This rank's keys and values as tensors. Callers name the slots; the pool does not know which
request holds one."""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence

import torch

from ds_cp.attention.spec import KeyValues, LayerSpec

Extents = Sequence[tuple[int, int]]
MAX_PIECES = 4  # extents that are read in place; with more, a copy costs less than their calls


def bytes_per_token(layers: Sequence[LayerSpec], dtype: torch.dtype) -> int:
    """KV bytes of one token over all layers on one rank (its own KV heads only)."""
    return sum(2 * s.num_kv_heads * s.head_dim for s in layers) * dtype.itemsize


class KVPool:
    """``num_slots`` token slots per layer, stored heads first ``[G, slots, D]`` so that an extent
    of one head is one stretch of memory. All zero at first: an unwritten slot may be read under
    a mask, where NaN would count. Allocated and touched at once, so that the memory is there or the
    start fails; with ``lazy``, on CPU, pages are claimed as slots are first written.
    """

    def __init__(
        self,
        layers: Sequence[LayerSpec],
        num_slots: int,
        dtype: torch.dtype,
        device: torch.device,
        lazy: bool = False,
    ) -> None:
        self.num_slots = num_slots
        self.dtype = dtype
        self.nbytes = num_slots * bytes_per_token(layers, dtype)
        self._kv = [
            _zeros((2, spec.num_kv_heads, num_slots, spec.head_dim), dtype, device, lazy)
            for spec in layers
        ]

    def write(
        self,
        layer: int,
        k: torch.Tensor,
        v: torch.Tensor,
        slots: torch.Tensor,
        extents: Extents = (),
    ) -> None:
        """Store ``k`` and ``v`` ``[G, T, D]`` at the T ``slots`` (int64); ``extents`` are the same
        slots as runs where the caller knows them: few long ones are copied as stretches."""
        keys, values = self._kv[layer]
        if not 0 < len(extents) <= 2:
            keys.index_copy_(1, slots, k)
            values.index_copy_(1, slots, v)
            return
        at = 0
        for slot, length in extents:
            keys[:, slot : slot + length] = k[:, at : at + length]
            values[:, slot : slot + length] = v[:, at : at + length]
            at += length

    def read(self, layer: int, extents: Extents) -> KeyValues:
        """K and V of the slots: views of the extents while they are few, else one copy."""
        both = self._kv[layer]
        parts = [both[:, :, slot : slot + length] for slot, length in extents]
        if not parts:
            parts = [both[:, :, :0]]
        elif len(parts) > MAX_PIECES:
            parts = [torch.cat(parts, dim=2)]
        return KeyValues(tuple((p[0].transpose(0, 1), p[1].transpose(0, 1)) for p in parts))

    def of_layer(self, layer: int) -> torch.Tensor:
        """All slots of one layer, ``[2, G, slots, D]``: keys, then values."""
        return self._kv[layer]

    def get_blocks(self, blocks: Sequence[int], block_size: int) -> torch.Tensor:
        """A copy of whole blocks in all layers, ``[blocks, elements of one block]``."""
        rows = [
            torch.cat(
                [kv[:, :, b * block_size : (b + 1) * block_size].flatten() for kv in self._kv]
            )
            for b in blocks
        ]
        return torch.stack(rows)

    def put_blocks(self, blocks: Sequence[int], block_size: int, content: torch.Tensor) -> None:
        """Overwrite whole blocks with what ``get_blocks`` gave, here or on another rank."""
        for block, row in zip(blocks, content, strict=True):
            at = 0
            for kv in self._kv:
                view = kv[:, :, block * block_size : (block + 1) * block_size]
                view.copy_(row[at : at + view.numel()].view(view.shape))
                at += view.numel()

    def block_elements(self, block_size: int) -> int:
        """Elements of one block over all layers."""
        return sum(2 * kv.shape[1] * block_size * kv.shape[3] for kv in self._kv)


def _zeros(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, lazy: bool
) -> torch.Tensor:
    if not lazy or device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device).zero_()
    # torch.zeros writes every page; fresh pages of the system read as zeros until they are written.
    nbytes = math.prod(shape) * dtype.itemsize
    pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=dtype).view(shape)
