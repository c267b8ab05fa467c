"""``ds-cp trace``: what a trace says; and the check of the file that one is to be written to."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping
from pathlib import Path

from ds_cp.cli.output import put
from ds_cp.cli.parser import Verbs, add_json
from ds_cp.errors import OutputError


def add_trace(verbs: Verbs) -> None:
    """Add ``trace`` to the verbs of ``ds-cp``."""
    trace = verbs.add_parser("trace", help="what a trace of serve, generate or batch says")
    actions: Verbs = trace.add_subparsers(required=True, metavar="action")
    summary = actions.add_parser(
        "summary",
        help="by mode: time in attention and in exchanges, and how much of it overlaps",
        description="Sums up a trace, over its ranks and by mode: seconds in which kernels "
        "computed, in which exchanges were posted and waited for, in which partials were merged, "
        "in which some exchange was under way, and the share of the latter in which kernels "
        "computed.",
    )
    summary.add_argument("file", metavar="FILE", help="written by --trace or trace.file")
    add_json(summary, "the sums")
    summary.set_defaults(verb=_summary)


def add_trace_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--trace``."""
    parser.add_argument(
        "--trace", metavar="FILE",
        help="instead of the config's trace.file: record every step of every rank, for "
        "https://ui.perfetto.dev and ds-cp trace summary",
    )  # fmt: skip


def check_trace_file(path: str | None) -> None:
    """Refuse, before anything starts, a file that the trace could not be written to. Raises
    ``OutputError``."""
    if path is None:
        return
    file = Path(path)
    problem = None
    if file.is_dir():
        problem = "it is a folder"
    elif not file.parent.is_dir():
        problem = f"there is no folder {file.parent}"
    elif not os.access(file.parent, os.W_OK | os.X_OK):
        problem = f"files cannot be made in {file.parent}"
    if problem:
        raise OutputError(f"cannot write the trace to {path}: {problem}; name another file")


def _summary(args: argparse.Namespace, env: Mapping[str, str]) -> int:
    """Print the summary. Raises ``TraceError``, ``OutputError``."""
    from ds_cp.trace.summary import read_trace, summarize, table

    found = summarize(read_trace(args.file))
    put(json.dumps(found.plain()) if args.json else "\n".join(table(found)))
    return 0
