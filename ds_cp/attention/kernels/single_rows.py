"""Requests with one query row each, as when decoding: all of them over their own blocks at once.

Every chunk of keys of every request is one entry of a batch, for torch's operators to deal out to
threads; what they find is then merged row by row, in the order of the positions. A chunk is a block
(of small blocks, as many as hold ``CHUNK_KEYS`` keys between two multiples of that number of
tokens), read whole under a mask. So an entry's result and the order of the merge follow from the
request alone, whoever else is in the step.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import embedding_bag

from ds_cp.attention.batch import PagedBatch
from ds_cp.attention.kernels.operators import Operator
from ds_cp.attention.pages import Pages, PageShape
from ds_cp.attention.spec import LayerSpec
from ds_cp.attention.state import NEG_INF, Partial, dense, split_heads

CHUNK_KEYS = 64  # keys of a chunk at least, while there are as many
VIEW_BYTES = 1 << 20  # bytes of blocks in a row that are read where they lie; fewer are copied
GATHER_BYTES = 4 << 20  # bytes that are copied at once; they stay in the cache until they are read

Ints = npt.NDArray[np.int64]


class _Piece(NamedTuple):
    """Chunks ``begin .. end - 1``; they lie in a row from block ``number`` on, or (-1) are
    copied."""

    begin: int
    end: int
    number: int


class SingleRows:
    """The requests of a batch that have one row, for layers of one shape and window. ``rows``:
    int64, their rows of the queries, ascending; those that see no key are left out of the work."""

    def __init__(
        self,
        batch: PagedBatch,
        q_positions: torch.Tensor,
        shape: PageShape,
        spec: LayerSpec,
    ) -> None:
        starts = batch.q_starts.cpu().numpy()
        single = np.diff(starts) == 1
        rows = starts[:-1][single]
        places = np.zeros(len(single), dtype=np.int64)
        places[single] = q_positions.cpu().numpy()[rows]
        owner = np.repeat(np.arange(len(single)), np.diff(batch.block_starts.cpu().numpy()))
        numbers, firsts, keys = (x.cpu().numpy() for x in (batch.blocks, batch.firsts, batch.keys))
        at = places[owner]
        seen = single[owner] & (firsts <= at) & (keys > 0)
        if spec.window is not None:
            seen &= firsts + keys - 1 > at - spec.window
        owner = (np.cumsum(single) - 1)[owner[seen]]
        numbers, firsts, keys, at = numbers[seen], firsts[seen], keys[seen], at[seen]

        device, size = q_positions.device, shape.block_size
        self._shape, self._num_rows = shape, len(rows)
        self._in_chunk = -(-CHUNK_KEYS // size)
        chunk, slot = _chunks(owner, firsts, self._in_chunk, size)
        begins = slot == 0
        self.num_chunks = int(begins.sum())
        table = np.repeat(numbers[begins, None], self._in_chunk, axis=1)
        table[chunk, slot] = numbers
        inside = firsts[:, None] + np.arange(size)
        visible = (np.arange(size) < keys[:, None]) & (inside <= at[:, None])
        if spec.window is not None:
            visible &= inside > at[:, None] - spec.window
        hidden = np.ones((*table.shape, size), dtype=bool)
        hidden[chunk, slot] = ~visible
        mask = torch.zeros(self.num_chunks, 1, 1, table[:1].size * size, dtype=shape.dtype)
        mask.masked_fill_(torch.from_numpy(hidden).view(mask.shape), NEG_INF)
        order, offsets = _by_row_and_head(owner[begins], len(rows), spec.num_q_heads)
        in_place = self._in_chunk == 1 and shape.k_dim == shape.v_dim
        self._pieces = _pieces(table, shape.elements * shape.dtype.itemsize, in_place)
        self._mask, self._blocks = mask.to(device), torch.from_numpy(table).to(device)
        self._owner = torch.from_numpy(owner[begins]).to(device)
        self._order, self._offsets = (torch.from_numpy(x).to(device) for x in (order, offsets))
        self.rows = torch.from_numpy(rows).to(device)
        self._held: torch.Tensor | None = None

    def attend(self, q_THD: torch.Tensor, pages: Pages, op: Operator) -> Partial:
        """The partial of ``rows``, ``[R, H, Dv]``, over all that they see in ``pages``."""
        q_RGFD = split_heads(dense(q_THD[self.rows]), self._shape.num_kv_heads)
        heads, v_dim = q_THD.shape[1], self._shape.v_dim
        dtype = torch.float64 if q_THD.dtype == torch.float64 else torch.float32
        out = torch.empty(self.num_chunks, heads, v_dim, dtype=dtype, device=q_THD.device)
        lse = torch.empty(self.num_chunks, heads, dtype=dtype, device=q_THD.device)
        for piece in self._pieces:
            here = slice(piece.begin, piece.end)
            if self._num_rows == 1:
                q = q_RGFD.expand(piece.end - piece.begin, -1, -1, -1)
            else:
                q = q_RGFD[self._owner[here]]
            k, v = self._read(pages, piece)
            part_out, part_lse = op(q, k, v, self._mask[here], False)
            out[here] = part_out.flatten(1, 2)
            lse[here] = part_lse.flatten(1, 2)
        return self._merged(out, lse)

    def _read(self, pages: Pages, piece: _Piece) -> tuple[torch.Tensor, torch.Tensor]:
        """K ``[n, G, S, D]`` and V ``[n, G, S, Dv]`` of a piece's chunks; valid until the next
        call."""
        if piece.number >= 0:
            end = piece.number + piece.end - piece.begin
            found = Pages(pages.data[piece.number : end], self._shape)
            return found.keys(), found.values()
        blocks = self._blocks[piece.begin : piece.end].flatten()
        whole = pages.data[:, : self._shape.elements]
        if self._held is None:  # for the largest piece, and for all layers of the step
            copied = [p.end - p.begin for p in self._pieces if p.number < 0]
            self._held = whole.new_empty(max(copied) * self._in_chunk, whole.shape[1])
        room = self._held[: len(blocks)]
        torch.index_select(whole, 0, blocks, out=room)
        found = Pages(room, self._shape)
        if self._in_chunk == 1:
            return found.keys(), found.values()
        keys, values = (
            x.view(-1, self._in_chunk, *x.shape[1:]).transpose(1, 2).flatten(2, 3)
            for x in (found.keys(), found.values())
        )
        return keys, values

    def _merged(self, out_NHD: torch.Tensor, lse_NH: torch.Tensor) -> Partial:
        """Chunks merged to rows. A sum over a bag is taken in the order of its entries."""
        num_chunks, heads, v_dim = out_NHD.shape
        shape = (self._num_rows, heads)
        top = torch.full(shape, NEG_INF, dtype=lse_NH.dtype, device=lse_NH.device)
        top.scatter_reduce_(0, self._owner[:, None].expand(-1, heads), lse_NH, "amax")
        weights = torch.exp(lse_NH - top[self._owner]).flatten()[self._order]
        mixed = embedding_bag(
            self._order, out_NHD.view(num_chunks * heads, v_dim), self._offsets,
            mode="sum", per_sample_weights=weights,
        )  # fmt: skip
        every = torch.arange(len(weights), device=weights.device)
        mass = embedding_bag(every, weights[:, None], self._offsets, mode="sum").view(shape)
        # The weight of the largest is 1, so that only a row without keys has less.
        mean = mixed.view(*shape, v_dim) / mass.clamp_min(1.0).unsqueeze(-1)
        return Partial(mean, top + torch.log(mass))


def _chunks(owner: Ints, firsts: Ints, in_chunk: int, size: int) -> tuple[Ints, Ints]:
    """Of each block its chunk and its slot in it. Blocks that begin between the same multiples of
    ``in_chunk * size`` tokens share chunks; where runs are short they may be more than fit one."""
    number = np.arange(len(owner))
    stretch = firsts // (in_chunk * size)
    begins = np.ones(len(owner), dtype=bool)
    begins[1:] = (owner[1:] != owner[:-1]) | (stretch[1:] != stretch[:-1])
    place = number - np.maximum.accumulate(np.where(begins, number, 0))
    slot = place % in_chunk
    return np.cumsum(slot == 0) - 1, slot


def _by_row_and_head(owner: Ints, rows: int, heads: int) -> tuple[Ints, Ints]:
    """The entries (chunk, head) in the order (row, head, chunk), and where each (row, head)
    begins."""
    counts = np.bincount(owner, minlength=rows)
    starts = np.cumsum(counts) - counts
    offsets = starts[:, None] * heads + np.arange(heads) * counts[:, None]
    chunk = np.arange(len(owner))
    to = offsets[owner] + (chunk - starts[owner])[:, None]
    order = np.empty(len(owner) * heads, dtype=np.int64)
    order[to] = chunk[:, None] * heads + np.arange(heads)
    return order, offsets.flatten()


def _pieces(table: Ints, block_bytes: int, in_place: bool) -> list[_Piece]:
    """Chunks in pieces: long stretches of blocks where they lie, the others in copies that fit."""
    num_chunks, in_chunk = table.shape
    step = max(1, GATHER_BYTES // (block_bytes * in_chunk))
    found: list[_Piece] = []
    done = 0

    def copied(until: int) -> None:
        for begin in range(done, until, step):
            found.append(_Piece(begin, min(begin + step, until), -1))

    if in_place and num_chunks:
        edges = np.flatnonzero(np.diff(table[:, 0]) != 1) + 1
        bounds = [0, *edges.tolist(), num_chunks]
        for begin, end in zip(bounds, bounds[1:], strict=False):
            if (end - begin) * block_bytes >= VIEW_BYTES:
                copied(begin)
                found.append(_Piece(begin, end, int(table[begin, 0])))
                done = end
    copied(num_chunks)
    return found
