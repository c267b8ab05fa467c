"""One kernel for all ranks: pages travel between them, and all must read these alike."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ds_cp.attention import LayerSpec
from ds_cp.attention.kernels.choose import Candidates, Choice, Told, agree_on_kernel, find_kernels
from ds_cp.comm.wire import World
from ds_cp.config import Config
from ds_cp.startup.agreement import gather_told, local_phase

EVERY = 99  # more than there are


def choose_for_all(
    world: World, config: Config, dtype: torch.dtype, layers: Sequence[LayerSpec]
) -> Choice:
    """The best kernel that works on every rank, with a line for each that would have come before.
    Collective. Raises ``ConfigError``, on every rank, when there is none."""
    name, size = config.attention.backend, config.kv_cache.block_size

    def look(enough: int) -> tuple[Candidates, list[Told]]:
        found = local_phase(
            world,
            lambda: find_kernels(
                name, world.device, dtype, layers, size,
                enough=enough, deterministic=config.attention.deterministic,
            ),
        )  # fmt: skip
        return found, [Told(*told) for told in gather_told(world, *found.told())]

    found, ranks = look(1)
    if any(told.names != ranks[0].names for told in ranks):  # then what else is there
        found, ranks = look(EVERY)
    hosts = world.topology.hosts
    return local_phase(world, lambda: agree_on_kernel(name, found, ranks, hosts))
