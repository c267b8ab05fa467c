"""Ratios out of the figures: by the minima and by the medians, one of them against its target."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.peers.measure import Figures, Results
from benchmarks.peers.rows import Ratio


def ratio_rows(ratios: Sequence[Ratio], found: Results) -> list[dict[str, Any]]:
    """A row each: ``min`` and ``median``, the target, and whether the one of them that it is for
    meets it; or the reason why there is no figure."""
    return [_row(ratio, found) for ratio in ratios]


def _row(ratio: Ratio, found: Results) -> dict[str, Any]:
    above, below = (_figures(found, place) for place in (ratio.above, ratio.below))
    row: dict[str, Any] = {"title": ratio.title, "target": ratio.target}
    sides = []
    for figures, (_, name, quantity) in ((above, ratio.above), (below, ratio.below)):
        values = figures.values(quantity)
        if not values:
            return row | {"failed": f"{name}: {figures.failed or 'no figure'}"}
        sides.append(values)
    if not min(sides[1]):
        return row | {"failed": f"{ratio.below[1]}: its figure is 0"}
    scale = ratio.scale
    if ratio.per_byte:
        told = above.told
        read = told["weight_bytes"] + told["kv_bytes"] * ratio.tokens
        scale *= below.told["bytes"] / read

    def value(how: Callable[[list[float]], float]) -> float:
        return scale * how(sides[0]) / how(sides[1])

    found_by = {"min": value(min), "median": value(statistics.median)}
    judged, bound = found_by[ratio.by], ratio.bound
    met = bound is None or (judged >= bound if ratio.least else judged <= bound)
    return row | {how: round(figure, 3) for how, figure in found_by.items()} | {"met": met}


def _figures(found: Results, place: tuple[str, str, str]) -> Figures:
    case, name, _ = place
    return found.get(case, {}).get(name, Figures(failed="not played"))


def without_figure(found: Results) -> list[str]:
    """The cases in which a contestant of ds_cp's own has no figure."""
    return [
        f"{name}, {case}: {figures.failed or 'no figure'}"
        for case, contestants in found.items()
        for name, figures in contestants.items()
        if name.partition(",")[0] == "ds_cp" and not figures.seconds
    ]


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
