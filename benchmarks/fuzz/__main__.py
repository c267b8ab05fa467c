"""schemathesis over the HTTP front: all modes, every phase, null bytes; and what came back.

No answer may be a 5xx, and none may have a status, content type, header or body that openapi.json
does not document; the process that served the first case serves the last one. schemathesis has an
environment of its own under .cache/environments. ``--legs`` runs some legs, and keeps what the
result has of the others and of other seeds: ``--limit-s`` and ``--seed`` run it in pieces. Each
leg says on which commit, when and where it ran.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, commit, finish, machine, parser
from benchmarks.environments import environment
from benchmarks.server import front_of, serving
from tests.helpers.front import front
from tests.helpers.spoken import TEMPLATE

PACKAGES = ("schemathesis==4.32.*",)
HOOKS = Path(__file__).with_name("hooks.py")
# What each answer must meet. That a body outside the schema is refused is not asked: unknown fields
# are ignored with a warning, and openapi.json does not say every bound that the engine has.
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
)
LENGTH = 384  # tokens of the fake model: a tool of the client is in the prompt
REAL_LENGTH = 96  # of the real one, so that no case takes long
KEY = "key-of-the-fuzzer"
# The fake engine has a template that reads tools and reasoning.
FAKE = {"max_model_len": LENGTH, "chat_template": TEMPLATE}
FAKE_MODEL, QUICKSTART_MODEL = "fake-model", "smollm2-135m-instruct"


@dataclass(frozen=True)
class Leg:
    """One run of schemathesis: over which server, with how many random cases a route.

    ``cases``: in ``LEGS`` as a part of those asked for, one in so many.
    """

    server: Callable[[Path], Any]
    cases: int
    name: str = ""
    model: str = ""  # of the server, where values are narrowed to those that the engine takes
    headers: Mapping[str, str] = field(default_factory=dict)
    checks: tuple[str, ...] = CHECKS


def main(argv: Sequence[str]) -> int:
    arguments = parser(__doc__)
    arguments.add_argument("--cases", type=int, default=1000, help="random cases for each route")
    arguments.add_argument("--seed", type=int, default=8)
    arguments.add_argument("--legs", nargs="+", choices=LEGS, default=list(LEGS))
    arguments.add_argument("--limit-s", type=int, default=1200, help="of each leg")
    arguments.add_argument("--at-once", type=int, default=2, help="legs that run beside each other")
    arguments.add_argument("--out", type=Path, default=RESULTS / "fuzz.json")
    args = arguments.parse_args(argv)
    python = environment("schemathesis", PACKAGES)
    chosen = [
        replace(LEGS[name], name=name, cases=max(1, args.cases // LEGS[name].cases))
        for name in args.legs
    ]
    results = kept(args.out)
    with ThreadPoolExecutor(args.at_once) as pool:
        for done in as_completed([pool.submit(run, leg, python, args) for leg in chosen]):
            leg = done.result()
            mark = (leg["leg"], leg["seed"])
            results = [one for one in results if (one["leg"], one["seed"]) != mark] + [leg]
            found = machine() | {"commits": sorted({one["commit"] for one in results})}
            found |= summary(results) | {"legs": results}
            finish(found, args.out)  # whatever becomes of the others
    return 1 if found["server_errors"] or found["failures"] or not found["same_process"] else 0


def kept(file: Path) -> list[dict[str, Any]]:
    """The legs in a result that is there."""
    found: list[dict[str, Any]] = json.loads(file.read_text())["legs"] if file.exists() else []
    return [leg for leg in found if leg["leg"] in LEGS and "commit" in leg]


@contextmanager
def fake(folder: Path) -> Iterator[str]:
    with front(folder, engine=FAKE) as running:
        yield running.url


@contextmanager
def fake_with_key(folder: Path) -> Iterator[str]:
    with front(folder, api_key=KEY, engine=FAKE) as running:
        yield running.url


@contextmanager
def real(folder: Path) -> Iterator[str]:
    from tests.helpers.tiny import make_tiny_model  # it imports transformers, which takes seconds

    model = make_tiny_model(folder / "tiny")
    kv = {"tokens_per_rank": 512, "block_size": 16}
    with serving(2, model=str(model), max_model_len=REAL_LENGTH, kv_cache=kv) as (url, _):
        yield url


LEGS = {
    "front over a fake engine": Leg(fake, 2),
    "the same, values in range": Leg(fake, 2, model=FAKE_MODEL),
    "the same with a key": Leg(
        fake_with_key,
        12,
        headers={"Authorization": f"Bearer {KEY}"},
        checks=(*CHECKS, "ignored_auth"),
    ),
    "tiny model on two ranks, values in range": Leg(real, 12, model=QUICKSTART_MODEL),
}


def run(leg: Leg, python: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Run one leg: its counts, and schemathesis' last lines where it found something."""
    facts = machine()
    with tempfile.TemporaryDirectory() as name, leg.server(Path(name)) as url:
        counts = Path(name) / "counts.json"
        process = front_of(url)
        began = time.monotonic()
        done = subprocess.run(
            command(leg, python, url, args),
            env=os.environ
            | {"SCHEMATHESIS_HOOKS": str(HOOKS), "FUZZ_COUNTS": str(counts)}
            | {"FUZZ_MODEL": leg.model},
            cwd=name,
            stdout=subprocess.PIPE,
            text=True,
        )
        seconds = time.monotonic() - began
        if done.returncode not in (0, 1) or not counts.exists():
            raise RuntimeError(f"schemathesis ended with {done.returncode}:\n{done.stdout[-3000:]}")
        counted = json.loads(counts.read_text())
        same = process.is_running() and front_of(url).pid == process.pid
    print(f"--- {leg.name}\n{done.stdout}", file=sys.stderr)
    result: dict[str, Any] = {"leg": leg.name, "seconds": round(seconds, 1)}
    result |= {"seed": args.seed, "cases": leg.cases, "same_process": same}
    result |= {"commit": commit(), "date": facts["date"], "machine": facts["machine"]}
    found = failures(done.stdout)
    if done.returncode and not found:
        found = done.stdout.splitlines()[-3:]
    result |= {"found": found, "slowest_s": worst(counted["slowest_s"])}
    return result | {"rows": counted["rows"]}


