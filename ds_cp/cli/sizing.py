"""``ds-cp plan``: memory, largest context and predicted times of a job, from config.json alone."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping

from ds_cp.cli.output import put
from ds_cp.cli.parser import Verbs, add_json


def add_plan(verbs: Verbs) -> None:
    """Add ``plan`` to the verbs of ``ds-cp``."""
    parser = verbs.add_parser(
        "plan",
        help="memory, largest context and predicted times of a job; loads no weights",
        description="Says how much memory a rank needs for a model and a context, the largest "
        "context by number of ranks, and the time to the first token and per further token of each "
        "mode, by the cost model that the server uses. Reads config.json only.",
    )
    parser.add_argument(
        "--model", required=True, metavar="PATH", help="a model's directory, or its config.json"
    )
    parser.add_argument("--hosts", type=int, default=1, metavar="N", help="machines; default 1")
    parser.add_argument(
        "--ranks-per-host", type=int, default=1, metavar="N", help="ranks of each; default 1"
    )
    parser.add_argument(
        "--device", required=True, metavar="NAME",
        help="what a rank is: a100, b200, cpu, h100, h200, or a file that ds-cp bench comm wrote",
    )  # fmt: skip
    parser.add_argument(
        "--context", required=True, metavar="TOKENS",
        help="of one request, such as 5000, 128K or 1M (K is 1024)",
    )  # fmt: skip
    parser.add_argument(
        "--dtype", default="auto", metavar="NAME",
        help="of weights and KV: bf16, fp16 or fp32; auto: that of the checkpoint",
    )  # fmt: skip
    parser.add_argument(
        "--tp", type=int, default=1, metavar="N", help="ranks that share each layer; default 1"
    )
    parser.add_argument(
        "--host-memory", default="0", metavar="SIZE",
        help="of each rank's host, for KV that its device has no room to keep, such as 64GiB; "
        "default 0",
    )  # fmt: skip
    add_json(parser, "the report")
    parser.add_argument("--png", metavar="FILE", help="draw it too; needs matplotlib")
    parser.set_defaults(verb=_plan)


def _plan(args: argparse.Namespace, env: Mapping[str, str]) -> int:
    """Print the report. Raises ``ModelError``, ``ConfigError`` and ``OutputError`` of a line."""
    from ds_cp.sizing.device import read_device
    from ds_cp.sizing.job import Job, parse_context, parse_memory
    from ds_cp.sizing.model import read_model
    from ds_cp.sizing.picture import check_picture, draw
    from ds_cp.sizing.report import sizing, text_report

    device = read_device(args.device)
    model = read_model(args.model)
    dtype = model.dtype if args.dtype == "auto" else args.dtype
    context = parse_context(args.context)
    host = parse_memory(args.host_memory)
    job = Job(args.hosts, args.ranks_per_host, context, dtype, args.tp, host)
    if args.png is not None:
        check_picture(args.png)
    found = sizing(model, device, job)
    if args.png is not None:
        draw(found, args.png)
    put(json.dumps(found) if args.json else "\n".join(text_report(found)))
    return 0
