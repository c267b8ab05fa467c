"""What a rank needs before torch starts in it: its CPU threads and its network interface."""

from __future__ import annotations

import os

from ds_cp.config import Config
from ds_cp.topology.job import Job

# torch's watchdog would end the process by an abort when a peer is gone, before the cause is known
# and told. ``World.wait_for_device`` has the deadline instead.
NCCL_ENVIRONMENT = {
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    "TORCH_NCCL_BLOCKING_WAIT": "0",
    "TORCH_NCCL_ENABLE_MONITORING": "0",
}


def choose_threads(config: Config, local_size: int) -> int:
    """CPU threads of one rank before it knows the others: the config's number, or the cores of
    this process shared evenly among the ``local_size`` ranks of the host. ``comm.join`` knows
    better whether a launcher has bound each to its own."""
    if config.threads_per_rank != "auto":
        return config.threads_per_rank
    return max(1, len(os.sched_getaffinity(0)) // max(local_size, 1))


def ranks_at_once(device: str, cores: int, threads: int, ranks: int, sharing: int = 1) -> int:
    """How many ranks of a host like this one can compute at the same time: on CPU as many as its
    ``cores`` give ``threads`` each, else all ``ranks``, of which ``sharing`` take turns on a
    GPU."""
    if device == "cpu":
        return max(1, cores // threads)
    return max(1, ranks // sharing)


def socket_environment(job: Job) -> dict[str, str]:
    """The variables by which gloo and NCCL learn which interface carries the job's traffic, and
    how to fail."""
    if job.interface is None:
        return dict(NCCL_ENVIRONMENT)
    names = {"GLOO_SOCKET_IFNAME": job.interface, "NCCL_SOCKET_IFNAME": job.interface}
    return {**names, **NCCL_ENVIRONMENT}
