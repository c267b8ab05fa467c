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
    figure = _matplotlib().Figure(figsize=(11, 3.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    memory, at = found["memory_per_rank"], 0.0
    for part, colour in COLOURS.items():
        height = max(memory[part], 0) / GIB
        left.bar(["rank"], [height], bottom=at, color=colour, label=f"{part} {height:.1f}")
        at += height
    left.axhline(memory["total"] / GIB, color="black", linewidth=1)
    left.set(ylabel="GiB", title="memory of a rank", xlim=(-0.6, 1.8))
    left.legend(loc="upper right", fontsize=7)
    rows = found["largest_context"]
    middle.plot(
        [r["ranks"] for r in rows], [r["tokens"] for r in rows], marker="o", color="#ee6677"
    )
    middle.axhline(found["job"]["context"], color="black", linewidth=1, linestyle="--")
    middle.set(xlabel="ranks", ylabel="tokens", title="largest context")
    middle.set_xscale("log", base=2)
    middle.set_yscale("symlog", base=2, linthresh=1024)
    for mode, name in MODES.items():
        mine = [r for r in found["predictions"] if r["mode"] == mode]
        if mine:
            x, y = [r["ranks"] for r in mine], [r["ttft_s"] for r in mine]
            right.plot(x, y, marker="o", label=name)
    right.set(xlabel="ranks", ylabel="seconds", title="time to the first token")
    right.set_xscale("log", base=2)
    right.set_yscale("log")
    right.legend(fontsize=7)
    job = found["job"]
    figure.suptitle(
        f"{found['model']['name']}, {job['context']} tokens, "
        f"{job['hosts']} x {job['ranks_per_host']} {found['device']['name']}"
    )
    try:
        figure.savefig(Path(file).expanduser(), format="png", dpi=120)
    except OSError as err:
        raise OutputError(f"cannot write {file[:200]}: {err.strerror or err}") from None
