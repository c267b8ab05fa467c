"""How many tokens of KV a rank gets: from the config, or from the memory that is free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import psutil
import torch

from ds_cp.attention import LayerSpec
from ds_cp.comm.wire import World
from ds_cp.config import Config
from ds_cp.errors import ConfigError, is_out_of_memory
from ds_cp.kv.pool import KVPool, bytes_per_token
from ds_cp.topology.hosts import Grid

AUTO_MEMORY_SHARE = 0.4  # share of the host's free memory, divided by its ranks
AUTO_GPU_SHARE = 0.85  # share of the device's free memory


@dataclass(frozen=True)
class KVBudget:
    """``tokens``: token slots of this rank, whole blocks; ``reason``: what decided, to be shown.
    ``lazy``: memory is claimed from the system as slots are first written, not at start."""

    tokens: int
    reason: str
    lazy: bool


def decide_budget(
    config: Config,
    world: World,
    grid: Grid,
    cp_rank: int,
    per_token: int,
    max_model_len: int,
    promised: bool = False,
) -> KVBudget:
    """This rank's room for KV; ``per_token``: KV bytes of one token on this rank; ``promised``: the
    job counts on it already, so what is free at the moment decides nothing.

    ``auto`` on CPU is a share of the free memory, but no more than ``max_num_seqs`` requests of
    the model's length can use; on CUDA, where nothing else wants the memory, all of the share.
    Raises ``ConfigError``, with the numbers, when it is less than a block or more than is free.
    """
    kv, size = config.kv_cache, config.kv_cache.block_size
    free, sharing = free_bytes(world)
    lazy = False
    if kv.tokens_per_rank != "auto":
        tokens = budget_of(kv.tokens_per_rank, "tokens_per_rank", cp_rank, grid.cp_size)
        reason = "kv_cache.tokens_per_rank"
    elif kv.memory_per_rank != "auto":
        tokens = (
            budget_of(kv.memory_per_rank, "memory_per_rank", cp_rank, grid.cp_size) // per_token
        )
        reason = "kv_cache.memory_per_rank"
    else:
        cuda = world.device.type == "cuda"
        share = AUTO_GPU_SHARE if cuda else AUTO_MEMORY_SHARE
        tokens = int(free * share) // per_token
        among = f" / {sharing} ranks" if sharing > 1 else ""
        reason = f"auto: {share:.0%} of {free * sharing / 2**30:.1f} GiB free{among}"
        seqs = config.scheduler.max_num_seqs
        longest = -(-max_model_len // size) * size
        if not cuda:
            lazy = True
            if seqs * longest < tokens:
                tokens = seqs * longest
                reason = f"auto: max_num_seqs {seqs} x model length {max_model_len}"
    if tokens < size:
        raise ConfigError(
            f"kv_cache gives cp rank {cp_rank} room for {tokens} tokens ({per_token} bytes each), "
            f"less than one block of {size}: raise the budget or lower kv_cache.block_size"
        )
    if promised:
        return KVBudget(tokens // size * size, reason, world.device.type == "cpu")
    need = tokens // size * size * per_token
    if need > free:
        raise _too_large(need, world, cp_rank)
    return KVBudget(tokens // size * size, reason, lazy)


def allocate_pool(
    budget: KVBudget,
    layers: Sequence[LayerSpec],
    block_size: int,
    packed: bool,
    dtype: torch.dtype,
    world: World,
    cp_rank: int,
) -> KVPool:
    """This rank's KV. ``ConfigError``, with the numbers, when the memory cannot be had."""
    try:
        blocks = budget.tokens // block_size
        return KVPool(
            layers, blocks, block_size, dtype, world.device, packed,
            lazy=budget.lazy, scratch=world.device.type == "cuda",
        )  # fmt: skip
    except (RuntimeError, MemoryError, OSError) as err:
        if not is_out_of_memory(err):
            raise
        need = budget.tokens * bytes_per_token(layers, dtype)
        raise _too_large(need, world, cp_rank) from err


def _too_large(need: int, world: World, cp_rank: int) -> ConfigError:
    free, sharing = free_bytes(world)
    whose = f"for each of the host's {sharing} ranks" if sharing > 1 else "there"
    return ConfigError(
        f"kv_cache asks for {need} bytes on cp rank {cp_rank}, but {free} bytes are free {whose}: "
        "lower kv_cache, or use fewer ranks a host"
    )


def budget_of(budget: int | tuple[int, ...], name: str, cp_rank: int, cp_size: int) -> int:
    """This rank's number out of one for all, or one for each."""
    if isinstance(budget, int):
        return budget
    if len(budget) != cp_size:
        raise ConfigError(
            f"kv_cache.{name} lists {len(budget)} budgets, "
            f"but the job has {cp_size} context-parallel ranks: "
            "give one per rank, or one number for all"
        )
    return budget[cp_rank]


def free_bytes(world: World) -> tuple[int, int]:
    """Free bytes for one rank, and how many ranks share that memory: that of a CUDA device is its
    ranks', that of a host all its ranks'."""
    if world.device.type == "cuda":
        torch.cuda.empty_cache()  # what sharding freed, torch's allocator would keep
        free, _ = torch.cuda.mem_get_info(world.device)
        return int(free) // world.sharing, world.sharing
    sharing = world.topology.local_size(world.rank)
    return int(psutil.virtual_memory().available) // sharing, sharing
