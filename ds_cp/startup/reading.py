"""How fast this rank reads the model's weights, measured at start.

A step of few tokens takes what reading all weights takes, on every rank that has a token of it; the
ranks of a host share its memory, so that all of them at once may be slower than one alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch.nn import functional

from ds_cp.comm.device import synchronize
from ds_cp.comm.wire import World
from ds_cp.model.packed_linear import PackedLinear
from ds_cp.model.wiring import Decoder
from ds_cp.startup.agreement import local_phase

TRIALS = 3  # passes over the same weights; of each weight the fastest counts
PASS_S = 0.006  # seconds of the first pass, which says what the others read
MOST_BYTES = 1 << 30  # of a pass: a device that works behind has no clock here
LARGE_BYTES = 1 << 27  # of a weight that is left out where there are smaller ones

Read = tuple[int, Callable[[], object]]  # bytes of a weight, and what multiplies it by one row


def reading_rates(world: World, model: Decoder) -> tuple[float, float]:
    """Bytes of weights a second, by one row: while all ranks read, and while rank 0 alone does,
    which rank 0 alone knows (on others both are the first). Collective; under 0.1 s. One rank has
    nothing to choose by them and does not measure: zeros.

    A rank that fails raises on all of them.
    """
    if world.size == 1:
        return 0.0, 0.0
    reads = local_phase(world, lambda: weight_reads(model))
    shared = local_phase(world, lambda: reading_rate(reads, world.device))
    mine = local_phase(
        world, lambda: reading_rate(reads, world.device) if world.rank == 0 else shared
    )
    return shared, max(shared, mine)


def reading_rate(reads: list[Read], device: torch.device) -> float:
    """Bytes a second. Where ranks take turns on a core, a short read is mostly not interrupted: so
    the fastest of each counts, on a GPU that of a pass."""
    with torch.inference_mode():
        chosen = _first_pass(reads, device)
        nbytes = float(sum(nbytes for nbytes, _ in chosen))
        parts = [chosen] if device.type != "cpu" else [[one] for one in chosen]
        best = [float("inf")] * len(parts)
        for _ in range(TRIALS):
            for i, part in enumerate(parts):
                best[i] = min(best[i], _seconds(part, device))
    return nbytes / max(sum(best), 1e-9)


def _first_pass(reads: list[Read], device: torch.device) -> list[Read]:
    """The reads, from the first on, that fit in the time and bytes of a pass; one at least."""
    began, done = time.perf_counter(), 0
    for number, read in enumerate(reads, 1):
        done += read[0]
        _seconds([read], device)
        if done >= MOST_BYTES or time.perf_counter() - began >= PASS_S:
            return reads[:number]
    return reads


def _seconds(reads: list[Read], device: torch.device) -> float:
    synchronize(device)
    began = time.perf_counter()
    for _, read in reads:
        read()
    synchronize(device)
    return time.perf_counter() - began


def weight_reads(model: Decoder) -> list[Read]:
    """A product of each weight matrix with one row, as the model's own layer computes it where it
    is packed, else by torch; without the sums of tensor parallelism."""
    found: list[Read] = []
    seen: set[int] = set()
    for module in model.modules():
        packed = module.__dict__.get("forward")
        if isinstance(packed, PackedLinear):
            row = torch.ones(1, packed.k, dtype=packed.dtype)
            found.append((packed.n * packed.k * row.element_size(), _packed(packed, row)))
            seen.update(map(id, module._parameters.values()))
    for weight in model.parameters():
        if weight.dim() != 2 or weight.is_meta or id(weight) in seen:
            continue
        if weight.dtype.is_floating_point and weight.numel():
            row = torch.ones(1, weight.shape[1], dtype=weight.dtype, device=weight.device)
            found.append((weight.numel() * weight.element_size(), _plain(weight, row)))
    return [one for one in found if one[0] <= LARGE_BYTES] or found


def _packed(layer: PackedLinear, row: torch.Tensor) -> Callable[[], object]:
    return lambda: layer.alone(row)


def _plain(weight: torch.Tensor, row: torch.Tensor) -> Callable[[], object]:
    return lambda: functional.linear(row, weight)
