"""``ds-cp serve``."""

from __future__ import annotations

import argparse
from collections.abc import Mapping

from ds_cp.cli.job import (
    check_address,
    find_job,
    job_config,
    look_at_key,
    start_ranks,
    starts_ranks,
)
from ds_cp.cli.output import own_stdout
from ds_cp.log_stream import take_over, write_json_lines
from ds_cp.topology.job import peek_rank

STOP_S = 10.0  # seconds beyond server.drain_timeout_s that ranks get after a signal


def serve(args: argparse.Namespace, env: Mapping[str, str]) -> int:
    """Serve until a signal ends it. Returns the exit code."""
    given = {"server.host": args.host, "server.port": args.port, "trace.file": args.trace}
    config = job_config(args, given, env)
    if peek_rank(env) == 0:
        check_address(config)
    if starts_ranks(args, env):
        grace_s = config.server.drain_timeout_s + STOP_S
        return start_ranks(args, config, env, grace_s)
    job = find_job(config, env)
    from ds_cp.serve.supervisor import serve as serve_job

    if not args.json:
        take_over("stdout", "stderr")  # neither may hold up a server
    if config.server.log_format == "json":
        write_json_lines()
    if job.rank == 0:
        look_at_key(args.config, config)
    if not args.json:
        return serve_job(config, job)
    from ds_cp.serve.announce import ready_as_json

    with own_stdout() as out:  # for the object alone; what libraries print goes to stderr
        take_over("stderr")
        return serve_job(config, job, ready_as_json(out))
