"""Tokens that a grammar does not allow, taken out of the logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ds_cp.worker.choose import Row
from ds_cp.worker.uploads import on_device


def masked(logits_RV: torch.Tensor, rows: Sequence[Row]) -> torch.Tensor:
    """``logits_RV`` with -inf where a row's ``allowed`` has no bit; ids beyond it are not allowed.
    A copy, or ``logits_RV`` itself where no row has a grammar.

    Before anything else, as in vLLM: bias, penalties, temperature, filters and log-probabilities
    know the allowed tokens only.
    """
    which = [i for i, row in enumerate(rows) if row.allowed is not None]
    if not which:
        return logits_RV
    V, device = logits_RV.shape[1], logits_RV.device
    size = -(-V // 8)
    packed = bytearray()
    for i in which:
        packed += (rows[i].allowed or b"")[:size].ljust(size, b"\0")
    bytes_SB = torch.frombuffer(packed, dtype=torch.uint8).view(len(which), size).to(device)
    bits = torch.arange(8, device=device)
    table = (torch.arange(256, device=device)[:, None] >> bits) & 1 == 0  # [256, 8]: bit not set
    # The eight of a byte at once, as one integer: many times faster than as eight elements.
    banned_SV = table.view(torch.int64)[:, 0][bytes_SB.int()].view(torch.bool)[:, :V]
    if len(which) == len(rows):
        return logits_RV.masked_fill(banned_SV, -torch.inf)
    at = on_device(which, torch.int64, device)
    return logits_RV.index_copy(0, at, logits_RV[at].masked_fill_(banned_SV, -torch.inf))
