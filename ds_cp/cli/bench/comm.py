"""``ds-cp bench comm``: measure this machine's links and rates, and write a device file."""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Mapping

from ds_cp.cli.bench import DTYPES
from ds_cp.cli.launcher import LAUNCHER, own_command, spawn
from ds_cp.cli.output import put
from ds_cp.config import load_config
from ds_cp.config.fields import MAX_RANKS
from ds_cp.errors import LaunchError
from ds_cp.sizing.device import check_writable, write_device
from ds_cp.topology import detect, peek_rank
from ds_cp.topology.mpi import launched_by_mpi

STOP_S = 5.0  # seconds that ranks get after a signal to leave


def comm(args: argparse.Namespace, env: Mapping[str, str]) -> int:
    """Measure and write. Raises ``LaunchError``, ``OutputError``, ``CommError`` of a line."""
    if args.dtype not in DTYPES:
        raise LaunchError(f"--dtype is {args.dtype[:40]!r}; it must be one of {', '.join(DTYPES)}")
    name = args.name if args.name is not None else platform.machine()
    if not 1 <= len(name) <= 60 or not all(c.isalnum() or c in " .,:()/+-_" for c in name):
        raise LaunchError("--name must be 1 to 60 letters, digits and .,:()/+-_ or blanks")
    if peek_rank(env) == 0:
        check_writable(args.out)
    ours = env.get("DS_CP_LAUNCHER") == LAUNCHER
    if not ours and "RANK" not in env and not launched_by_mpi(env):
        if args.ranks is None or not 2 <= args.ranks <= MAX_RANKS:
            raise LaunchError(f"--ranks is {args.ranks}; it must be from 2 to {MAX_RANKS}")
        return spawn(own_command(), args.ranks, env, grace_s=STOP_S)
    if not ours and args.ranks is not None:
        raise LaunchError("a launcher has started this process already; leave --ranks out")
    return _measure(args, env, name)


def _measure(args: argparse.Namespace, env: Mapping[str, str], name: str) -> int:
    from ds_cp.startup.resources import socket_environment

    config = load_config({}, {"model": "none", "dtype": args.dtype})
    job = detect(env, timeout_s=config.comm.timeout_s)
    if job.world_size < 2:
        raise LaunchError("links are between ranks: start 2 or more, for example with --ranks 2")
    for variable, value in socket_environment(job).items():
        os.environ.setdefault(variable, value)
    from ds_cp.startup.device_file import measure_device

    found = measure_device(job, config, name)
    if found is not None:
        write_device(found, args.out)
        put(json.dumps(found) if args.json else f"wrote {args.out}: {found['description']}")
    return 0
