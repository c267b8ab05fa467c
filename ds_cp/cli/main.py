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
from typing import TYPE_CHECKING, NoReturn, TypeAlias

from ds_cp.cli.bench import add_bench
from ds_cp.cli.output import flush, prepare_streams, put, say
from ds_cp.cli.sizing import add_plan
from ds_cp.cli.trace import add_trace, add_trace_option
from ds_cp.errors import DsCpError, LaunchError, OutputError
from ds_cp.log_stream import drain_streams, take_over
from ds_cp.topology.job import peek_rank

if TYPE_CHECKING:
    from _typeshed import SupportsWrite

Verb = Callable[[argparse.Namespace, Mapping[str, str]], int]
Verbs: TypeAlias = "argparse._SubParsersAction[_Parser]"  # what add_subparsers gives
# Seconds that a failing rank other than 0 waits before it exits: rank 0 prints the cause, and some
# launchers end the job at the first exit.
HEAD_START_S = 1.0
INTERRUPTED = 130  # exit code after Ctrl-C: 128 + SIGINT


class _Parser(argparse.ArgumentParser):
    """Usage mistakes, and help that cannot be printed, are our one-line errors too."""

    def error(self, message: str) -> NoReturn:
        raise LaunchError(f"{message} (see {self.prog} --help)")

    def print_help(self, file: SupportsWrite[str] | None = None) -> None:
        put(self.format_help().rstrip("\n"))


def run(argv: Sequence[str] | None = None) -> NoReturn:
    """Run ``ds-cp`` as this process's only purpose, and end it. What is said on stderr never holds
    up a server or its launcher; other verbs write it at once, in order with their results."""
    try:
        code = main(argv, own_process=True)
    finally:
        drain_streams()
    if "torch" not in sys.modules:
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
        args = build_parser().parse_args(argv)
    except SystemExit:  # after --help
        flush()
        raise
    if _prints(args) and not has_stdout:
        raise OutputError("stdout is closed; open it, for example with > FILE")
    verb: Verb = args.verb
    if own_process and verb is _serve:
        take_over("stderr")
    return verb(args, env)


def _prints(args: argparse.Namespace) -> bool:
    """Whether a verb is of no use without stdout: all but serve, and batch with a file."""
    return args.verb is not _serve and (args.verb is not _batch or args.json or args.output == "-")


def build_parser() -> argparse.ArgumentParser:
    """The parser of every verb; ``args.verb`` is the function to call."""
    parser = _Parser(
        prog="ds-cp",
        description="Exact inference over contexts longer than one device holds.",
        allow_abbrev=False,
    )
    verbs = parser.add_subparsers(required=True, metavar="verb", parser_class=_Parser)
    _add_serve(verbs)
    _add_generate(verbs)
    _add_batch(verbs)
    add_plan(verbs)
    add_bench(verbs, _Parser)
    add_trace(verbs, _Parser)
    _add_config(verbs)
    doctor = verbs.add_parser(
        "doctor", help="what was found on this machine, and how to fix what is missing"
    )
    doctor.add_argument("--json", action="store_true", help="one JSON object on stdout")
    doctor.set_defaults(verb=_doctor)
    version = verbs.add_parser("version", help="versions of ds_cp and what it stands on")
    version.add_argument("--json", action="store_true", help="one JSON object on stdout")
    version.set_defaults(verb=_version)
    return parser


def _add_job_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="FILE", help="JSON config, see: ds-cp config schema")
    parser.add_argument("--model", metavar="NAME", help="instead of the config's model")
    parser.add_argument(
        "--ranks", type=int, metavar="N", help="start N ranks on this machine and own them"
    )
    # deepspeed and older launchers put this before our arguments; LOCAL_RANK says the same
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)


def _add_serve(verbs: Verbs) -> None:
    serve = verbs.add_parser("serve", help="serve a model over HTTP", allow_abbrev=False)
    _add_job_options(serve)
    serve.add_argument("--host", help="instead of the config's server.host")
    serve.add_argument("--port", type=int, help="instead of the config's server.port; 0: any free")
    add_trace_option(serve)
    serve.set_defaults(verb=_serve)


