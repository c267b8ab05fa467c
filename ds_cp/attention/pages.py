"""Pages: keys and values of one layer in blocks, as kernels read them and as they travel.

A block is one stretch of memory: the keys of all KV heads, then their values. So a move is one
copy, and a kernel finds a key by (block, place in the block). Two orders within a block, for pairs
of p elements:

- plain: keys ``[G, B, D]``, values ``[G, B, Dv]``, a token's numbers side by side;
- packed: keys ``[G, D / p, B, p]``, values ``[G, B / p, Dv, p]``, as the matrix instructions of a
  CPU want their second factor: p = 2 for 16-bit elements, 1 for fp32 (keys transposed).

B tokens a block, G KV heads, D and Dv head dims of keys and values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from ds_cp.attention.spec import LayerSpec

ALIGN = 64  # bytes; a layer's stretch of a block is a multiple of it


@dataclass(frozen=True)
class PageShape:
    """How one block of one layer lies in memory. Raises ``ValueError`` when pairs do not fit."""

    block_size: int  # tokens
    num_kv_heads: int
    k_dim: int
    v_dim: int
    dtype: torch.dtype
    packed: bool = False

    def __post_init__(self) -> None:
        p = self.pair
        if self.k_dim % p or self.block_size % p:
            raise ValueError(
                f"{self.dtype} pages hold pairs: head_dim {self.k_dim} and block_size "
                f"{self.block_size} must be even"
            )

    @property
    def pair(self) -> int:
        """Elements that lie side by side in packed order."""
        return 2 if self.packed and self.dtype.itemsize == 2 else 1

    @property
    def k_elements(self) -> int:
        """Elements of one block's keys."""
        return self.num_kv_heads * self.block_size * self.k_dim

    @property
    def elements(self) -> int:
        """Elements of one block, keys and values, without padding."""
        return self.num_kv_heads * self.block_size * (self.k_dim + self.v_dim)

    @property
    def stride(self) -> int:
        """Elements of one block with the padding to ``ALIGN`` bytes."""
        unit = ALIGN // self.dtype.itemsize
        return -(-self.elements // unit) * unit

    @classmethod
    def of(
        cls, spec: LayerSpec, block_size: int, dtype: torch.dtype, packed: bool = False
    ) -> PageShape:
        """The pages of a layer."""
        return cls(block_size, spec.num_kv_heads, spec.head_dim, spec.v_dim, dtype, packed)


class Fresh(NamedTuple):
    """A step's queries ``[T, H, D]`` and its new keys and values ``[T, G, D]`` where the layer left
    them, row by row. For a call with these very queries they are what the pages hold of these
    positions, side by side."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor


@dataclass(frozen=True, eq=False)
class Pages:
    """Blocks of one layer: ``data [num_blocks, >= elements]``, rows at any stride, dense within.
    ``fresh``: what the step has just stored in them, for a kernel that would rather read that."""

    data: torch.Tensor
    shape: PageShape
    fresh: Fresh | None = None

    @property
    def num_blocks(self) -> int:
        """Blocks there are."""
        return self.data.shape[0]

    def keys(self) -> torch.Tensor:
        """A view of all keys: ``[num_blocks, G, B, D]``, packed ``[num_blocks, G, B, D / p, p]``
        with other strides."""
        s = self.shape
        flat = self.data[:, : s.k_elements]
        if not s.packed:
            return flat.view(-1, s.num_kv_heads, s.block_size, s.k_dim)
        by_pair = flat.view(-1, s.num_kv_heads, s.k_dim // s.pair, s.block_size, s.pair)
        return by_pair.transpose(2, 3)

    def values(self) -> torch.Tensor:
        """A view of all values: ``[num_blocks, G, B, Dv]``, packed ``[num_blocks, G, B / p, p,
        Dv]`` with other strides."""
        s = self.shape
        flat = self.data[:, s.k_elements : s.elements]
        if not s.packed:
            return flat.view(-1, s.num_kv_heads, s.block_size, s.v_dim)
        by_pair = flat.view(-1, s.num_kv_heads, s.block_size // s.pair, s.v_dim, s.pair)
        return by_pair.transpose(3, 4)

    def gather(self, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """K ``[n * B, G, D]`` and V ``[n * B, G, Dv]`` of n ``blocks`` (int64), in their order: a
        copy in plain order, whatever the order of the pages."""
        s = self.shape
        tokens = len(blocks) * s.block_size
        k = self.keys()[blocks].flatten(3).view(-1, s.num_kv_heads, s.block_size, s.k_dim)
        v = self.values()[blocks].reshape(-1, s.num_kv_heads, s.block_size, s.v_dim)
        return (
            k.transpose(1, 2).reshape(tokens, s.num_kv_heads, s.k_dim),
            v.transpose(1, 2).reshape(tokens, s.num_kv_heads, s.v_dim),
        )

    def write(
        self, k_TGD: torch.Tensor, v_TGD: torch.Tensor, blocks: torch.Tensor, places: torch.Tensor
    ) -> None:
        """Store T tokens: token t at place ``places[t]`` of block ``blocks[t]`` (int64 ``[T]``)."""
        s, n = self.shape, len(blocks)
        if not s.packed:
            self.keys()[blocks, :, places] = k_TGD
            self.values()[blocks, :, places] = v_TGD
            return
        k = k_TGD.reshape(n, s.num_kv_heads, s.k_dim // s.pair, s.pair)
        self.keys()[blocks, :, places] = k
        self.values()[blocks, :, places // s.pair, places % s.pair] = v_TGD


def empty_pages(shape: PageShape, num_blocks: int, device: torch.device) -> Pages:
    """Pages of zeros. Slots that were never written are read under a mask, where NaN would
    count."""
    data = torch.zeros(num_blocks, shape.stride, dtype=shape.dtype, device=device)
    return Pages(data, shape)
