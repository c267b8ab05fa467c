"""The ``ds-cp`` command: parse, run one verb, turn errors into one line and an exit code.

No torch here: a bad config, prompt or port is refused before anything heavy is imported.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn

from ds_cp.cli.bench import add_bench
from ds_cp.cli.chat import add_chat
from ds_cp.cli.completion import add_completion
from ds_cp.cli.output import drop_unread, flush, prepare_streams, say
from ds_cp.cli.parser import Parser
from ds_cp.cli.sizing import add_plan
from ds_cp.cli.top import add_top
from ds_cp.cli.trace import add_trace
from ds_cp.cli.verbs import add_verbs, needs_stdout, serve
from ds_cp.errors import DsCpError, OutputError
from ds_cp.log_stream import LogStream, drain_streams, take_over
from ds_cp.topology.job import peek_rank

Verb = Callable[[argparse.Namespace, Mapping[str, str]], int]
# Seconds that a failing rank other than 0 waits before it exits: rank 0 prints the cause, and some
# launchers end the job at the first exit.
HEAD_START_S = 1.0
INTERRUPTED = 130  # exit code after Ctrl-C: 128 + SIGINT


def run(argv: Sequence[str] | None = None) -> NoReturn:
    """Run ``ds-cp`` as this process's only purpose, and end it. What is said on stderr never holds
    up a server or its launcher; other verbs write it at once, in order with their results."""
    try:
        code = main(argv, own_process=True)
    finally:
        drain_streams()
    served = isinstance(sys.stderr, LogStream)  # what ends with Python's modules may still write
    if "torch" not in sys.modules and not served:
        sys.exit(code)
    from ds_cp.process import leave_process

    leave_process(code)


def main(argv: Sequence[str] | None = None, *, own_process: bool = False) -> int:
    """Run ``ds-cp``. Returns 0 done, 2 the user's input, 1 ours, 130 interrupted."""
    env = os.environ
    rank = peek_rank(env)
    has_stdout = prepare_streams()
    try:
        code = _run_verb(argv, env, has_stdout or rank != 0, own_process)
        flush()
        return code
    except DsCpError as err:
        if rank == 0:
            say(f"ds_cp: error: {' '.join(str(err).split())}")
        else:
            time.sleep(HEAD_START_S)
        return err.exit_code
    except KeyboardInterrupt:
        drop_unread()
        return INTERRUPTED
    except Exception as err:
        traceback.print_exc()
        what = f"{type(err).__name__}: {' '.join(str(err).split())}"
        say(f"ds_cp: error: internal error on rank {rank}, please report it: {what}")
        return 1


def _run_verb(
    argv: Sequence[str] | None, env: Mapping[str, str], has_stdout: bool, own_process: bool
) -> int:
    try:
        args = build_parser().read(None if argv is None else list(argv), env)
    except SystemExit:  # after --help
        flush()
        raise
    if needs_stdout(args) and not has_stdout:
        raise OutputError("stdout is closed; open it, for example with > FILE")
    verb: Verb = args.verb
    if own_process and verb is serve:
        take_over("stderr")
    return verb(args, env)


def build_parser() -> Parser:
    """The parser of every verb; ``args.verb`` is the function to call."""
    parser = Parser(
        prog="ds-cp",
        description="Exact inference over contexts longer than one device holds.",
        epilog="Each flag has a twin in the environment, shown in brackets; a flag wins.",
    )
    verbs = parser.add_subparsers(required=True, metavar="verb")
    for add in (add_verbs, add_chat, add_top, add_plan, add_bench, add_trace):
        add(verbs)
    add_completion(verbs, build_parser)
    return parser