def _add_generate(verbs: Verbs) -> None:
    generate = verbs.add_parser("generate", help="complete prompts", allow_abbrev=False)
    _add_job_options(generate)
    source = generate.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", metavar="TEXT")
    source.add_argument("--prompt-file", metavar="FILE", help="one prompt: a UTF-8 text file")
    source.add_argument(
        "--prompts-file",
        metavar="FILE",
        help="JSON lines: strings, lists of token ids, or objects with prompt and sampling fields",
    )
    generate.add_argument("--json", action="store_true", help="one JSON object per prompt")
    add_trace_option(generate)
    sampling = generate.add_argument_group("sampling")
    sampling.add_argument("--max-tokens", type=int, default=128, help="default 128")
    sampling.add_argument("--min-tokens", type=int, help="default 0")
    sampling.add_argument("--temperature", type=float, default=0.0, help="default 0: greedy")
    sampling.add_argument("--top-p", type=float, help="default 1")
    sampling.add_argument("--top-k", type=int, help="default 0: all tokens")
    sampling.add_argument("--min-p", type=float, help="default 0")
    sampling.add_argument("--seed", type=int, help="default: a new one each time")
    sampling.add_argument("--stop", action="append", metavar="TEXT", help="may be repeated")
    sampling.add_argument("--stop-token-ids", type=int, nargs="+", metavar="ID")
    sampling.add_argument("--logprobs", type=int, metavar="K", help="return the K most likely")
    sampling.add_argument("--ignore-eos", action="store_true", default=None)
    generate.set_defaults(verb=_generate)


def _add_batch(verbs: Verbs) -> None:
    batch = verbs.add_parser(
        "batch",
        help="answer a file of requests",
        description="Answer a file of requests in OpenAI's batch format, through the server's own "
        "code but without a server. Each line of IN is an object with custom_id, method (POST), "
        "url (/v1/chat/completions or /v1/completions) and body; answers are appended to OUT in "
        "the order in which they are ready. The same command again does what is left; answers "
        "with 5xx or 429 are asked for anew. Broken lines are named by number, and are in "
        "OUT.errors.jsonl.",
        epilog="Exit code: 0 every line was answered; 2 all was done, but some line was broken or "
        "refused (now or in an earlier run); 1 something on our side failed; 130 Ctrl-C, 143 "
        "SIGTERM.",
        allow_abbrev=False,
    )
    batch.add_argument("input", metavar="IN", help="JSON lines, one request each")
    batch.add_argument("output", metavar="OUT", help="JSON lines, one answer each; - for stdout")
    _add_job_options(batch)
    batch.add_argument(
        "--concurrency",
        default="auto",
        metavar="N",
        help="requests in hand at once, 1 to 4096; auto: twice scheduler.max_num_seqs, at most "
        "scheduler.max_queue",
    )
    batch.add_argument("--json", action="store_true", help="the summary as one object on stdout")
    batch.set_defaults(verb=_batch)


def _add_config(verbs: Verbs) -> None:
    config = verbs.add_parser("config", help="check or explain a config file")
    actions = config.add_subparsers(required=True, metavar="action", parser_class=_Parser)
    schema = actions.add_parser("schema", help="print the JSON schema of config files")
    schema.set_defaults(verb=_config, action="schema")
    check = actions.add_parser("check", help="say whether config files are valid")
    check.add_argument("files", nargs="+", metavar="FILE")
    check.set_defaults(verb=_config, action="check")
    explain = actions.add_parser("explain", help="every key with its value, unit and meaning")
    explain.add_argument("files", nargs=1, metavar="FILE")
    explain.set_defaults(verb=_config, action="explain")


def _serve(args: argparse.Namespace, env: Mapping[str, str]) -> int:
    from ds_cp.cli.serve import serve

    return serve(args, env)


def _generate(args: argparse.Namespace, env: Mapping[str, str]) -> int:
    from ds_cp.cli.generate import generate

    return generate(args, env)


def _batch(args: argparse.Namespace, env: Mapping[str, str]) -> int:
    from ds_cp.cli.batch import batch

    return batch(args, env)


def _config(args: argparse.Namespace, env: Mapping[str, str]) -> int:
    from ds_cp.cli.config import config

    return config(args, env)


def _doctor(args: argparse.Namespace, env: Mapping[str, str]) -> int:
    from ds_cp.cli.doctor import doctor

    return doctor(args, env)


def _version(args: argparse.Namespace, env: Mapping[str, str]) -> int:
    from ds_cp.cli.config import version

    return version(args, env)
