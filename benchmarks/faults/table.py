"""Outcomes as one row for each kind of fault."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.faults.life import Outcome


def table(outcomes: Sequence[Outcome]) -> dict[str, dict[str, Any]]:
    """By kind: how many, in which phases, seconds until a new request was answered and of pauses
    of streams that were in flight (median, 99th percentile, worst), or until all had ended."""
    found: dict[str, dict[str, Any]] = {}
    for kind in dict.fromkeys(outcome.kind for outcome in outcomes):
        some = [outcome for outcome in outcomes if outcome.kind == kind]
        found[kind] = {
            "faults": len(some),
            "phases": sorted({outcome.phase for outcome in some}),
            "mended_s": three([one.mended_s for one in some if one.ended_s is None]),
            "pause_s": three([pause for one in some for pause in one.pauses_s]),
            "ended_s": three([one.ended_s for one in some if one.ended_s is not None]),
        }
    return found


def three(values: Sequence[float]) -> list[float] | None:
    """Median, 99th percentile, worst."""
    if not values:
        return None
    ordered = sorted(values)
    return [round(ordered[int(share * (len(ordered) - 1))], 2) for share in (0.5, 0.99, 1.0)]
