"""The parsers of ``serve``, ``generate``, ``batch``, ``config``, ``doctor`` and ``version``.

What a verb does is imported when it is called: a wrong flag is refused before anything heavy.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping

from ds_cp.cli.parser import Verbs, add_json
from ds_cp.cli.trace import add_trace_option


def add_verbs(verbs: Verbs) -> None:
    """Add them to the verbs of ``ds-cp``."""
    _add_serve(verbs)
    _add_generate(verbs)
    _add_batch(verbs)
    _add_config(verbs)
    doctor = verbs.add_parser(
        "doctor", help="what was found on this machine, and how to fix what is missing"
    )
    add_json(doctor, "the report")
    doctor.set_defaults(verb=_doctor)
    version = verbs.add_parser("version", help="versions of ds_cp and what it stands on")
    add_json(version, "versions by package")
    version.set_defaults(verb=_version)


def needs_stdout(args: argparse.Namespace) -> bool:
    """Whether a verb is of no use without stdout: all but serve, and batch with a file."""
    if args.verb is serve:
        return bool(args.json)
    return args.verb is not _batch or args.json or args.output == "-"


def _add_job_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="FILE", help="JSON config, see: ds-cp config schema")
    parser.add_argument("--model", metavar="NAME", help="instead of the config's model")
    parser.add_argument(
        "--ranks", type=int, metavar="N", help="start N ranks on this machine and own them"
    )
    # deepspeed and older launchers put this before our arguments; LOCAL_RANK says the same
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)


def _add_serve(verbs: Verbs) -> None:
    parser = verbs.add_parser("serve", help="serve a model over HTTP")
    _add_job_options(parser)
    parser.add_argument("--host", help="instead of the config's server.host")
    parser.add_argument("--port", type=int, help="instead of the config's server.port; 0: any free")
    add_trace_option(parser)
    add_json(parser, "the address and what start-up decided, once requests are served")
    parser.set_defaults(verb=serve)


def _add_generate(verbs: Verbs) -> None:
    generate = verbs.add_parser("generate", help="complete prompts")
    _add_job_options(generate)
    source = generate.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", metavar="TEXT", help="one prompt")
    source.add_argument("--prompt-file", metavar="FILE", help="one prompt: a UTF-8 text file")
    source.add_argument(
        "--prompts-file",
        metavar="FILE",
        help="JSON lines: strings, lists of token ids, or objects with prompt and sampling fields",
    )
    add_json(generate, "an object for each prompt")
    add_trace_option(generate)
    sampling = generate.add_argument_group("sampling")
    sampling.add_argument("--max-tokens", type=int, default=128, help="default 128")
    sampling.add_argument("--min-tokens", type=int, help="default 0")
    sampling.add_argument("--temperature", type=float, default=0.0, help="default 0: greedy")
    sampling.add_argument("--top-p", type=float, help="default 1")
    sampling.add_argument("--top-k", type=int, help="default 0: all tokens")
    sampling.add_argument("--min-p", type=float, help="default 0")
    sampling.add_argument("--seed", type=int, help="default: a new one each time")
    sampling.add_argument(
        "--stop", action="append", metavar="TEXT", help="text that ends an answer"
    )
    sampling.add_argument(
        "--stop-token-ids", type=int, nargs="+", metavar="ID", help="tokens that end an answer"
    )
    sampling.add_argument("--logprobs", type=int, metavar="K", help="return the K most likely")
    sampling.add_argument(
        "--ignore-eos", action="store_true", default=None, help="go on after an end token"
    )
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
    add_trace_option(batch)
    add_json(batch, "the summary")
    batch.set_defaults(verb=_batch)


def _add_config(verbs: Verbs) -> None:
    config = verbs.add_parser("config", help="check or explain a config file")
    actions = config.add_subparsers(required=True, metavar="action")
    schema = actions.add_parser("schema", help="print the JSON schema of config files")
    add_json(schema, "it in one line")
    schema.set_defaults(verb=_config, action="schema")
    check = actions.add_parser("check", help="say whether config files are valid")
    check.add_argument("files", nargs="+", metavar="FILE", help="JSON configs")
    add_json(check, "an object for each file")
    check.set_defaults(verb=_config, action="check")
    explain = actions.add_parser("explain", help="every key with its value, unit and meaning")
    explain.add_argument("files", nargs=1, metavar="FILE", help="JSON config")
    add_json(explain, "every key")
    explain.set_defaults(verb=_config, action="explain")


def serve(args: argparse.Namespace, env: Mapping[str, str]) -> int:
    """Serve until a signal ends it. Returns the exit code."""
    from ds_cp.cli import serve as module

    return module.serve(args, env)


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
