"""What ``serve``, ``generate`` and ``batch`` share: a job's config, early checks, its ranks."""

from __future__ import annotations

import argparse
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ds_cp.api.transport.listen import bind
from ds_cp.cli.launcher import LAUNCHER, own_command, spawn
from ds_cp.cli.trace import check_trace_file
from ds_cp.config import Config, load_config, looks_like_path
from ds_cp.config.fields import MAX_RANKS
from ds_cp.errors import ConfigError, LaunchError, ModelError, TopologyError
from ds_cp.log_stream import say
from ds_cp.model.source import find_model
from ds_cp.topology import Job, Topology, detect, peek_rank, resolve_grid
from ds_cp.topology.mpi import launched_by_mpi
from ds_cp.trace.writing import STALLED_S, Writing


def job_config(
    args: argparse.Namespace, overrides: Mapping[str, Any], env: Mapping[str, str]
) -> Config:
    """The config, with the values that the command line replaces.

    On rank 0 a local model is checked here: ``ModelError`` when it is missing or not whole. The
    other ranks check theirs while they load, where the ranks agree on one error. Raises
    ``ConfigError`` for a wrong config, ``LaunchError`` when neither config nor model is given.
    """
    given = {key: value for key, value in overrides.items() if value is not None}
    if args.model is not None:
        given["model"] = args.model
    elif args.config is None:
        raise LaunchError("give --config FILE (for example configs/quickstart.json) or --model")
    config = load_config(args.config if args.config is not None else {}, given)
    if peek_rank(env) == 0:
        check_trace_file(config.trace.file)
        if not Path(config.model).exists() and looks_like_path(config.model):
            hint = "make model brings it" if "smollm2" in config.model else "set model to its path"
            raise ModelError(f"no model at {config.model} (from {Path.cwd()}); {hint}")
        find_model(config.model)
    return config


def look_at_key(file: str | None, config: Config) -> None:
    """Say so where other users of this host can read the config and with it the server's key."""
    if file is not None and config.server.api_key is not None:
        mode = stat.S_IMODE(os.stat(file).st_mode)
        if mode & 0o044:
            say(
                f"note: {file} holds server.api_key, and its mode {mode:03o} lets other users "
                f"read it; chmod 600 {file}"
            )


def check_address(config: Config) -> None:
    """Refuse a server address that cannot be listened on. ``LaunchError`` says why."""
    for listener in bind(config.server.host, config.server.port):
        listener.close()


def starts_ranks(args: argparse.Namespace, env: Mapping[str, str]) -> bool:
    """Whether this process has to start ranks, rather than being one. Raises ``LaunchError`` for
    ``--ranks`` out of range, or in a process that a launcher started."""
    if args.ranks is None or env.get("DS_CP_LAUNCHER") == LAUNCHER:
        return False
    if not 1 <= args.ranks <= MAX_RANKS:
        raise LaunchError(f"--ranks is {args.ranks}; it must be from 1 to {MAX_RANKS}")
    if "RANK" in env or launched_by_mpi(env):
        raise LaunchError(
            f"--ranks {args.ranks} starts the ranks itself, "
            f"but a launcher has started this process already; leave --ranks out"
        )
    return True


def start_ranks(
    args: argparse.Namespace, config: Config, env: Mapping[str, str], grace_s: float
) -> int:
    """Run this very command on ``--ranks`` ranks; the exit code of the job. ``grace_s``: as in
    ``spawn``, without the time to write a trace."""
    topology = Topology(("localhost",) * args.ranks)
    resolve_grid(topology, config.context_parallel.size, config.tensor_parallel.tp_size)
    check_min_ranks(config, args.ranks)
    trace = Writing(config.trace.file, config.comm.timeout_s + STALLED_S)
    grace_s += 0.0 if config.trace.file is None else STALLED_S  # until it has begun
    return spawn(
        own_command(), args.ranks, env, grace_s=grace_s, works=trace.goes_on,
        min_ranks=config.fault_tolerance.min_ranks,
    )  # fmt: skip


def check_min_ranks(config: Config, ranks: int) -> None:
    """``ConfigError`` when more ranks have to be left than there are."""
    least = config.fault_tolerance.min_ranks
    if least is not None and least > ranks:
        raise ConfigError(
            f"fault_tolerance.min_ranks is {least}, but the job has {ranks} "
            f"rank{'s' * (ranks != 1)}: lower it, or start more ranks"
        )


def find_job(config: Config, env: Mapping[str, str]) -> Job:
    """This process's place in the job. Raises ``TopologyError`` when the config does not fit it."""
    job = detect(
        env,
        hosts=config.comm.hosts,
        interface=config.comm.interface,
        timeout_s=config.comm.timeout_s,
        port=config.comm.port,
        secret_file=config.comm.secret_file,
    )
    check_min_ranks(config, job.world_size)
    sizes = (config.context_parallel.size, config.tensor_parallel.tp_size)
    if job.hosts is not None:
        resolve_grid(Topology(job.hosts), *sizes)
    elif sizes[0] != "auto" and sizes[0] * sizes[1] != job.world_size:
        raise TopologyError(
            f"context_parallel.size {sizes[0]} x tensor_parallel.tp_size {sizes[1]} "
            f"does not make the {job.world_size} ranks of the job"
        )
    return job
