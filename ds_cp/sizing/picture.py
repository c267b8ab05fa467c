"""The picture of ``ds-cp plan``: memory of a rank, largest context, times by number of ranks.

matplotlib draws it, and is imported only here, when a picture is asked for.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from ds_cp.errors import OutputError
from ds_cp.sizing.memory import GIB
from ds_cp.sizing.predict import MODES
from ds_cp.sizing.report import tokens

COLOURS = {
    "reserved": "#b0b0b0", "weights": "#4477aa", "kv": "#ee6677", "activations": "#ccbb44",
    "free": "#eeeeee",
}  # fmt: skip


def check_picture(file: str) -> None:
    """Refuse, before anything is computed, what could not be drawn: ``OutputError``."""
    if Path(file).suffix.lower() != ".png":
        raise OutputError(f"--png {file[:200]!r}: the name of the picture must end in .png")
    parent = Path(file).expanduser().parent
    if not parent.is_dir():
        raise OutputError(f"--png {file[:200]!r}: there is no directory {str(parent)[:200]}")
    _matplotlib()


def _matplotlib() -> Any:
    try:
        return importlib.import_module("matplotlib.figure")
    except ImportError as err:
        why = " ".join(str(err).split())[:200]
        raise OutputError(
            f"--png needs matplotlib, which cannot be imported ({why}): "
            "pip install 'matplotlib>=3.8', or leave --png out, the text is the same"
        ) from None


def draw(found: dict[str, Any], file: str) -> None:
    """Write ``sizing``'s result as a PNG. ``OutputError`` when it cannot be written."""
    figure = _matplotlib().Figure(figsize=(13, 3.6), layout="constrained")
    memory, context, first, further = figure.subplots(1, 4)
    _memory(memory, found["memory_per_rank"])
    _context(context, found)
    _times(first, found, "ttft_s", "time to the first token")
    _times(further, found, "tpot_s", "time per further token")
    job = found["job"]
    figure.suptitle(
        f"{found['model']['name']}, {tokens(job['context'])} tokens, {job['dtype']}, "
        f"{job['hosts']} x {job['ranks_per_host']} {found['device']['name']}, predicted"
    )
    try:
        figure.savefig(Path(file).expanduser(), format="png", dpi=120)
    except OSError as err:
        raise OutputError(f"cannot write {file[:200]}: {err.strerror or err}") from None


def _memory(axes: Any, memory: dict[str, Any]) -> None:
    at = 0.0
    for part, colour in COLOURS.items():
        height = max(memory[part], 0) / GIB
        axes.bar(["rank"], [height], bottom=at, color=colour, label=f"{part} {height:.1f}")
        at += height
    axes.axhline(memory["total"] / GIB, color="black", linewidth=1)
    axes.set(ylabel="GiB", title="memory of a rank", xlim=(-0.6, 2.2))
    axes.legend(loc="upper right", fontsize=7)


def _context(axes: Any, found: dict[str, Any]) -> None:
    rows = [row for row in found["largest_context"] if row["tokens"]]
    ranks, held = [row["ranks"] for row in rows], [row["tokens"] for row in rows]
    axes.plot(ranks, held, marker="o", color=COLOURS["kv"])
    asked = found["job"]["context"]
    axes.axhline(asked, color="black", linewidth=1, linestyle="--", label=f"asked: {tokens(asked)}")
    axes.set(xlabel="ranks", title="largest context, tokens")
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter(lambda value, _: tokens(round(value)))
    axes.legend(fontsize=7)
    _ranks(axes, found)


def _times(axes: Any, found: dict[str, Any], key: str, title: str) -> None:
    for mode, name in MODES.items():
        mine = [row for row in found["predictions"] if row["mode"] == mode]
        if mine:
            axes.plot([row["ranks"] for row in mine], [row[key] for row in mine], marker="o",
                      markersize=4, label=name)  # fmt: skip
    axes.set(xlabel="ranks", title=f"{title}, s")
    axes.set_yscale("log")
    axes.legend(fontsize=7)
    _ranks(axes, found)


def _ranks(axes: Any, found: dict[str, Any]) -> None:
    counts = [row["ranks"] for row in found["largest_context"]]
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [str(count) for count in counts], fontsize=7)
