"""How fast this rank computes, measured at start while all ranks do the same."""

from __future__ import annotations

import time

import torch

from ds_cp.comm.device import synchronize

ROWS = 256  # tokens of one trial
TRIALS = 3  # the fastest counts


def achieved_flops(hidden: int, dtype: torch.dtype, device: torch.device) -> float:
    """Floating point operations per second of a linear layer ``[hidden, 4 hidden]``, the fastest
    of a few trials; takes milliseconds."""
    x = torch.ones(ROWS, hidden, dtype=dtype, device=device)
    weight = torch.ones(4 * hidden, hidden, dtype=dtype, device=device)
    best = float("inf")
    with torch.inference_mode():
        for _ in range(TRIALS):
            synchronize(device)
            began = time.perf_counter()
            torch.nn.functional.linear(x, weight)
            synchronize(device)
            best = min(best, time.perf_counter() - began)
    return 2.0 * ROWS * hidden * 4 * hidden / best
