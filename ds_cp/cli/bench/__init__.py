"""``ds-cp bench``: one file for each kind. What a kind does is imported when it is called."""

from __future__ import annotations

import argparse
from collections.abc import Mapping

from ds_cp.cli.chat import add_server
from ds_cp.cli.parser import Parser, Verbs, add_json

DTYPES = ("bf16", "fp16", "fp32")
_DTYPES = "bf16, fp16 or fp32; default bf16"


def add_bench(verbs: Verbs) -> None:
    """Add ``bench`` and its kinds to the verbs of ``ds-cp``."""
    bench = verbs.add_parser("bench", help="measure an engine, a server, links or the KV cache")
    kinds: Verbs = bench.add_subparsers(required=True, metavar="kind")
    _add_latency(kinds)
    _add_throughput(kinds)
    _add_serve(kinds)
    _add_comm(kinds)
    _add_kv(kinds)


def add_job(parser: Parser) -> None:
    """Add the flags that say which model runs where."""
    parser.add_argument("--config", metavar="FILE", help="JSON config, see: ds-cp config schema")
    parser.add_argument("--model", metavar="NAME", help="instead of the config's model")
    _add_ranks(parser)


def _add_ranks(parser: Parser) -> None:
    parser.add_argument("--ranks", type=int, metavar="N", help="start N ranks on this machine")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)


def add_rounds(parser: Parser, warmup: int, repeats: int) -> None:
    """Add how often is measured, and ``--json``."""
    parser.add_argument("--warmup", type=int, default=warmup, metavar="N",
                        help=f"rounds before those that count; default {warmup}")  # fmt: skip
    parser.add_argument("--repeats", type=int, default=repeats, metavar="N",
                        help=f"rounds that count; default {repeats}")  # fmt: skip
    add_json(parser, "the settings, the machine and all figures")


def _add_count(parser: Parser, flag: str, default: int, what: str) -> None:
    parser.add_argument(flag, type=int, default=default, metavar="N",
                        help=f"{what}; default {default}")  # fmt: skip


def _add_latency(kinds: Verbs) -> None:
    parser = kinds.add_parser(
        "latency",
        help="one batch at a time in this process",
        description="Runs one batch of random prompts at a time on the ranks of a launcher, of "
        "--ranks, or on one: time to the first token, per further token, and to the end.",
    )
    add_job(parser)
    _add_count(parser, "--input-len", 128, "tokens of a prompt")
    _add_count(parser, "--output-len", 32, "tokens of an answer")
    _add_count(parser, "--batch", 1, "prompts at once")
    add_rounds(parser, 1, 5)
    parser.set_defaults(verb=_latency)


def _add_throughput(kinds: Verbs) -> None:
    parser = kinds.add_parser(
        "throughput",
        help="many requests at once in this process",
        description="Gives all requests to an engine on the ranks of a launcher, of --ranks, or on "
        "one, and counts tokens and requests a second. Prompts are random tokens, their lengths "
        "even between half of --input-len and one and a half of it.",
    )
    add_job(parser)
    _add_count(parser, "--requests", 32, "requests of a round")
    _add_count(parser, "--input-len", 128, "mean tokens of a prompt")
    _add_count(parser, "--output-len", 32, "tokens of an answer")
    add_rounds(parser, 1, 3)
    parser.set_defaults(verb=_throughput)


def _add_serve(kinds: Verbs) -> None:
    parser = kinds.add_parser(
        "serve",
        help="load on a running server",
        description="Sends requests to a server's /v1/completions and reads the streams. Closed "
        "loop (--concurrency): a request follows the end of one. Open loop (--rate): requests "
        "come at random, as many a second, whatever the server does. Prompts differ from their "
        "first word, so that no prefix is cached.",
    )
    add_server(parser)
    parser.add_argument("--model", metavar="NAME", help="default: the server's first")
    _add_count(parser, "--requests", 32, "requests that count")
    _add_count(parser, "--input-len", 128, "words of a prompt")
    _add_count(parser, "--output-len", 32, "tokens of an answer")
    parser.add_argument("--concurrency", type=int, metavar="N",
                        help="closed loop: requests at once; default 4")  # fmt: skip
    parser.add_argument("--rate", type=float, metavar="R", help="open loop: requests a second")
    _add_count(parser, "--seed", 0, "of the prompts and the times")
    parser.add_argument("--no-ignore-eos", action="store_true",
                        help="answers may end early; for servers without ignore_eos")  # fmt: skip
    _add_count(parser, "--warmup", 2, "requests before those that count")
    add_json(parser, "the settings, the machine and all figures")
    parser.set_defaults(verb=_serve)


def _add_comm(kinds: Verbs) -> None:
    parser = kinds.add_parser(
        "comm",
        help="links, memory and rates of this machine, as a device file for ds-cp plan",
        description="Measures on all ranks at once: linear layers, attention, reading of weights, "
        "what a layer takes beside its work, and the links between ranks. Writes a device file "
        "that ds-cp plan --device takes. Over several hosts, start it with a launcher instead of "
        "--ranks.",
    )
    _add_ranks(parser)
    parser.add_argument("--out", required=True, metavar="FILE", help="where to write it")
    parser.add_argument(
        "--dtype", default="bf16", metavar="NAME", help="bf16 (default), fp16, fp32"
    )
    parser.add_argument("--name", metavar="NAME", help="of the device; default: this host's kind")
    add_json(parser, "the file's object")
    parser.set_defaults(verb=_comm)


def _add_kv(kinds: Verbs) -> None:
    parser = kinds.add_parser(
        "kv",
        help="the KV cache: allocator, prefix keys, moves of blocks",
        description="Measures what handling KV costs beside computing it: allocating and freeing "
        "blocks, naming and finding prefixes, copying blocks within a rank and, with --ranks or a "
        "launcher, from rank to rank. The shape of a block is that of the flags; no model is "
        "loaded.",
    )
    _add_ranks(parser)
    _add_count(parser, "--blocks", 4096, "blocks of a rank's pool in the allocator's figures")
    _add_count(parser, "--block-size", 64, "tokens of a block")
    _add_count(parser, "--layers", 8, "of the model")
    _add_count(parser, "--kv-heads", 2, "of the model")
    _add_count(parser, "--head-dim", 64, "of the model")
    parser.add_argument(
        "--dtype", default="bf16", metavar="NAME", help="bf16 (default), fp16, fp32"
    )
    add_rounds(parser, 1, 5)
    parser.set_defaults(verb=_kv)


def _latency(args: argparse.Namespace, env: Mapping[str, str]) -> int:
    from ds_cp.cli.bench.engine import latency

    return latency(args, env)


def _throughput(args: argparse.Namespace, env: Mapping[str, str]) -> int:
    from ds_cp.cli.bench.engine import throughput

    return throughput(args, env)


def _serve(args: argparse.Namespace, env: Mapping[str, str]) -> int:
    from ds_cp.cli.bench.serve import serve

    return serve(args, env)


def _comm(args: argparse.Namespace, env: Mapping[str, str]) -> int:
    from ds_cp.cli.bench.comm import comm

    return comm(args, env)


def _kv(args: argparse.Namespace, env: Mapping[str, str]) -> int:
    from ds_cp.cli.bench.kv import kv

    return kv(args, env)
