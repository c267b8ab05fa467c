"""What both ways of choosing tokens share: a row, the best of scores, and the random numbers."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ds_cp.plan import Sampling
from ds_cp.worker.history import History

COLDEST = 1e-5  # least temperature: dividing by less would overflow
LEAST = 1e-30  # least top_p and repetition_penalty: less would be 0 in fp32
HIGHEST = 1e30  # largest score, so that it is finite in fp32 after division by COLDEST
BLOCK = 256  # ids among which the best is looked for at once


@dataclass(frozen=True, slots=True)
class Row:
    """One token to draw. ``index``: the number of output tokens before it. ``history``: the tokens
    so far, needed only when ``how.penalizes``. ``allowed``: under a grammar, the tokens that may
    come: bit ``i % 8`` of byte ``i // 8`` for token i."""

    request: int
    index: int
    how: Sampling
    history: History | None = None
    allowed: bytes | None = None

    @property
    def bans(self) -> bool:
        """Whether ids that end the answer are still out of reach."""
        return bool(self.how.early_banned) and self.index < self.how.min_tokens

    @property
    def is_plain(self) -> bool:
        """Whether the best of the model's own logits is all that is wanted."""
        how = self.how
        return (
            how.temperature == 0.0
            and how.logprobs < 0
            and not how.logit_bias
            and not how.penalizes
            and not self.bans
        )

    @property
    def uniform(self) -> float:
        """The row's random number in [0, 1), named by (seed, index)."""
        return (_mix(_mix(self.how.seed) + self.index) >> 11) / 2**53


def best_ids(scores_RV: torch.Tensor) -> torch.Tensor:
    """The best id of each row of ``[R, V]``, the lowest of equals, int64 ``[R]``; -1 where the best
    is not finite.

    A search by blocks: on a CPU, finding a maximum is many times faster than finding its place.
    """
    V = scores_RV.shape[1]
    width = min(BLOCK, V)
    whole = V - V % width
    peaks_RB = scores_RV[:, :whole].reshape(-1, whole // width, width).amax(dim=2)
    if whole < V:
        rest = scores_RV[:, whole:].amax(dim=1, keepdim=True)
        peaks_RB = torch.cat((peaks_RB, rest), dim=1)
    peak = peaks_RB.max(dim=1)  # the first of equals; NaN counts as higher than all numbers
    start = (peak.indices * width).clamp(max=V - width)
    block = start[:, None] + torch.arange(width, device=start.device)
    tokens = start + scores_RV.gather(1, block).max(dim=1).indices
    return tokens.masked_fill(~torch.isfinite(peak.values), -1)


def _mix(x: int) -> int:
    """splitmix64 (Steele, Lea, Flood 2014): 64 bits, each of them from every bit of ``x``.
    torch's CPU generator would look at the low 32 bits of a seed only."""
    x = (x + 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31
