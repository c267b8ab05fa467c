"""This rank's keys and values as tensors. Callers name the blocks; the pool does not know which
request holds one."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ds_cp.attention.pages import Pages, PageShape
from ds_cp.attention.spec import LayerSpec
from ds_cp.native.memory import huge_pages


def bytes_per_token(layers: Sequence[LayerSpec], dtype: torch.dtype) -> int:
    """KV bytes of one token over all layers on one rank (its own KV heads only)."""
    return sum(s.num_kv_heads * (s.head_dim + s.v_dim) for s in layers) * dtype.itemsize


class KVPool:
    """``num_blocks`` blocks of ``block_size`` tokens, block-major: one block's keys and values of
    all layers are one stretch of memory, so that a move is one copy. ``packed``: the order within a
    block that the kernel wants (see ``ds_cp.attention.pages``).

    All zero at first, and ``open`` makes a block zero again when its first token is written: a slot
    without a token may be read under a mask, where NaN would count. Allocated and touched at once,
    so that the memory is there or the start fails; with ``lazy``, on CPU, memory is claimed as
    blocks are first written. With ``scratch`` there is one more block, of that number, for what is
    written and never read: padded rows of a captured step.
    """

    def __init__(
        self,
        layers: Sequence[LayerSpec],
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        packed: bool = False,
        lazy: bool = False,
        scratch: bool = False,
    ) -> None:
        self.num_blocks = num_blocks
        self.scratch = num_blocks if scratch else None
        self.block_size = block_size
        self.dtype = dtype
        self.device = device
        shapes = [PageShape.of(spec, block_size, dtype, packed) for spec in layers]
        self.block_elements = sum(shape.stride for shape in shapes)
        rows = num_blocks + scratch
        self._data = _zeros((rows, self.block_elements), dtype, device, lazy)
        self._pages, at = [], 0
        for shape in shapes:
            self._pages.append(Pages(self._data[:, at : at + shape.stride], shape))
            at += shape.stride

    @property
    def nbytes(self) -> int:
        """Bytes of the whole pool."""
        return self._data.nbytes

    def layer(self, layer: int) -> Pages:
        """The pages of one layer."""
        return self._pages[layer]

    def open(self, blocks: torch.Tensor) -> None:
        """Blocks (int64) that get their first tokens now, and not all of them: set to zero."""
        if len(blocks):
            self._data.index_fill_(0, blocks, 0)

    def block(self, block: int) -> torch.Tensor:
        """The memory of one block in all layers, ``[block_elements]``."""
        return self._data[block]

    def get_blocks(self, blocks: Sequence[int]) -> torch.Tensor:
        """A copy of whole blocks in all layers, ``[blocks, block_elements]``."""
        return self._data[torch.tensor(blocks, device=self._data.device)]

    def put_blocks(self, blocks: Sequence[int], content: torch.Tensor) -> None:
        """Overwrite whole blocks with what ``get_blocks`` gave, here or on another rank."""
        self._data[torch.tensor(blocks, device=self._data.device)] = content


def _zeros(
    shape: tuple[int, int], dtype: torch.dtype, device: torch.device, lazy: bool
) -> torch.Tensor:
    if device.type != "cpu" or not math.prod(shape):
        return torch.zeros(shape, dtype=dtype, device=device)
    # Fresh pages of the system read as zeros, and are there once they are written.
    pages = huge_pages(math.prod(shape) * dtype.itemsize)
    data = torch.frombuffer(pages, dtype=dtype).view(shape)
    return data if lazy else data.zero_()
