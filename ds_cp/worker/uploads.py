"""Small vectors from the host to the device without waiting for it."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def on_device(
    values: Sequence[int] | Sequence[float], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """``values`` as a vector on ``device``. From pinned memory where that is a CUDA device: a copy
    from other memory waits until the device has done everything before it."""
    vector = torch.tensor(values, dtype=dtype)
    if device.type == "cuda":
        return vector.pin_memory().to(device, non_blocking=True)
    return vector.to(device)
