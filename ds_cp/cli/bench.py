"""``ds-cp bench comm``: measure this machine's links and rates, and write a device file."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ds_cp.cli.launcher import LAUNCHER, spawn
from ds_cp.cli.output import put
from ds_cp.config import load_config
from ds_cp.config.fields import MAX_RANKS
from ds_cp.errors import LaunchError
from ds_cp.sizing.device import check_writable, write_device
from ds_cp.topology import detect, peek_rank
from ds_cp.topology.mpi import launched_by_mpi

STOP_S = 5.0  # seconds that ranks get after a signal to leave
DTYPES = ("bf16", "fp16", "fp32")


def add_bench(verbs: Any, parser_class: type[argparse.ArgumentParser]) -> None:
    """Add ``bench`` and its kinds to the verbs of ``ds-cp``."""
    bench = verbs.add_parser("bench", help="measure")
    kinds = bench.add_subparsers(required=True, metavar="kind", parser_class=parser_class)
    comm = kinds.add_parser(
        "comm",
        help="links, memory and rates of this machine, as a device file for ds-cp plan",
        description="Measures on all ranks at once: linear layers, attention, reading of weights, "
        "what a layer takes beside its work, and the links between ranks. Writes a device file "
        "that ds-cp plan --device takes. Over several hosts, start it with a launcher instead of "
        "--ranks.",
        allow_abbrev=False,
    )
    comm.add_argument("--ranks", type=int, metavar="N", help="start N ranks on this machine")
    comm.add_argument("--out", required=True, metavar="FILE", help="where to write it")
    comm.add_argument("--dtype", default="bf16", metavar="NAME", help="bf16 (default), fp16, fp32")
    comm.add_argument("--name", metavar="NAME", help="of the device; default: this host's kind")
    comm.add_argument("--json", action="store_true", help="the file's object on stdout too")
    comm.set_defaults(verb=_comm)


def _comm(args: argparse.Namespace, env: Mapping[str, str]) -> int:
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
        program = [sys.argv[0]]
        if Path(sys.argv[0]).name == "__main__.py":
            program = ["-m", "ds_cp.cli"]
        return spawn([sys.executable, *program, *sys.argv[1:]], args.ranks, env, grace_s=STOP_S)
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
