"""Ratios out of the figures: by the minima and by the medians, each against its target."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.peers.measure import Figures, Results
from benchmarks.peers.rows import Ratio


def ratio_rows(ratios: Sequence[Ratio], found: Results) -> list[dict[str, Any]]:
    """A row each: ``min`` and ``median``, the target, and whether the minima meet it; or the reason
    why there is no figure."""
    return [_row(ratio, found) for ratio in ratios]


def _row(ratio: Ratio, found: Results) -> dict[str, Any]:
    above, below = (_figures(found, place) for place in (ratio.above, ratio.below))
    row: dict[str, Any] = {"title": ratio.title, "target": ratio.target}
    for figures, (_, name, quantity) in ((above, ratio.above), (below, ratio.below)):
        if not figures.seconds.get(quantity):
            return row | {"failed": f"{name}: {figures.failed or 'no figure'}"}
    scale = ratio.scale
    if ratio.per_byte:
        told = above.told
        read = told["weight_bytes"] + told["kv_bytes"] * ratio.tokens
        scale *= below.told["bytes"] / read

    def value(how: Callable[[list[float]], float]) -> float:
        return scale * how(above.seconds[ratio.above[2]]) / how(below.seconds[ratio.below[2]])

    least = value(min)
    bound = ratio.bound
    met = bound is None or (least >= bound if ratio.least else least <= bound)
    return row | {"min": round(least, 3), "median": round(value(statistics.median), 3), "met": met}


def _figures(found: Results, place: tuple[str, str, str]) -> Figures:
    case, name, _ = place
    return found.get(case, {}).get(name, Figures(failed="not played"))


def same_tokens(found: Results, reference: str = "transformers") -> dict[str, dict[str, int]]:
    """Of each case and contestant: how many tokens at the start of its answer are those of the
    reference. With random weights in bf16 an answer may part from another without a fault."""
    counts: dict[str, dict[str, int]] = {}
    for case, figures in found.items():
        want = figures[reference].told.get("ids") if reference in figures else None
        if not want:
            continue
        for name, one in figures.items():
            if ids := one.told.get("ids"):
                equal = [a == b for a, b in zip(ids, want, strict=False)]
                counts.setdefault(case, {})[name] = (equal + [False]).index(False)
    return counts
