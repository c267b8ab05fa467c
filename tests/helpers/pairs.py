"""How many (query, key) pairs attention computes, counted in two ways: closed form and by tiles."""

from __future__ import annotations

from ds_cp.attention.tiles import cover
from ds_cp.layout import Runs


def causal_work(q_runs: Runs, k_runs: Runs) -> int:
    """Number of (query, key) pairs in which the key's position is not after the query's."""

    def ramp(x: int) -> int:
        """Sum of max(0, i) over all i <= x."""
        return x * (x + 1) // 2 if x > 0 else 0

    pairs = 0
    for q, t in q_runs:
        for k, s in k_runs:
            # query p sees clamp(p - k + 1, 0, s) of these keys: a ramp minus the same ramp s later
            seen = ramp(q + t - k) - ramp(q - k)
            pairs += seen - (ramp(q + t - k - s) - ramp(q - k - s))
    return pairs


def visible_pairs(q_runs: Runs, k_runs: Runs, window: int | None = None) -> int:
    """How many (query, key) pairs attention computes: the work, in pairs."""
    pairs = 0
    for tile in cover(q_runs, k_runs, window):
        if tile.kind == "causal":
            pairs += tile.rows * (tile.rows + 1) // 2
        elif tile.kind == "full":
            pairs += tile.rows * tile.keys
        else:
            for p in range(tile.row_pos, tile.row_pos + tile.rows):
                low = max(tile.key_pos, p - (window or 0) + 1)
                pairs += max(min(tile.key_pos + tile.keys, p + 1) - low, 0)
    return pairs
