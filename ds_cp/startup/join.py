"""A process takes its place in the job: CPU threads, device, rendezvous."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ds_cp.comm.wire import Rendezvous, World, join
from ds_cp.config import Config
from ds_cp.errors import ConfigError
from ds_cp.startup.own_port import config_digest, own_port
from ds_cp.topology.job import Job


def join_job(
    job: Job,
    config: Config,
    generation: int = 0,
    born: int = 0,
    left: World | None = None,
    arrive_s: float | None = None,
    given_up: Callable[[], bool] = lambda: False,
    members: Sequence[int] | None = None,
    began: Sequence[str] | None = None,
) -> tuple[World, int]:
    """Join the other ranks. Returns the world and this rank's number of CPU threads. What follows
    ``config`` is for later meetings, as in ``comm.join``.

    Raises ``ConfigError`` when there is no device for this rank, ranks share one under NCCL, or
    have other configs,
    ``CommError`` when not all ranks arrive in ``comm.timeout_s``, ``LaunchError`` when rank 0
    cannot listen.
    """
    listen_fd = job.store_socket.fileno() if job.store_socket else None
    device = choose_device(config, job.local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    world = join(
        job.rank,
        job.world_size,
        Rendezvous(
            job.store_host,
            job.store_port,
            listen_fd,
            generation,
            own_port(job, config, "store") if job.by_port else None,
        ),
        host=job.host,
        hosts=job.hosts,
        device=device,
        timeout_s=config.comm.timeout_s,
        digest=config_digest(config),
        backend=config.comm.backend,
        shared_memory=config.comm.shared_memory,
        threads=None if config.threads_per_rank == "auto" else config.threads_per_rank,
        arrive_s=arrive_s,
        born=born,
        left=left,
        given_up=given_up,
        members=members,
        began=began,
    )
    torch.set_num_threads(world.threads)
    return world, world.threads


def choose_device(config: Config, local_rank: int) -> torch.device:
    """This rank's device. Ranks of a host take its CUDA devices in turn, so that several share one
    where there are more ranks. ``ConfigError`` when the config asks for CUDA and there is none."""
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if config.device == "cuda" and not there:
        raise ConfigError(
            "device is cuda, but torch finds no CUDA device on this host: "
            "set device to cpu or auto, or look at what nvidia-smi and torch.version.cuda say"
        )
    if config.comm.backend == "nccl" and (config.device == "cpu" or not there):
        why = "device is cpu" if config.device == "cpu" else "this host has none"
        raise ConfigError(
            f"comm.backend nccl carries tensors of CUDA devices, but {why}: "
            "set comm.backend to gloo or auto"
        )
    if config.device == "cpu" or not there:
        return torch.device("cpu")
    return torch.device("cuda", local_rank % there)
