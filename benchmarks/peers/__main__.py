"""ds_cp beside its peers on one machine: attention over ranks, exchanges, whole engines.

Each peer has an environment of its own under .cache/environments, made by pip on the first run
(llama.cpp is compiled: 5 to 15 minutes; torch comes as the CPU build 2.13.0, which pip must be able
to find). Contestants take turns; each has a time limit, and one that fails is reported with its
reason. On two idle cores, once installed, a whole run takes about 39 minutes (kernel 2, ring 4,
decode 2, exchange 1, ttft 28, floor 2), with --quick about 4.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks.common import RESULTS, commit, finish, machine, parser
from benchmarks.peers.installs import Environments
from benchmarks.peers.measure import load, play
from benchmarks.peers.ratios import ratio_rows, same_tokens
from benchmarks.peers.report import page, plot
from benchmarks.peers.rows import Row, rows

MOST_LOAD = 0.5  # runnable processes in the last minute; with more, figures are not comparable
NAMES = ("kernel", "ring", "decode", "exchange", "ttft", "floor")


def main(argv: Sequence[str]) -> int:
    args = _arguments(argv)
    environments = Environments()
    about = machine()  # before installing adds its own load
    busy = about["load"] > MOST_LOAD
    if busy and not args.even_if_busy:
        print(
            f"the load of this machine is {about['load']}, more than {MOST_LOAD}: "
            "wait until it is idle, or say --even-if-busy",
            file=sys.stderr,
        )
        return 2
    chosen = [row for row in rows(environments, args.quick) if row.name in args.rows]
    played = [_play(row, args) for row in chosen]
    result = {
        "command": " ".join(["python -m benchmarks.peers", *argv]),
        **about,
        "commit": commit(),
        "busy": busy,
        "quick": args.quick,
        "versions": environments.versions(),
        "rows": played,
    }
    if args.write:
        (RESULTS / "peers.md").write_text(page(result))
    else:
        print(page(result))
    finish(result, RESULTS / "peers.json" if args.write else None)
    return 0


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
        "--even-if-busy", action="store_true", help="run on a busy machine; the result says so"
    )
    arguments.add_argument(
        "--write", action="store_true",
        help="write the page, plots and JSON also for some rows or --quick",
    )  # fmt: skip
    args = arguments.parse_args(argv)
    args.write = args.write or (set(args.rows) == set(NAMES) and not args.quick)
    return args


def _play(row: Row, args: argparse.Namespace) -> dict[str, Any]:
    print(f"{row.title} (about {row.minutes:g} min)", file=sys.stderr, flush=True)
    before = load()
    found, others = play(list(row.players.values()), list(row.players), row.cases, row.warm_up)
    played: dict[str, Any] = {
        "name": row.name,
        "title": row.title,
        "load": before,
        "others": others,
        "ratios": ratio_rows(row.ratios, found),
        "cases": {
            case: {name: figures.result() for name, figures in contestants.items()}
            for case, contestants in found.items()
        },
        "same_tokens": same_tokens(found),
    }
    file = RESULTS / f"peers_{row.name}.png"
    if row.plot and args.write and plot(played, row.plot, file):
        played["plot"] = file.name
    return played


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
