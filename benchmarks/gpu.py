"""Everything that wants a GPU, in one run of less than 9 minutes: checks, then times, then a table.

    python -m benchmarks.gpu [--only kernels,prefill] [--device cpu --quick]

No network. Each section is a process of its own with a deadline, so that one that fails, hangs or
breaks the device loses nothing but itself. The table comes last, and the same as JSON lies in
benchmarks/results/gpu-<date>-<device>.json. With ``--device cpu --quick`` the same code runs over
tiny sizes, which says nothing but that it runs. Exit status 1 when a check failed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, command, commit, machine, parser

LIMIT_S = 520.0  # seconds of the whole run
LEAST_S = 5.0  # seconds that a section is worth starting with
LAUNCH = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")
# name -> seconds, ranks, module
SECTIONS: dict[str, tuple[float, int, str]] = {
    "kernels": (75, 1, "gpu_checks"),
    "one-rank": (45, 1, "gpu_checks"),
    "two-ranks": (60, 2, "gpu_checks"),
    "four-ranks": (75, 4, "gpu_checks"),
    "tests": (100, 0, ""),
    "prefill": (60, 1, "gpu_kernels"),
    "decode": (45, 1, "gpu_kernels"),
    "merge": (25, 1, "gpu_kernels"),
    "step": (60, 1, "gpu_model"),
    "model": (75, 1, "gpu_model"),
    "flex": (50, 1, "gpu_kernels"),
}
CHECKS = ("kernels", "one-rank", "two-ranks", "four-ranks", "tests")


def argv_of(name: str, device: str, quick: bool) -> list[str]:
    """The command of a section."""
    _, ranks, module = SECTIONS[name]
    if name == "tests":
        mark = "gpu" if device == "cuda" else "gpu and not gpu"
        return [sys.executable, "-m", "pytest", "-q", "-m", mark, "-p", "no:cacheprovider", "tests"]
    launch = ["-m"] if ranks == 1 else [*LAUNCH, str(ranks), "-m"]
    more = ["--quick"] if quick else []
    return [sys.executable, *launch, f"benchmarks.{module}", name, "--device", device, *more]


def run_section(name: str, device: str, quick: bool, limit: float) -> dict[str, Any]:
    """What a section found, or why it did not: ``{"rows": [...], "problem": "..."}``."""
    began = time.monotonic()
    child = subprocess.Popen(
        argv_of(name, device, quick), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = child.communicate(timeout=limit)
        problem = "" if child.returncode == 0 else f"exit status {child.returncode}"
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        output, _ = child.communicate()
        problem = f"not done after {limit:.0f} s"
    lines = output.strip().splitlines()
    rows = [json.loads(line[4:]) for line in lines if line.startswith("ROW ")]
    if name == "tests":
        passed = problem in ("", "exit status 5")  # 5: no test was chosen
        rows = [{"what": lines[-1] if lines else "no output", "ok": passed}]
        problem = "" if passed else problem
    said = [line for line in lines if not line.startswith("ROW ")]
    found = {"rows": rows, "problem": problem, "seconds": round(time.monotonic() - began, 1)}
    if problem:
        found["output"] = said[-30:]
    return found


def table(found: dict[str, dict[str, Any]]) -> list[str]:
    """Lines of a Markdown table of all rows, and of what is missing."""
    lines = ["| section | row | value | against | target |", "|---|---|---|---|---|"]
    for name, section in found.items():
        for row in section["rows"]:
            value = row.get("value", "ok" if row.get("ok") else "WRONG")
            cells = (name, row["what"], value, row.get("against", ""), row.get("target", ""))
            lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
        if section["problem"]:
            lines.append(f"| {name} | (failed) | {section['problem']} | | |")
    return lines


def device_name(device: str) -> str:
    """The GPU's own name, in a process of its own: this one must not hold the device."""
    if device == "cpu":
        return "cpu"
    ask = "import torch; print(torch.cuda.get_device_name(0))"
    found = subprocess.run(
        [sys.executable, "-c", ask], capture_output=True, text=True, timeout=60, check=False
    )
    if found.returncode:
        lines = found.stderr.strip().splitlines()
        sys.exit(f"gpu: no CUDA device: {lines[-1] if lines else 'no reason is given'}")
    return found.stdout.strip().splitlines()[-1]


def main(argv: Sequence[str] | None = None) -> int:
    arguments: argparse.ArgumentParser = parser(__doc__)
    arguments.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    arguments.add_argument("--quick", action="store_true", help="tiny sizes")
    arguments.add_argument("--only", default=",".join(SECTIONS), help="sections, by name")
    arguments.add_argument("--limit", type=float, default=LIMIT_S, help="seconds of the whole run")
    arguments.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON")
    args = arguments.parse_args(argv)
    wanted = args.only.split(",")
    if unknown := [name for name in wanted if name not in SECTIONS]:
        arguments.error(f"no section {', '.join(unknown)}; there are {', '.join(SECTIONS)}")
    end = time.monotonic() + args.limit
    about, name = machine(), device_name(args.device)
    found: dict[str, dict[str, Any]] = {}
    for section in wanted:
        left = end - time.monotonic()
        if left < LEAST_S:
            found[section] = {"rows": [], "problem": "no time was left", "seconds": 0.0}
            continue
        print(f"gpu: {section} ...", flush=True)
        limit = min(left, SECTIONS[section][0] * (3 if args.device == "cpu" else 1))
        found[section] = run_section(section, args.device, args.quick, limit)
        for line in found[section].get("output", ()):
            print(f"    {line}")
    bad = [s for s in wanted if s in CHECKS and not _fine(found[s])]
    result = {
        "command": command("gpu", sys.argv[1:] if argv is None else argv), **about,
        "commit": commit(), "device": name, "quick": args.quick, "sections": found, "wrong": bad,
    }  # fmt: skip
    short = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    file = args.out / f"gpu-{about['date']}-{short}.json"
    file.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\n{name}, {about['date']}, torch {about['torch']}; {file}\n")
    print("\n".join(table(found)))
    return 1 if bad else 0


def _fine(section: dict[str, Any]) -> bool:
    return not section["problem"] and all(row.get("ok", True) for row in section["rows"])


if __name__ == "__main__":
    sys.exit(main())
