"""A process takes its place in the job: CPU threads, device, rendezvous."""

from __future__ import annotations

import torch

from ds_cp.comm.wire import Rendezvous, World, join
from ds_cp.config import Config
from ds_cp.errors import ConfigError
from ds_cp.startup.resources import choose_threads
from ds_cp.topology.job import Job


def join_job(job: Job, config: Config) -> tuple[World, int]:
    """Join the other ranks. Returns the world and this rank's number of CPU threads.

    Raises ``ConfigError`` when there is no device for this rank or ranks have other configs,
    ``CommError`` when not all ranks arrive in ``comm.timeout_s``, ``LaunchError`` when rank 0
    cannot listen.
    """
    listen_fd = job.store_socket.fileno() if job.store_socket else None
    threads = choose_threads(config, job.local_world_size or 1)
    torch.set_num_threads(threads)
    device = choose_device(config, job.local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    world = join(
        job.rank,
        job.world_size,
        Rendezvous(job.store_host, job.store_port, listen_fd),
        host=job.host,
        hosts=job.hosts,
        device=device,
        timeout_s=config.comm.timeout_s,
        digest=config.model_dump_json(exclude={"server"}),
    )
    return world, threads


def choose_device(config: Config, local_rank: int) -> torch.device:
    """This rank's device: CUDA for nccl, and for "auto" where there is any; NCCL needs one device
    for each rank: ``ConfigError`` when there are fewer."""
    backend = config.comm.backend
    if backend == "gloo" or (backend == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"comm.backend {backend} needs one CUDA device per rank, "
            f"but local rank {local_rank} has none of {torch.cuda.device_count()}: "
            "start fewer ranks, or set comm.backend to gloo"
        )
    return torch.device("cuda", local_rank)
