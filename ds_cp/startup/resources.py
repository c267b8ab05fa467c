"""What a rank needs before torch starts in it: its CPU threads and its network interface."""

from __future__ import annotations

import os

from ds_cp.config import Config
from ds_cp.topology.job import Job


def choose_threads(config: Config, local_size: int) -> int:
    """CPU threads of one rank: the config's number, or the cores of this process shared evenly
    among the ``local_size`` ranks of the host."""
    if config.threads_per_rank != "auto":
        return config.threads_per_rank
    return max(1, len(os.sched_getaffinity(0)) // max(local_size, 1))


def ranks_at_once(device: str, threads: int, ranks: int) -> int:
    """How many ranks of a host like this one can compute at the same time: on CPU as many as the
    cores give ``threads`` each, else all ``ranks``."""
    return max(1, len(os.sched_getaffinity(0)) // threads) if device == "cpu" else ranks


def socket_environment(job: Job) -> dict[str, str]:
    """The variables by which gloo and NCCL learn which interface carries the job's traffic."""
    if job.interface is None:
        return {}
    return {"GLOO_SOCKET_IFNAME": job.interface, "NCCL_SOCKET_IFNAME": job.interface}
