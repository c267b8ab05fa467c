"""``ds-cp serve``."""

from __future__ import annotations

import argparse
from collections.abc import Mapping

from ds_cp.cli.job import check_address, find_job, job_config, start_ranks, starts_ranks
from ds_cp.cli.output import own_stdout
from ds_cp.log_stream import take_over
from ds_cp.topology.job import peek_rank

STOP_S = 10.0  # seconds beyond server.drain_timeout_s that ranks get after a signal


def serve(args: argparse.Namespace, env: Mapping[str, str]) -> int:
    """Serve until a signal ends it. Returns the exit code."""
    config = job_config(args, {"server.host": args.host, "server.port": args.port}, env)
    if peek_rank(env) == 0:
        check_address(config)
    if starts_ranks(args, env):
        return start_ranks(args, config, env, config.server.drain_timeout_s + STOP_S)
    job = find_job(config, env)
    from ds_cp.serve.supervisor import serve as serve_job

    if not args.json:
        take_over("stdout", "stderr")  # neither may hold up a server
        return serve_job(config, job)
    from ds_cp.serve.announce import ready_as_json

    with own_stdout() as out:  # for the object alone; what libraries print goes to stderr
        take_over("stderr")
        return serve_job(config, job, ready_as_json(out))
