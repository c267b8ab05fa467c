"""What a layer and a hop of a ring take beside their work, measured at start: Python, launches.

A short prompt has so little work that these decide whether it gains anything by more ranks.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch

from ds_cp.attention import choose_kernel
from ds_cp.comm.device import synchronize
from ds_cp.comm.wire import Group, World
from ds_cp.kv.pool import KVPool
from ds_cp.model.tiny import tiny_decoder
from ds_cp.model.wiring import CONTEXT, Decoder, probe_layers
from ds_cp.plan import Begin, Chunk, Sampling, StepPlan
from ds_cp.startup.agreement import local_phase
from ds_cp.startup.packing import plan_packing
from ds_cp.worker.state import WorkerState
from ds_cp.worker.step_context import Layers, StepContext

BLOCK = 16  # tokens, all that a rank has
LAYERS = 4
TRIALS = 7  # the median counts: what is usual, not what is possible


@dataclass(frozen=True)
class Overheads:
    """Seconds, on rank 0. ``layer_s``: of a layer of a forward call; ``hop_s``: what a ring of two
    ranks adds to it for a prompt of a block, its wire's latency and all."""

    layer_s: float
    hop_s: float


def measure_overheads(world: World, cp: Group, dtype: torch.dtype) -> Overheads:
    """By a decoder of next to no work, alone and over two ranks of ``cp``. Collective; takes about
    0.1 s. Ranks from the third on, which wait, know no ``hop_s``; one rank has nothing to choose by
    these and does not measure them."""
    if cp.size == 1:
        return Overheads(0.0, 0.0)
    layers = local_phase(world, lambda: _decoder(world, cp, dtype))
    alone = local_phase(world, lambda: _seconds(world, *layers, _local(cp.rank)))
    if cp.rank > 1:
        return Overheads(alone / LAYERS, 0.0)
    # In turns, so that both are taken under the same load; a ring brings its ranks together.
    times = [
        (_seconds(world, *layers, _local(cp.rank)), _seconds(world, *layers, _ring()))
        for _ in range(TRIALS)
    ]
    alone, ring = (statistics.median(each) for each in zip(*times, strict=True))
    return Overheads(alone / LAYERS, max(0.0, ring - alone) / LAYERS)


def _decoder(world: World, cp: Group, dtype: torch.dtype) -> tuple[Decoder, Layers]:
    with torch.random.fork_rng(devices=[]):  # the caller's own draws stay what they are
        model = tiny_decoder(LAYERS, dtype, world.device)
    specs = probe_layers(model)
    kernel = choose_kernel("auto", world.device, dtype, specs, BLOCK, check=False).kernel
    plan_packing("auto", model, world, kept=False)()
    return model, Layers(
        specs, KVPool(specs, 1, BLOCK, dtype, world.device, kernel.packed), kernel, cp
    )


def _local(rank: int) -> StepPlan:
    """A prompt of a block on ``rank``."""
    return _plan(((rank, ((0, BLOCK),)),), ((rank, 0),), ("local", "kv"))


def _ring() -> StepPlan:
    """A prompt of a block, half on each of two ranks and stored on the first: so short that it has
    no block for each, it sends its KV there in every layer."""
    half = BLOCK // 2
    owners = tuple((rank, ((rank * half, half),)) for rank in (0, 1))
    return _plan(owners, ((0, 0),), ("ring", "kv"))


def _plan(
    owners: tuple[tuple[int, tuple[tuple[int, int], ...]], ...],
    homes: tuple[tuple[int, int], ...],
    mode: tuple[str, str],
) -> StepPlan:
    tokens = tuple(range(1, len(homes) * BLOCK + 1))
    begin = Begin(1, tokens, len(tokens), (), 0, Sampling(temperature=0.0))
    return StepPlan(0, begins=(begin,), chunks=(Chunk(1, *mode, owners, homes, True),))


def _seconds(world: World, model: Decoder, layers: Layers, plan: StepPlan) -> float:
    """Of one call."""
    work = WorkerState(layers.group.rank, BLOCK).apply(plan)
    with torch.inference_mode():
        synchronize(world.device)
        began = time.perf_counter()
        step = StepContext(work, layers)
        model(input_ids=step.ids, position_ids=step.positions, use_cache=False, **{CONTEXT: step})
        synchronize(world.device)
        return time.perf_counter() - began
