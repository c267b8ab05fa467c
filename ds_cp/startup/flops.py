"""How fast this rank computes, measured at start while all ranks do the same."""

from __future__ import annotations

import time

import torch

from ds_cp.comm.device import synchronize

ROWS = {"cpu": 64, "cuda": 256}  # tokens of one trial
TRIALS = {"cpu": 12, "cuda": 3}  # the fastest counts
MOST_HIDDEN = {"cpu": 1024, "cuda": 1 << 20}  # features of a trial


def achieved_flops(hidden: int, dtype: torch.dtype, device: torch.device) -> float:
    """Floating point operations per second of a linear layer ``[hidden, 4 hidden]``, the fastest
    of a few trials; takes milliseconds. On a CPU trials are short and many: where ranks take turns
    on a core, a trial of more than its turn would count the turns of others too."""
    rows, hidden = ROWS[device.type], min(hidden, MOST_HIDDEN[device.type])
    x = torch.ones(rows, hidden, dtype=dtype, device=device)
    weight = torch.ones(4 * hidden, hidden, dtype=dtype, device=device)
    best = float("inf")
    with torch.inference_mode():
        for _ in range(TRIALS[device.type]):
            synchronize(device)
            began = time.perf_counter()
            torch.nn.functional.linear(x, weight)
            synchronize(device)
            best = min(best, time.perf_counter() - began)
    return 2.0 * rows * hidden * 4 * hidden / best
