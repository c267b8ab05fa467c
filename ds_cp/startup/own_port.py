"""Where and as whom a process of a job on several hosts comes to rank 0's port."""

from __future__ import annotations

import hashlib
import os

from ds_cp.config import Config
from ds_cp.link.knock import Port
from ds_cp.link.seal import Claim, Purpose
from ds_cp.topology.job import Job
from ds_cp.version import __version__


def config_digest(config: Config) -> str:
    """What all ranks must have in common, as text."""
    return config.model_dump_json(exclude={"server"})


def own_port(job: Job, config: Config, purpose: Purpose) -> Port:
    """For this process; its claim is also what rank 0 compares others with."""
    mark = hashlib.sha256(config_digest(config).encode()).hexdigest()
    claim = Claim(purpose, job.rank, job.world_size, job.host, os.getpid(), __version__, mark)
    unheard_s = config.fault_tolerance.host_timeout_s if purpose == "control" else None
    return Port(job.store_host, job.store_port, job.secret, claim, config.comm.timeout_s, unheard_s)
