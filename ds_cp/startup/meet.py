"""Workers that have left their groups meet again, under the next generation."""

from __future__ import annotations

from collections.abc import Callable, Collection

from ds_cp.comm.failure import failing
from ds_cp.config import Config
from ds_cp.errors import ModelError, TopologyError
from ds_cp.facts import Facts
from ds_cp.startup.agreement import agreed, gather_blocks
from ds_cp.startup.fingerprint import agree_on_model
from ds_cp.startup.join import join_job
from ds_cp.topology.hosts import resolve_grid
from ds_cp.topology.job import Job
from ds_cp.worker.worker import Worker

ARRIVE_S = 30.0  # seconds to wait for the others, who are all called at once


def meet_again(
    job: Job,
    config: Config,
    worker: Worker,
    facts: Facts,
    generation: int,
    born: int,
    given_up: Callable[[], bool] = lambda: False,
    away: Collection[int] = (),
) -> None:
    """Join the other ranks with ``worker``, which is in no group, and have it go on there.
    ``facts``: those of the start. ``born``: the first generation of this process; ``given_up``: as
    in ``comm.join``; ``away``: ranks without which the others meet.

    Collective. Raises ``CommError`` when not all of them come: the worker is in no group then, and
    may be called again. ``TopologyError``, ``ModelError``, on all ranks, when one of them is not
    what was there at the start.
    """
    left = worker.world if worker.world.raw_store is not None else None  # or it loaded alone
    members = [rank for rank in range(job.world_size) if rank not in away]
    world, _ = join_job(
        job, config, generation, born, left, min(ARRIVE_S, config.comm.timeout_s), given_up,
        members, facts.hosts,
    )  # fmt: skip
    with failing(world):
        if world.topology.hosts != facts.hosts:
            raise agreed(world, TopologyError(
                f"the job began on hosts {list(facts.hosts)} and met again on "
                f"{list(world.topology.hosts)}: start it anew"
            ))  # fmt: skip
        sizes = config.context_parallel.size, config.tensor_parallel.tp_size
        grid = resolve_grid(world.topology, *sizes)
        cp = world.group("cp", grid.cp_groups())
        tp = world.group("tp", grid.tp_groups())
        agree_on_model(world, worker.fingerprint)
        slots = facts.host_blocks_per_rank or (0,) * cp.size
        for where, mine, began in (
            ("", worker.pool.num_blocks, facts.blocks_per_rank),
            (" in host memory", worker.mover.num_slots, slots),
        ):
            found = gather_blocks(world, mine)
            blocks = tuple(
                found[rank] if rank in members else began[rank // grid.tp_size]
                for rank in range(0, world.size, grid.tp_size)
            )
            if blocks != began:
                raise agreed(world, ModelError(
                    f"the ranks began with KV blocks {list(began)}{where} and met again with "
                    f"{list(blocks)} (this is a fault of ds_cp)"
                ))  # fmt: skip
    worker.enter(world, cp, tp)
