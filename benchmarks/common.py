"""What the benchmarks share: arguments, the facts of the machine, and a last line that is JSON."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path("benchmarks/results")
MODEL = ".cache/smollm2-135m-instruct"  # made by `make model`


def parser(doc: str | None) -> argparse.ArgumentParser:
    """Arguments of a benchmark whose module says ``doc``: its first line is the description."""
    return argparse.ArgumentParser(description=(doc or "").splitlines()[0])


def machine() -> dict[str, Any]:
    """Where and when figures were taken: ``load`` is the mean number of runnable processes of the
    last minute, before the benchmark adds its own."""
    return {
        "date": date.today().isoformat(),
        "machine": f"{os.cpu_count()} cores, {processor()}, {platform.machine()}",
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": version("torch"),
    }


def commit() -> str:
    """The commit that was measured, with "+" where the files differ from it; "" outside git."""
    try:
        head = subprocess.run(
            ["git", "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
    return head + ("+" if changed else "")


def processor() -> str:
    """The processor's own name, as far as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown processor"
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown processor"


def command(module: str, argv: Sequence[str], ranks: int = 1) -> str:
    """The command line that runs ``benchmarks.<module>`` with ``argv``."""
    launch = ["python"] if ranks == 1 else ["torchrun", "--nproc-per-node", str(ranks)]
    return shlex.join([*launch, "-m", f"benchmarks.{module}", *argv])


def finish(result: Mapping[str, Any], out: Path | None) -> None:
    """Write ``result`` to ``out`` if there is one, and print it as the last line."""
    if out:
        out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


def pyplot() -> Any:
    """matplotlib's pyplot, set up so that the same figures give the same SVG file."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "ds_cp", "svg.fonttype": "none"})
    from matplotlib import pyplot

    return pyplot
