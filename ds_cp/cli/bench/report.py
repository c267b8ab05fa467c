"""What all kinds of ``ds-cp bench`` print: one table, or one object of the same shape."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ds_cp.cli.output import put, writing
from ds_cp.errors import LaunchError
from ds_cp.text import shorten
from ds_cp.version import __version__

WIDTH = 110  # columns of a table that does not go to a terminal
MAX_ROUNDS = 1_000_000


@dataclass(frozen=True)
class Figure:
    """One thing that was measured, ``values`` once or often."""

    name: str
    unit: str
    values: Sequence[float]

    def plain(self) -> dict[str, Any]:
        """Its row."""
        ordered = sorted(self.values)
        return {
            "name": self.name,
            "unit": self.unit,
            "count": len(ordered),
            "min": _rounded(ordered[0]) if ordered else None,
            "median": _rounded(median(ordered)) if ordered else None,
            "p90": _rounded(percentile(ordered, 90)) if ordered else None,
            "p99": _rounded(percentile(ordered, 99)) if ordered else None,
            "max": _rounded(ordered[-1]) if ordered else None,
        }


def percentile(ordered: Sequence[float], percent: float) -> float:
    """The value below which ``percent`` of them lie, by the nearest rank; ``ordered`` ascending,
    one or more."""
    rank = -(-percent * len(ordered) // 100)
    return ordered[max(0, int(rank) - 1)]


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")


def machine() -> dict[str, Any]:
    """This machine. ``load``: the mean number of runnable processes of the last minute."""
    names: list[str] = []
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    except OSError:
        pass
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        torch: str | None = metadata.version("torch")
    except metadata.PackageNotFoundError:
        torch = None
    return {
        "host": platform.node(),
        "cores": cores,
        "processor": names[0] if names else platform.processor() or "unknown",
        "architecture": platform.machine(),
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch,
    }


def report(
    kind: str, settings: Mapping[str, Any], about: Mapping[str, Any], figures: Sequence[Figure],
    *, as_json: bool, notes: Sequence[str] = (), taken_on: Mapping[str, Any] | None = None,
) -> None:  # fmt: skip
    """Print the figures of ``ds-cp bench KIND``. ``settings``: what was asked for; ``about``: what
    was found; ``notes``: lines on what went wrong."""
    here = taken_on or machine()
    date = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    if as_json:
        put(json.dumps({
            "bench": kind, "ds_cp": __version__, "date": date, "machine": here,
            "settings": dict(settings), "about": dict(about),
            "figures": [figure.plain() for figure in figures], "notes": list(notes),
        }))  # fmt: skip
        return
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = WIDTH
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 2, 0, 0))
    for column in ("", "unit", "min", "median", "p90", "p99", "count"):
        table.add_column(column, justify="left" if column in ("", "unit") else "right")
    for figure in figures:
        row = figure.plain()
        cells = [number(row[name]) for name in ("min", "median", "p90", "p99")]
        table.add_row(figure.name, figure.unit, *cells, f"{row['count']}")
    with writing(sys.stdout):
        console.print(Text(f"ds-cp bench {kind}, {date}, ds_cp {__version__}"), soft_wrap=True)
        console.print(Text(
            f"{here['cores']} cores, {here['processor']}, {here['architecture']}, torch "
            f"{here['torch']}, load {here['load']} before"
        ), soft_wrap=True)  # fmt: skip
        for facts in (settings, about):
            if words := [f"{name} {shorten(str(value), 60)}" for name, value in facts.items()]:
                console.print(Text(", ".join(words)), soft_wrap=True)
        console.print(table)
        for note in notes:
            console.print(Text(note), soft_wrap=True)


def number(value: float | None) -> str:
    """A figure with four digits or so."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def within(flag: str, value: int, low: int, high: int) -> int:
    """``value``, or ``LaunchError`` that names the flag."""
    if not low <= value <= high:
        raise LaunchError(f"{flag} is {value}; it must be from {low} to {high}")
    return value
