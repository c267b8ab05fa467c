"""A worker that takes the place of one that has died: it loads while the others wait, without them.

What the ranks agreed on when they started is given to it: the kernel, how linear layers compute,
the blocks of its KV and of its host memory. It meets the others afterwards (``meet``), who compare
what it has loaded.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from ds_cp.comm.wire import World
from ds_cp.config import Config
from ds_cp.errors import DsCpError
from ds_cp.facts import Facts
from ds_cp.model.source import find_model
from ds_cp.startup.build import build_worker
from ds_cp.startup.join import choose_device
from ds_cp.topology.hosts import Topology
from ds_cp.topology.job import Job
from ds_cp.worker.worker import Worker


def prepare(config: Config) -> None:
    """Load what takes seconds and does not depend on the job: the libraries, with the module of the
    model's family. What is wrong with the model is said when it is loaded."""
    from ds_cp.model.loading import load_family

    with contextlib.suppress(DsCpError):
        load_family(find_model(config.model))


def build_alone(job: Job, config: Config, facts: Facts) -> Worker:
    """A worker of rank ``job.rank`` in a world of its own. ``facts``: of the worker before it.
    Raises what ``build_worker`` raises. Not for tensor parallelism: a shard needs its group."""
    device = choose_device(config, job.local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.set_num_threads(facts.threads)
    world = World(
        0, Topology.from_hosts([job.host]), device, config.comm.timeout_s, joined=False,
        threads=facts.threads,
    )  # fmt: skip
    agreed = as_agreed(config, facts, job.rank)
    worker, _ = build_worker(world, agreed, None, facts.threads, promised=True)
    return worker


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
