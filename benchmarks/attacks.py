"""Every attack beside 20 honest streams, alone and all together: what the streams notice.

Each attack meets a fresh front. Longest gap of an honest stream, streams lost, time to its first
event, /health beside it, the front's memory before, at most, and 10 s after, its descriptors. The
attackers are processes of a low priority that keep to a share of one core each.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from benchmarks.common import RESULTS, commit, finish, machine, parser
from benchmarks.server import front_of, serving
from tests.helpers.attackers import KINDS, SHARE, TEMPLATE, attackers
from tests.helpers.front import front, honest_streams
from tests.helpers.jobs import post
from tests.helpers.probe import Probe

STREAMS = 20
AFTER_S = 10.0  # seconds after an attack at which memory must be back
FILES = 1024  # open files that the front may have: the limit of many machines
# A quick engine for attackers, and a deadline for those that do not read within the measure.
SETTINGS = {
    "write_timeout_s": 3.0,
    "engine": {
        "delay_s": 0.05,
        "eager_s": 0.005,
        "chat_template": TEMPLATE,
        "max_model_len": 4096,
    },
}
GAP_S, MEMORY_MB = 1.0, 100.0  # what must hold
MB = 2**20


def measure(url: str, pid: int, kinds: Sequence[str], seconds: float) -> dict[str, Any]:
    """What honest streams meet beside these attacks, and what is left of them."""
    process = psutil.Process(pid)
    warm(url)
    with Probe(url, process) as probe, honest_streams(url, STREAMS) as met:
        before, files = probe.memory, process.num_fds()
        each_before = [round(size / MB, 1) for size in probe.memories]
        time.sleep(1.0)
        with attackers(url, kinds) as did:
            time.sleep(seconds)
            held = process.num_fds()
        time.sleep(1.0)
    time.sleep(AFTER_S)
    each = [round(size / MB, 1) for size in probe.memories]
    if probe.killed:
        raise AssertionError(f"killed at {probe.most / MB:.0f} MB, as it was taking the machine")
    return {
        "gap_s": round(met.gap_s, 3),
        "lost": met.lost,
        "whole": met.whole,
        "why": met.why,
        "first_s": round(met.first_s, 3),
        "health_s": round(probe.health_s, 3),
        "health_bad": probe.health_bad,
        "memory_before_mb": round(before / MB, 1),
        "memory_before_each_mb": each_before,
        "memory_most_mb": round(probe.most / MB, 1),
        "memory_after_mb": round(sum(each), 1),
        "memory_after_each_mb": each,
        "descriptors_before": files,
        "descriptors_under_attack": held,
        "descriptors_after": process.num_fds(),
        "attackers": did,
    }


def warm(url: str) -> None:
    """One ordinary exchange of each kind, so that what starts on first use is there before."""
    messages = [{"role": "user", "content": "Hello"}]
    post(f"{url}/v1/chat/completions", {"messages": messages, "max_tokens": 1})
    tokens = post(f"{url}/tokenize", {"prompt": "Hello"})["tokens"]
    post(f"{url}/detokenize", {"tokens": tokens})


@contextmanager
def fake(folder: Path) -> Iterator[tuple[str, int]]:
    with front(folder, files=FILES, **SETTINGS) as running:
        yield running.url, running.process.pid


@contextmanager
def real(folder: Path) -> Iterator[tuple[str, int]]:
    from tests.helpers.tiny import make_tiny_model  # it imports transformers, which takes seconds

    model = make_tiny_model(folder / "tiny")
    (model / "chat_template.jinja").write_text(TEMPLATE)
    with serving(1, model=str(model), kv_cache={"tokens_per_rank": 8192}) as (url, _):
        yield url, front_of(url).pid


def attempt(
    server: Callable[[Path], Any], name: str, kinds: Sequence[str], seconds: float
) -> dict[str, Any]:
    """One row. A front that does not end by itself is said, and not waited for again."""
    row: dict[str, Any] = {"server": server.__name__, "attack": name}
    with tempfile.TemporaryDirectory() as folder:
        try:
            with server(Path(folder)) as (url, pid):
                row |= measure(url, pid, kinds, seconds)
            row["ended"] = True
        except AssertionError as err:
            row |= {"ended": False, "error": str(err).splitlines()[0][:200]}
    row["held"] = holds(row)
    print(line(row), file=sys.stderr, flush=True)
    return row


def holds(row: Mapping[str, Any]) -> bool:
    """Whether nothing was lost, no gap was too long, memory is back and the front ended."""
    if "gap_s" not in row or not row["ended"]:
        return False
    grown = row["memory_after_mb"] - row["memory_before_mb"]
    return bool(row["gap_s"] <= GAP_S and not row["lost"] and grown <= MEMORY_MB)


WHEN = ("before", "under_attack", "after")
HEADS = ("server", "attack", "longest gap", "lost", "first event", "/health", "memory, MB", "files")


def line(row: Mapping[str, Any]) -> str:
    """One row as Markdown."""
    first = [row["server"], row["attack"]]
    if "gap_s" not in row:
        return f"| {' | '.join([*first, row['error'], *[''] * 5])} |"
    memory = [row[f"memory_{when}_mb"] for when in ("before", "most", "after")]
    bad = f", {row['health_bad']} failed" if row["health_bad"] else ""
    cells = [
        *first,
        f"{row['gap_s']:.2f} s",
        f"{row['lost']} of {row['lost'] + row['whole']}",
        f"{row['first_s']:.2f} s",
        f"{row['health_s']:.2f} s{bad}",
        " / ".join(f"{value:.0f}" for value in memory),
        " / ".join(str(row[f"descriptors_{when}"]) for when in WHEN),
    ]
    end = "" if row["held"] else " **miss**" if row["ended"] else " **miss**, did not end"
    return f"| {' | '.join(cells)}{end} |"


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """All rows as Markdown."""
    head = [f"| {' | '.join(HEADS)} |", f"|{'---|' * len(HEADS)}"]
    return "\n".join([*head, *map(line, rows)])


def main(argv: Sequence[str]) -> int:
    args = _arguments(argv)
    seconds = 5.0 if args.quick else args.seconds
    rows = []
    if args.only:
        name = "all together" if tuple(args.only) == KINDS else "+".join(args.only)
        rows.append(attempt(fake, name, args.only, seconds))
    else:
        rows.append(attempt(fake, "none", (), seconds))
        rows += [attempt(fake, kind, (kind,), seconds) for kind in KINDS]
        rows.append(attempt(fake, "all together", KINDS, seconds))
        rows.append(attempt(real, "all together", KINDS, seconds))
    print(table(rows))
    facts = machine() | {"commit": commit(), "seconds": seconds, "share_of_a_core": SHARE}
    out = None if args.only else RESULTS / "attacks.json"
    finish(facts | {"held": all(row["held"] for row in rows), "rows": rows}, out)
    return 0 if all(row["held"] for row in rows) else 1


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    arguments = parser(__doc__)
    arguments.add_argument("--seconds", type=float, default=20.0, help="of each attack")
    arguments.add_argument("--quick", action="store_true", help="5 s of each attack")
    arguments.add_argument(
        "--only",
        action="append",
        choices=KINDS,
        help="this attack alone, or with others given the same way; nothing is written then",
    )
    return arguments.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
