"""ds_cp beside its peers on one machine: attention over ranks, exchanges, whole engines.

Each peer has an environment of its own under .cache/environments, made by pip on the first run
(llama.cpp is compiled: 5 to 15 minutes; torch comes as the CPU build 2.13.0, which pip must be able
to find). Contestants take turns; each has a time limit, and one that fails is reported with its
reason. On two idle cores, once installed, a whole run takes about 39 minutes (kernel 2, ring 4,
decode 2, exchange 1, ttft 28, floor 2), with --quick about 4.

A row that finds the machine busy is refused. The exit code is 2 when all were, and 1 when ds_cp
itself has no figure somewhere in the rows that were asked for.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks.common import RESULTS, commit, finish, machine, parser
from benchmarks.peers.installs import Environments
from benchmarks.peers.measure import MOST_LOAD, load, others, play
from benchmarks.peers.ratios import ratio_rows, same_tokens, without_figure
from benchmarks.peers.report import page, plot
from benchmarks.peers.rows import Row, rows

NAMES = ("kernel", "ring", "decode", "exchange", "ttft", "floor")


def main(argv: Sequence[str]) -> int:
    args = _arguments(argv)
    environments = Environments()
    about = machine()  # before installing adds its own load
    chosen = [
        row for row in rows(environments, args.quick, tokens=args.tokens) if row.name in args.rows
    ]
    played = []
    for number, row in enumerate(chosen):
        # The mean of the last minute is ours once a row was played.
        used = max(others(), 0.0 if number else about["load"])
        played.append(_play(row, args, used))
        if refused := played[-1].get("refused"):
            print(f"{row.title}: refused: {refused}", file=sys.stderr)
    if all("refused" in row for row in played):
        return 2
    result = {
        "command": " ".join(["python -m benchmarks.peers", *argv]),
        **about,
        "commit": commit(),
        "busy": any(row["busy"] for row in played),
        "quick": args.quick,
        "versions": environments.versions(),
        "rows": played,
    }
    if args.write:
        (RESULTS / "peers.md").write_text(page(result))
    else:
        print(page(result))
    finish(result, RESULTS / "peers.json" if args.write else None)
    missing = [line for row in played for line in row.get("missing", [row["title"]])]
    for line in missing:
        print(f"no figure of ds_cp: {line}", file=sys.stderr)
    return 1 if missing else 0


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    arguments = parser(__doc__)
    arguments.epilog = " ".join((__doc__ or "").split("\n\n", 1)[1].split())
    arguments.add_argument(
        "--rows", nargs="+", choices=NAMES, default=list(NAMES), help="some of the rows"
    )
    arguments.add_argument(
        "--quick", action="store_true", help="small sizes, few rounds: does everything run?"
    )
    arguments.add_argument(
        "--tokens", type=int, nargs="+", default=(), help="some of the prompt lengths of row ttft"
    )
    arguments.add_argument(
        "--even-if-busy", action="store_true", help="run on a busy machine; the result says so"
    )
    arguments.add_argument(
        "--write", action="store_true",
        help="write the page, plots and JSON also for some rows or --quick",
    )  # fmt: skip
    args = arguments.parse_args(argv)
    args.write = args.write or (set(args.rows) == set(NAMES) and not args.quick)
    return args


def _play(row: Row, args: argparse.Namespace, used: float) -> dict[str, Any]:
    """The figures of a row, before which others used so many processors; or why it was refused."""
    about = {"name": row.name, "title": row.title, "load": load(), "busy": used > MOST_LOAD}
    if used > MOST_LOAD and not args.even_if_busy:
        return about | {
            "refused": f"others use {used:g} processors, more than {MOST_LOAD}: "
            "wait until the machine is idle, or say --even-if-busy"
        }
    print(f"{row.title} (about {row.minutes:g} min)", file=sys.stderr, flush=True)
    found, most = play(list(row.players.values()), list(row.players), row.cases, row.warm_up)
    played: dict[str, Any] = {
        **about,
        "others": most,
        "ratios": ratio_rows(row.ratios, found),
        "cases": {
            case: {name: figures.result() for name, figures in contestants.items()}
            for case, contestants in found.items()
        },
        "same_tokens": same_tokens(found),
        "missing": without_figure(found),
    }
    file = RESULTS / f"peers_{row.name}.png"
    if row.plot and args.write and plot(played, row.plot, file):
        played["plot"] = file.name
    return played


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
