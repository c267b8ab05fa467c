"""Batched decode: the newest token of many sequences, each whole on this rank, in one kernel call.

For short sequences a kernel call each costs more than the attention itself, so their keys are
gathered side by side, padded to one length, and attended together.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ds_cp.attention.kernels import Kernel
from ds_cp.attention.spec import LayerSpec, Padding
from ds_cp.attention.state import NEG_INF, Partial
from ds_cp.layout import tail, total

Extents = Sequence[tuple[int, int]]  # (first slot, length), in the order of the positions

LONGEST = 2048  # keys of a batched sequence at most; copying more costs more than a call (measured)
GATHERED = 16_384  # keys of one call at most, padding included; bounds the copy
WASTE = 1.25  # keys with padding over keys without, at most
ALIGN = 16  # keys; padded lengths are multiples of it, which CUDA asks of a mask


class BatchedDecode:
    """One step's decoding requests. Row i is the newest token of the sequence whose keys are at
    ``extents[i]``, its own key last; called once per layer."""

    def __init__(
        self, extents: Sequence[Extents], dtype: torch.dtype, device: torch.device
    ) -> None:
        self._extents = [list(parts) for parts in extents]
        self._dtype = dtype
        self._device = device
        self._groups: dict[int | None, list[_Group]] = {}  # by window

    @property
    def num_rows(self) -> int:
        """Decoding requests, one row each."""
        return len(self._extents)

    def __call__(
        self, q_BHD: torch.Tensor, kv: torch.Tensor, kernel: Kernel, spec: LayerSpec
    ) -> Partial:
        """Attention of B rows over their own keys: the partial over all of them, ``[B, H, D]``.

        ``q_BHD``: one query per row; ``kv``: ``[2, G, slots, D]``, keys and values of one layer.
        """
        groups = self._groups.get(spec.window)
        if groups is None:
            groups = self._groups[spec.window] = self._grouped(spec.window)
        if len(groups) == 1:  # in the order of the rows
            return kernel.rows(q_BHD, *groups[0].gather(kv), groups[0].padding, spec)
        parts = [
            kernel.rows(q_BHD[group.rows], *group.gather(kv), group.padding, spec)
            for group in groups
        ]
        back = torch.cat([group.rows for group in groups]).argsort()
        return Partial(
            torch.cat([part.out for part in parts])[back],
            torch.cat([part.lse for part in parts])[back],
        )

    def _grouped(self, window: int | None) -> list[_Group]:
        """Group rows of about one length, within ``WASTE`` and ``GATHERED``."""
        seen = [_in_window(parts, window) for parts in self._extents]
        lengths = [total(parts) for parts in seen]
        groups: list[list[int]] = []
        filled = 0
        for row in sorted(range(len(seen)), key=lengths.__getitem__):
            padded = (len(groups[-1]) + 1) * lengths[row] if groups else 0
            if not groups or padded > min(WASTE * (filled + lengths[row]), GATHERED):
                groups.append([])
                filled = 0
            groups[-1].append(row)
            filled += lengths[row]
        return [
            _Group(sorted(rows), [seen[row] for row in sorted(rows)], self._dtype, self._device)
            for rows in groups
        ]


class _Group:
    """Rows whose keys are gathered to one length. Padding repeats the row's last key: a freed block
    may hold NaN, which a mask does not hide from the product with the values."""

    def __init__(
        self, rows: list[int], extents: list[Extents], dtype: torch.dtype, device: torch.device
    ) -> None:
        lengths = torch.tensor([total(parts) for parts in extents])
        longest = -(-int(lengths.max()) // ALIGN) * ALIGN
        places = torch.arange(longest)
        first = torch.tensor([parts[0][0] for parts in extents])
        last = torch.tensor([parts[-1][0] + parts[-1][1] - 1 for parts in extents])
        slots = torch.minimum(first[:, None] + places, last[:, None])
        for row, parts in enumerate(extents):
            if len(parts) > 1:
                known = torch.cat([torch.arange(slot, slot + n) for slot, n in parts])
                slots[row, : len(known)] = known
                slots[row, len(known) :] = last[row]
        mask = torch.zeros(len(rows), 1, 1, longest, dtype=dtype)
        mask.masked_fill_((places >= lengths[:, None])[:, None, None], NEG_INF)
        self.rows = torch.tensor(rows, device=device)
        self.padding = Padding(lengths.to(device, torch.int32), mask.to(device))
        self._slots = slots.flatten().to(device)
        self._shape = (2, -1, len(rows), longest)
        self._held: torch.Tensor | None = None

    def gather(self, kv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of the group's rows, ``[B, G, S, D]`` each; valid until the next call."""
        shape = (*kv.shape[:2], len(self._slots), kv.shape[3])
        if self._held is None or self._held.shape != shape:  # layers may differ
            self._held = kv.new_empty(shape)
        torch.index_select(kv, 2, self._slots, out=self._held)
        keys, values = self._held.view(*self._shape, kv.shape[3]).transpose(1, 2)
        return keys, values


def _in_window(extents: Extents, window: int | None) -> Extents:
    """The last ``window`` slots of a sequence; all of them without a window."""
    if window is None:
        return extents
    return tail(tuple(extents), min(window, total(extents)))
