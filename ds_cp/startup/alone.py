"""A worker that takes the place of one that has died: it loads while the others wait, without them.

What the ranks agreed on when they started is given to it: the kernel, how linear layers compute,
the blocks of its KV and of its host memory. It meets the others afterwards (``meet``), who compare
what it has loaded.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from ds_cp.comm.wire import World, import_libraries
from ds_cp.config import Config
from ds_cp.errors import ConfigError, DsCpError
from ds_cp.facts import Facts
from ds_cp.model.linear import is_packed
from ds_cp.model.source import find_model
from ds_cp.startup.build import build_worker
from ds_cp.startup.host_budget import allocate_slots
from ds_cp.startup.join import choose_device
from ds_cp.startup.kernel_choice import choose_for_all
from ds_cp.startup.kv_budget import KVBudget, allocate_pool
from ds_cp.startup.preload import Preloaded
from ds_cp.topology.hosts import Topology
from ds_cp.topology.job import Job
from ds_cp.worker.worker import Worker


def prepare(config: Config) -> None:
    """Load what takes seconds and does not depend on the job: the libraries, with the module of the
    model's family. What is wrong with the model is said when it is loaded."""
    from ds_cp.model.loading import load_family

    import_libraries()
    with contextlib.suppress(DsCpError):
        load_family(find_model(config.model))


def build_alone(
    job: Job, config: Config, facts: Facts, preloaded: Preloaded | None = None
) -> Worker:
    """A worker of rank ``job.rank`` in a world of its own. ``facts``: of the worker before it;
    ``preloaded``: its model, where it is loaded already. Raises what ``build_worker`` raises. Not
    for tensor parallelism: a shard needs its group."""
    device = choose_device(config, job.local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.set_num_threads(facts.threads)
    world = _own_world(job, config, device, facts.threads)
    agreed = as_agreed(config, facts, job.rank)
    worker, _ = build_worker(world, agreed, preloaded, facts.threads, promised=True)
    return worker


def build_unchecked(job: Job, config: Config, facts: Facts, preloaded: Preloaded) -> Worker:
    """The same on the CPU, where a worker with the very same weights has been compared with
    transformers. Runs on one thread; no memory is taken for KV before it is written to. Raises
    ``ConfigError`` where the model is not packed as it was there."""
    config = as_agreed(config, facts, job.rank)
    world = _own_world(job, config, torch.device("cpu"), 1)
    loaded, prepared = preloaded.load(), preloaded.prepare()
    decoder, layers = loaded.decoder, prepared.layers
    if is_packed(decoder) != facts.packed:
        raise ConfigError("linear layers are not computed as in the worker before")
    kernel = choose_for_all(world, config, decoder.dtype, layers).kernel
    size = facts.block_size
    budget = KVBudget(facts.blocks_per_rank[job.rank] * size, "as agreed", lazy=True)
    pool = allocate_pool(budget, layers, size, kernel.packed, decoder.dtype, world, 0)
    slots = facts.host_blocks_per_rank[job.rank] if facts.host_blocks_per_rank else 0
    # Made by the worker that is forked: the server's would be that of all.
    store = allocate_slots(config, world, pool, slots, job.rank, later=True)
    worker = Worker(world, world.everybody, world.everybody, decoder, layers, pool, kernel, store)
    worker.fingerprint = loaded.fingerprint
    return worker


def _own_world(job: Job, config: Config, device: torch.device, threads: int) -> World:
    return World(
        0, Topology.from_hosts([job.host]), device, config.comm.timeout_s, joined=False,
        threads=threads,
    )  # fmt: skip


def as_agreed(config: Config, facts: Facts, rank: int) -> Config:
    """``config`` with what start-up decided in place of what it left open, for ``rank`` alone."""

    def change(section: Any, **values: Any) -> Any:
        return section.model_copy(update=values)

    attention, linear = config.attention, config.linear_layers
    if attention.backend == "auto":
        attention = change(attention, backend=facts.kernel)
    if linear == "auto" and facts.device == "cpu":
        linear = "packed" if facts.packed else "torch"
    tokens = facts.blocks_per_rank[rank] * facts.block_size
    slots = facts.host_blocks_per_rank[rank] if facts.host_blocks_per_rank else 0
    kv = change(
        config.kv_cache, tokens_per_rank=tokens, memory_per_rank="auto",
        host_memory_per_rank=slots * facts.block_size * facts.bytes_per_token,
    )  # fmt: skip
    changed: Config = change(
        config,
        attention=attention,
        linear_layers=linear,
        max_model_len=facts.max_model_len,
        context_parallel=change(config.context_parallel, size="auto"),
        kv_cache=kv,
        trace=change(config.trace, file=None),
    )
    return changed
