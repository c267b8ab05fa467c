"""Faults under load: requests in flight while a server's processes, sockets and files go wrong.

A server of the tiny model gets every kind of request once, undisturbed. Then ``--flight`` requests
run at any time, while ``--faults`` faults of all kinds hit it in all phases of its life. Every
answer must be the undisturbed one; what ends a server must end it whole and soon; at the end of
each no block, process, descriptor or file in shared memory may be left. The last line is JSON.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.faults.books import shared_files
from benchmarks.faults.kinds import KINDS, Effect, Kind
from benchmarks.faults.life import Life, Outcome, left_in_shared_memory
from benchmarks.faults.load import Tally
from benchmarks.faults.outside import SmallDisk
from benchmarks.faults.server import INJECTED, configure
from benchmarks.faults.table import table
from tests.helpers.jobs import ROOT, Job, command

LIFE = 40  # faults that one server gets, at most


def deck(kinds: list[Kind], phases: list[str], faults: int, rng: random.Random) -> list[Any]:
    """As many pairs of kind and phase, every pair equally often, in random order."""
    pairs = [(kind, phase) for kind in kinds for phase in kind.phases if phase in phases]
    if not pairs:
        raise SystemExit("no kind of fault has such a phase")
    found: list[Any] = []
    while len(found) < faults:
        found += rng.sample(pairs, len(pairs))
    return found[:faults]


def lives(cards: list[Any]) -> Iterator[list[Any]]:
    """The faults of one server after the other: what ends one is its last."""
    last = [card for card in cards if is_last(*card)]
    many = [card for card in cards if not is_last(*card)]
    while many or last:
        size = min(LIFE, max(1, len(many) // (len(last) + 1) + 1)) if last else LIFE
        some, many = many[:size], many[size:]
        if last and last[0][1] == "start":
            yield [last.pop(0)]
            yield some
        else:
            yield some + ([last.pop(0)] if last else [])


def is_last(kind: Kind, phase: str) -> bool:
    """Whether the server ends with it."""
    return kind.effect is Effect.ENDS or phase in ("start", "drain")


def run(args: argparse.Namespace, folder: Path, disk: SmallDisk | None) -> dict[str, Any]:
    """All lives."""
    rng = random.Random(args.seed)
    names = args.kinds or [n for n, k in KINDS.items() if disk or "disk" not in n]
    cards = deck([KINDS[name] for name in names], args.phases, args.faults, rng)
    file = configure(folder, disk, args)
    env = {"PYTHONPATH": os.pathsep.join([str(INJECTED), str(ROOT)])}
    argv = command(args.launcher, "serve", args.ranks, ["--config", str(file)])
    tally, outcomes, left = Tally(), list[Outcome](), list[str]()
    expected: list[Any] = []
    began = time.monotonic()
    for life_cards in filter(None, lives(cards)):
        shared = shared_files()
        with Life(
            lambda: Job(argv, folder, env), args.ranks, args.flight, disk, expected, tally, rng
        ) as life:
            ends = False
            if life_cards[0][1] != "start":
                life.begin()
            for kind, phase in life_cards:
                if phase != "start":
                    life.wait_for(args.requests * len(outcomes) // args.faults)
                outcome = life.suffer(kind, phase)
                outcomes.append(outcome)
                tell(outcome, len(outcomes), args.faults)
                if ends := is_last(kind, phase) or bool(outcome.fault):
                    break  # what was still to come in this life is not counted
            if not ends:
                left += filter(None, [life.end()])
        left += filter(None, [left_in_shared_memory(shared)])
    return {
        **common.machine(),
        "commit": common.commit(),
        "command": common.command("faults", sys.argv[1:]),
        "ranks": args.ranks,
        "requests": tally.asked,
        "right": tally.right,
        "not_asked_of_a_server_that_went_on": tally.refused,
        "lost_or_wrong": tally.wrong,
        "faults": len(outcomes),
        "kinds": len({outcome.kind for outcome in outcomes}),
        "not_as_promised": [one.record() for one in outcomes if one.fault],
        "left_behind": left,
        "seconds": round(time.monotonic() - began, 1),
        "table": table(outcomes),
    }


def tell(outcome: Outcome, count: int, of: int) -> None:
    """A line of progress."""
    seconds = outcome.mended_s if outcome.ended_s is None else outcome.ended_s
    said = f"FAULT: {outcome.fault}" if outcome.fault else f"{seconds:.2f} s"
    notes = f" [{'; '.join(outcome.notes)}]" if outcome.notes else ""
    print(
        f"{count}/{of} {outcome.kind} ({outcome.phase}){notes}: {said}", file=sys.stderr, flush=True
    )


def main() -> int:
    """Exit code 1 when an answer was lost or wrong, or something was not as promised."""
    parser = common.parser(__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--launcher", default="ds-cp")
    parser.add_argument("--flight", type=int, default=6, help="requests at a time")
    parser.add_argument("--requests", type=int, default=0, help="spread over the faults, at least")
    parser.add_argument("--faults", type=int, default=40)
    parser.add_argument("--kinds", nargs="*", choices=list(KINDS), help="default: all")
    parser.add_argument("--phases", nargs="*", default=[
        "start", "idle", "prefill", "decode", "loading", "migration", "drain",
    ])  # fmt: skip
    parser.add_argument("--tokens", type=int, default=1024, help="KV tokens of a rank")
    parser.add_argument("--hang_s", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        disk = SmallDisk(folder / "disk") if os.geteuid() == 0 else None
        try:
            result = run(args, folder, disk)
        finally:
            if disk is not None:
                disk.close()
    common.finish(result, args.out)
    return int(bool(result["lost_or_wrong"] or result["left_behind"] or result["not_as_promised"]))


if __name__ == "__main__":
    sys.exit(main())
