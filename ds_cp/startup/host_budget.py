"""How much KV a rank's host memory holds: from the config, checked against what is free."""

from __future__ import annotations

import os
import time

import psutil

from ds_cp.comm.device import synchronize
from ds_cp.comm.wire import World
from ds_cp.config import Config
from ds_cp.errors import ConfigError, is_out_of_memory
from ds_cp.kv.host_store import HostStore, open_store
from ds_cp.kv.pool import KVPool
from ds_cp.startup.kv_budget import budget_of

TRIALS = 3  # of the rate, the fastest counts
TRIAL_BLOCKS = 16  # of one, at most


def decide_slots(
    config: Config, world: World, pool: KVPool, cp_rank: int, cp_size: int, unclaimed: int
) -> int:
    """How many blocks this rank's host memory holds, 0 where the config gives it none. To be called
    when all ranks of the host have their pools, and none has its slots. ``unclaimed``: bytes of the
    pool that the system has still to give. ``ConfigError``, with the numbers, when the room is less
    than a block or more than is free."""
    kv = config.kv_cache
    budget = budget_of(kv.host_memory_per_rank, "host_memory_per_rank", cp_rank, cp_size)
    if not budget:
        return 0
    if kv.host_folder is not None and world.device.type != "cpu":
        raise ConfigError(
            "kv_cache.host_folder is for ranks on CPU: what a GPU keeps on its host is page-locked "
            "memory; leave it out"
        )
    block = pool.block_elements * pool.dtype.itemsize
    slots = budget // block
    if not slots:
        raise ConfigError(
            f"kv_cache.host_memory_per_rank gives cp rank {cp_rank} {budget} bytes, less than one "
            f"block of {block}: raise it, or leave it out"
        )
    free = _free_bytes(world, kv.host_folder) - (unclaimed if kv.host_folder is None else 0)
    if slots * block > free:
        raise _too_large(slots * block, free, cp_rank, kv.host_folder)
    return slots


def open_slots(
    config: Config, world: World, pool: KVPool, slots: int, cp_rank: int
) -> tuple[HostStore | None, float]:
    """``allocate_slots``, and the rate of ``host_gb_per_s``."""
    store = allocate_slots(config, world, pool, slots, cp_rank)
    return store, 0.0 if store is None else host_gb_per_s(world, pool, store)


def allocate_slots(
    config: Config, world: World, pool: KVPool, slots: int, cp_rank: int, later: bool = False
) -> HostStore | None:
    """This rank's ``slots``, None for 0 of them; ``later``: on the CPU, when they are first used.
    ``ConfigError`` when their memory cannot be had."""
    if not slots:
        return None
    need, folder = slots * pool.block_elements * pool.dtype.itemsize, config.kv_cache.host_folder
    try:
        return open_store(pool, slots, folder, later)
    except (OSError, RuntimeError, MemoryError) as err:
        if isinstance(err, RuntimeError) and not is_out_of_memory(err):
            raise
        if folder is not None:
            raise ConfigError(
                f"kv_cache.host_folder {folder} cannot hold {need} bytes for cp rank {cp_rank}: "
                f"{err}; name a folder with room that this user may write to"
            ) from err
        raise _too_large(need, _free_bytes(world, None), cp_rank, None) from err


def _free_bytes(world: World, folder: str | None) -> int:
    """Free bytes for one rank of the host, of memory or of the folder's disk."""
    sharing = world.topology.local_size(world.rank)
    if folder is not None:
        try:
            found = os.statvfs(folder)
        except OSError as err:
            raise ConfigError(
                f"kv_cache.host_folder {folder} cannot be used: {err.strerror}; name a folder that "
                "is there on every host"
            ) from err
        return found.f_bavail * found.f_frsize // sharing
    return int(psutil.virtual_memory().available) // sharing


def _too_large(need: int, free: int, cp_rank: int, folder: str | None) -> ConfigError:
    where = f"in {folder}" if folder is not None else "in memory"
    return ConfigError(
        f"kv_cache.host_memory_per_rank asks for {need} bytes {where} on cp rank {cp_rank}, but "
        f"{max(free, 0)} are free there for each rank: lower it, or use fewer ranks a host"
    )


def host_gb_per_s(world: World, pool: KVPool, store: HostStore) -> float:
    """Measured rate of copies to host memory and back, in 1e9 bytes/s. Every block and slot is
    free: their content does not count."""
    count = min(TRIAL_BLOCKS, store.num_slots, pool.num_blocks)
    numbers, best = list(range(count)), float("inf")
    for _ in range(TRIALS):
        synchronize(world.device)
        began = time.perf_counter()
        store.save(numbers, numbers)
        store.load(numbers, numbers)
        synchronize(world.device)
        best = min(best, time.perf_counter() - began)
    nbytes = 2 * count * pool.block_elements * pool.dtype.itemsize
    return nbytes / max(best, 1e-9) / 1e9
