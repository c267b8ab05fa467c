"""Cases played in turn: A, B, C, A, B, C, ... and what is kept of them."""

from __future__ import annotations

import os
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import psutil

from benchmarks.peers.players import Job, Player, PlayerError

MOST_LOAD = 0.5  # processors that others may use; with more, figures are not comparable
LOOKS, LOOK_S = 10, 3.0  # how often others' use is looked at before a row is refused; seconds
QUIET_SAMPLE_S = 0.2  # seconds over which others' work is looked at, while nobody plays
WARM_UP_S = 240.0  # seconds
MOST_CHECKED = 4096  # tokens; the comparison with fp64 takes longer than the measurement


@dataclass(frozen=True)
class Case:
    """One workload: what is asked of each contestant. ``rounds``: how often each has its turn;
    ``limit_s``: seconds of one turn; ``only``: the contestants that take part (all if empty)."""

    name: str
    question: Mapping[str, Any]
    rounds: int
    limit_s: float
    only: tuple[str, ...] = ()


@dataclass
class Figures:
    """What one contestant did in one case. ``seconds``: by quantity, one figure a turn or several;
    ``told``: what else it said in its last turn."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    told: dict[str, Any] = field(default_factory=dict)
    failed: str = ""

    def add(self, answers: Sequence[Mapping[str, Any]]) -> None:
        """The answers of all ranks in one turn: where each gives a list, a call took as long as the
        rank that took longest."""
        first = answers[0]
        if "seconds" in first:
            calls = zip(*(answer["seconds"] for answer in answers), strict=True)
            self.seconds.setdefault("seconds", []).extend(max(call) for call in calls)
        for name in ("ttft", "tpot"):
            if name in first:
                self.seconds.setdefault(name, []).append(first[name])
        errors = [answer["max_error"] for answer in answers if "max_error" in answer]
        known = {"seconds", "ttft", "tpot", "max_error"}
        self.told |= {name: value for name, value in first.items() if name not in known}
        if errors:
            self.told["max_error"] = max(errors + [self.told.get("max_error", 0.0)])

    def values(self, quantity: str) -> list[float]:
        """All figures of a quantity; of "max_error" the one, the largest."""
        if quantity == "max_error":
            return [self.told[quantity]] if quantity in self.told else []
        return self.seconds.get(quantity, [])

    def result(self) -> dict[str, Any]:
        """For JSON: minimum and median of each quantity, all figures, and what was told."""
        found: dict[str, Any] = {
            name: {
                "min": min(values),
                "median": statistics.median(values),
                "all": [float(f"{value:.4g}") for value in values],
            }
            for name, values in self.seconds.items()
        }
        told = {name: value for name, value in self.told.items() if name != "ids"}
        return found | told | ({"failed": self.failed} if self.failed else {})


Results = dict[str, dict[str, Figures]]  # case -> contestant -> figures


def play(
    players: Sequence[Callable[[], Player]],
    names: Sequence[str],
    cases: Sequence[Case],
    warm_up: Mapping[str, Any],
) -> tuple[Results, float]:
    """Start all, let them warm up, play the cases. A contestant that fails is left out from there
    on, with its reason. Returns the figures and the largest share of the processors that others
    used between two turns."""
    jobs: dict[str, Job] = {}
    reasons: dict[str, str] = {}
    busy = 0.0
    try:
        for name, make in zip(names, players, strict=True):
            _say(f"  starts: {name}")
            try:
                jobs[name] = Job(make())
                jobs[name].ask(warm_up, WARM_UP_S)
            except PlayerError as err:
                _drop(name, str(err), jobs, reasons)
        found: Results = {}
        for case in cases:
            wanted = [name for name in names if not case.only or name in case.only]
            figures = {name: Figures(failed=reasons.get(name, "")) for name in wanted}
            found[case.name] = figures
            for number in range(case.rounds):
                busy = max(busy, psutil.cpu_percent(QUIET_SAMPLE_S) / 100)
                for name in wanted:
                    if name not in jobs:
                        continue
                    check = number == 0 and case.question.get("tokens", 0) <= MOST_CHECKED
                    # A prompt of its own in each round, the same for all.
                    question = {**case.question, "seed": 1000 * number + 7, "check": check}
                    try:
                        figures[name].add(jobs[name].ask(question, case.limit_s))
                    except PlayerError as err:
                        figures[name].failed = str(err)
                        _drop(name, str(err), jobs, reasons)
            _say(f"  {case.name}: " + ", ".join(_short(name, figures[name]) for name in wanted))
        return found, busy
    finally:
        for job in jobs.values():
            job.close()


def _drop(name: str, reason: str, jobs: dict[str, Job], reasons: dict[str, str]) -> None:
    reasons[name] = reason
    _say(f"  {name} failed: {reason}")
    job = jobs.pop(name, None)
    if job:
        job.close()


def _short(name: str, figures: Figures) -> str:
    if not figures.seconds:
        return f"{name} -"
    parts = [f"{1e3 * min(values):.4g}" for values in figures.seconds.values()]
    return f"{name} {' / '.join(parts)} ms"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def load() -> float:
    """Mean number of runnable processes of the last minute."""
    return round(os.getloadavg()[0], 2)


def others() -> float:
    """How many processors others use; asked while nobody plays. The least of a few looks, so that
    what has just ended, or starts for a moment, is not taken for company."""
    cores = os.cpu_count() or 1
    least = float(cores)
    for _ in range(LOOKS):
        least = min(least, cores * psutil.cpu_percent(LOOK_S) / 100)
        if least <= MOST_LOAD:
            break
    return round(least, 2)