def command(leg: Leg, python: Path, url: str, args: argparse.Namespace) -> list[str]:
    """The command line of one leg."""
    given = [f"--header={name}: {value}" for name, value in leg.headers.items()]
    return [
        *[str(python), "-m", "schemathesis.cli", "run", f"{url}/openapi.json"],
        *["--no-color", *given],
        *["--phases", "examples,coverage,fuzzing,stateful", "--mode", "all"],
        *["--generation-allow-x00", "true", "--checks", ",".join(leg.checks)],
        *["--max-examples", str(leg.cases), "--seed", str(args.seed)],
        *["--max-time", str(args.limit_s)],
        # One thread a leg: with more, CPython 3.11 now and then fails to compile.
        *["--workers", "1", "--request-timeout", "60", "--continue-on-failure"],
        *["--generation-database", "none", "--suppress-health-check", "all"],
    ]


def failures(output: str) -> list[str]:
    """What schemathesis lists as failures and errors, without the cases."""
    found = []
    for title in ("= ERRORS =", "= FAILURES ="):
        _, begin, rest = output.partition(title)
        listed = re.split(r"= (?:FAILURES|WARNINGS|SUMMARY) =", rest)[0].splitlines()
        kept = ("- ", "__", "    Received", "    Documented", "[", "Runtime")
        found += [line.strip("_ ")[:200] for line in listed if begin and line.startswith(kept)]
    return found


def worst(seconds: Mapping[str, float]) -> dict[str, float]:
    """The slowest route and its seconds."""
    if not seconds:
        return {}
    route = max(seconds, key=lambda name: seconds[name])
    return {route: round(seconds[route], 2)}


def summary(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Cases of all legs by status and by content type."""
    statuses: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    for result in results:
        for _, status, kind, count in result["rows"]:
            statuses[str(status)] += count
            kinds[kind or "none"] += count
    return {
        "cases": sum(statuses.values()),
        "server_errors": sum(n for status, n in statuses.items() if status >= "5"),
        "failures": sum(len(result["found"]) for result in results),
        "same_process": all(result["same_process"] for result in results),
        "statuses": dict(sorted(statuses.items())),
        "content_types": dict(sorted(kinds.items())),
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
