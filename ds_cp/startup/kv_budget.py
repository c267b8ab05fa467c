"""How many tokens of KV a rank gets: from the config, or from the memory that is free."""

from __future__ import annotations

import psutil
import torch

from ds_cp.comm.wire import World
from ds_cp.config import Config
from ds_cp.errors import (
    ConfigError,
)
from ds_cp.topology.hosts import Grid

AUTO_MEMORY_SHARE = 0.4  # of the host's free memory, divided by its ranks
AUTO_GPU_SHARE = 0.85  # of the device's free memory


def tokens_of_rank(
    config: Config, world: World, grid: Grid, cp_rank: int, per_token: int, max_model_len: int
) -> int:
    """Token slots of this rank: whole blocks, within the budget."""
    kv, size = config.kv_cache, config.kv_cache.block_size
    local = world.topology.local_size(world.rank)
    if kv.tokens_per_rank != "auto":
        tokens = _one(kv.tokens_per_rank, "tokens_per_rank", cp_rank, grid.cp_size)
    elif kv.memory_per_rank != "auto":
        tokens = _one(kv.memory_per_rank, "memory_per_rank", cp_rank, grid.cp_size) // per_token
    else:
        wanted = -(-max_model_len // size) * size
        tokens = min(wanted, _free_bytes(world.device, local) // per_token)
    if tokens < size:
        raise ConfigError(
            f"kv_cache gives cp rank {cp_rank} room for {tokens} tokens ({per_token} bytes "
            "each), less than "
            f"one block of {size}: raise the budget or lower kv_cache.block_size"
        )
    need, free = tokens // size * size * per_token, _free_bytes(world.device, local, share=1.0)
    if need > free:
        raise ConfigError(
            f"kv_cache asks for {need} bytes on cp rank {cp_rank}, but {free} are free for each "
            "of the "
            f"host's {local} ranks: lower kv_cache, or use fewer ranks a host"
        )
    return tokens // size * size


def _one(budget: int | tuple[int, ...], name: str, cp_rank: int, cp_size: int) -> int:
    if isinstance(budget, int):
        return budget
    if len(budget) != cp_size:
        raise ConfigError(
            f"kv_cache.{name} lists {len(budget)} budgets, but the job has {cp_size} "
            "context-parallel ranks: "
            "give one per rank, or one number for all"
        )
    return budget[cp_rank]


def _free_bytes(device: torch.device, local_ranks: int, share: float | None = None) -> int:
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free * (share or AUTO_GPU_SHARE))
    return int(psutil.virtual_memory().available * (share or AUTO_MEMORY_SHARE) / local_ranks)
