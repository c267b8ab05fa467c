"""``ds-cp bench kv``."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping

from ds_cp.cli.bench import DTYPES
from ds_cp.cli.bench.report import MAX_ROUNDS, Figure, machine, report, within
from ds_cp.cli.job import starts_ranks
from ds_cp.cli.launcher import own_command, spawn
from ds_cp.config import load_config
from ds_cp.errors import LaunchError
from ds_cp.topology import detect

STOP_S = 5.0  # seconds that ranks get after a signal to leave


def kv(args: argparse.Namespace, env: Mapping[str, str]) -> int:
    """Measure and print. Returns the exit code."""
    sizes = {
        "blocks": within("--blocks", args.blocks, 1, 1 << 20),
        "block_size": within("--block-size", args.block_size, 1, 1 << 12),
        "layers": within("--layers", args.layers, 1, 1 << 10),
        "kv_heads": within("--kv-heads", args.kv_heads, 1, 1 << 10),
        "head_dim": within("--head-dim", args.head_dim, 1, 1 << 10),
    }
    warmup = within("--warmup", args.warmup, 0, MAX_ROUNDS)
    repeats = within("--repeats", args.repeats, 1, MAX_ROUNDS)
    if sizes["blocks"] * sizes["block_size"] > 1 << 26:
        raise LaunchError("--blocks times --block-size is above 67108864 tokens; lower one")
    if args.dtype not in DTYPES:
        raise LaunchError(f"--dtype is {args.dtype[:40]!r}; it must be one of {', '.join(DTYPES)}")
    if starts_ranks(args, env):
        return spawn(own_command(), args.ranks, env, grace_s=STOP_S)
    from ds_cp.startup.resources import socket_environment

    here = machine()  # before this adds its own load
    config = load_config({}, {"model": "none", "dtype": args.dtype})
    job = detect(env, timeout_s=config.comm.timeout_s)
    for variable, value in socket_environment(job).items():
        os.environ.setdefault(variable, value)
    from ds_cp.startup.kv_rates import KVShape, measure_kv

    found = measure_kv(job, config, KVShape(**sizes), warmup, repeats)
    if found is not None:
        rates, about = found
        settings = {**sizes, "dtype": args.dtype, "warmup": warmup, "repeats": repeats}
        figures = [Figure(name, unit, values) for name, (unit, values) in rates.items()]
        report("kv", settings, about, figures, as_json=args.json, taken_on=here)
    return 0
