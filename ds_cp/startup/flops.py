"""How fast this rank computes, measured at start while all ranks do the same."""

from __future__ import annotations

import time

import torch

ROWS = 256  # tokens of the trial
TRIALS = 3


def achieved_flops(hidden: int, dtype: torch.dtype, device: torch.device) -> float:
    """Floating point operations per second of a linear layer of the model's width, best of a few;
    takes milliseconds."""
    x = torch.ones(ROWS, hidden, dtype=dtype, device=device)
    weight = torch.ones(4 * hidden, hidden, dtype=dtype, device=device)
    best = float("inf")
    with torch.inference_mode():
        for _ in range(TRIALS):
            _wait(device)
            began = time.perf_counter()
            torch.nn.functional.linear(x, weight)
            _wait(device)
            best = min(best, time.perf_counter() - began)
    return 2.0 * ROWS * hidden * 4 * hidden / best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
