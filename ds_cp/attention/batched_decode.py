"""One new token each of many sequences that are whole on this rank: one kernel call for all.

While sequences are short a kernel call for each of them costs more than the attention itself, so
their keys are gathered side by side, padded to one length, and attended together.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ds_cp.attention.kernels import Kernel, Padding
from ds_cp.attention.spec import LayerSpec
from ds_cp.attention.state import NEG_INF, Partial
from ds_cp.layout import tail, total

Extents = Sequence[tuple[int, int]]  # (first slot, length), in the order of the positions

LONGEST = 2048  # keys; of a longer sequence the copy costs more than a call of its own (measured)
GATHERED = 16_384  # keys that are gathered at once, padding included: what bounds the copy
WASTE = 1.25  # keys with padding / keys at most
ALIGN = 16  # padded lengths are multiples: CUDA's masks have to be


class BatchedDecode:
    """One step's streams. Row i is the newest token of the sequence whose keys are at
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
        return len(self._extents)

    def __call__(
        self, q_BHD: torch.Tensor, kv: torch.Tensor, kernel: Kernel, spec: LayerSpec
    ) -> Partial:
        """``q_BHD [B, H, D]`` of the B streams, ``kv [2, G, slots, D]`` of one layer -> the partial
        over all their keys."""
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
        """Rows of about one length together, and no more at once than the bounds allow."""
        seen: Sequence[Extents] = self._extents
        if window is not None:
            seen = [tail(parts, min(total(parts), window)) for parts in seen]
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
    """Rows whose keys are gathered to one length. A padded place repeats the row's last key, which
    is a number, unlike what a freed block may hold."""

    def __init__(
        self, rows: list[int], extents: list[Extents], dtype: torch.dtype, device: torch.device
    ) -> None:
        lengths = torch.tensor([sum(n for _, n in parts) for parts in extents])
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
