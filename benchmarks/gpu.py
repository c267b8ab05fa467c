"""Everything that wants a GPU, in one run of less than 9 minutes: checks, then times, then a table.

    python -m benchmarks.gpu [--only kernels,prefill] [--device cpu --quick]

No network. Each section is a process of its own with a deadline, so that one that fails, hangs or
breaks the device loses nothing but itself. The table comes last, and the same as JSON lies in
benchmarks/results/gpu-<date>-<device>.json. With ``--device cpu --quick`` the same code runs over
tiny sizes, which says nothing but that it runs. Exit status 1 when a check failed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import psutil

from benchmarks.common import RESULTS, command, commit, machine, parser

LIMIT_S = 530.0  # seconds of the whole run
NAME_S = 60.0  # seconds that the device gets to tell its name
LEAST_S = 5.0  # seconds that a section is worth starting with
STOP_S = 5.0  # seconds that the other ranks of a section get when one has failed, or was killed
# name -> seconds, ranks, module
SECTIONS: dict[str, tuple[float, int, str]] = {
    "kernels": (65, 1, "gpu_checks"),
    "one-rank": (30, 1, "gpu_checks"),
    "two-ranks": (35, 2, "gpu_checks"),
    "four-ranks": (45, 4, "gpu_checks"),
    "tests": (85, 1, ""),
    "rank-tests": (35, 1, ""),
    "prefill": (45, 1, "gpu_kernels"),
    "decode": (35, 1, "gpu_kernels"),
    "merge": (10, 1, "gpu_kernels"),
    "step": (30, 1, "gpu_model"),
    "spans": (25, 1, "gpu_spans"),
    "deterministic": (30, 1, "gpu_model"),
    "model": (35, 1, "gpu_model"),
    "flex": (25, 1, "gpu_kernels"),
}
CHECKS = ("kernels", "one-rank", "two-ranks", "four-ranks", "tests", "rank-tests")
# Multi-rank tests that are run on CUDA tensors here; CONTRIBUTING.md says how all of them are.
RANK_TESTS = (
    "tests/dist/test_modes.py::test_a_steps_requests_in_every_mode[aabb]",
    "tests/dist/test_modes.py::test_answers_of_the_same_rows_are_merged_at_once[tree-aabba]",
    "tests/dist/test_reused_blocks.py::test_blocks_left_full_of_nan_are_as_good_as_new",
)


def argv_of(name: str, device: str, quick: bool) -> list[str]:
    """The command of a section."""
    if name == "tests":
        mark = "gpu" if device == "cuda" else "gpu and not gpu"
        return [sys.executable, "-m", "pytest", "-q", "-m", mark, "-p", "no:cacheprovider", "tests"]
    if name == "rank-tests":
        run = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *RANK_TESTS]
        if device == "cpu":  # they are in `make test`
            return [*run, "-m", "gpu and not gpu"]
        return ["env", f"DS_CP_TEST_DEVICE={device}", *run]
    more = ["--quick"] if quick else []
    module = f"benchmarks.{SECTIONS[name][2]}"
    return [sys.executable, "-m", module, name, "--device", device, *more]


def run_section(name: str, device: str, quick: bool, limit: float) -> dict[str, Any]:
    """What a section found, or why it did not: ``{"rows": [...], "problem": "..."}``."""
    began = time.monotonic()
    # A file, not a pipe: what a section leaves behind may hold a pipe open for ever.
    with tempfile.TemporaryFile("a+") as file:
        problem = _run(argv_of(name, device, quick), SECTIONS[name][1], file, limit)
        file.seek(0)
        lines = file.read().strip().splitlines()
    rows: list[dict[str, Any]] = []
    said = [line for line in lines if not line.startswith("ROW ")]
    for line in lines:
        if line.startswith("ROW "):
            try:
                rows.append(json.loads(line[4:]))
            except ValueError:  # cut where its process was killed
                said.append(line)
                problem = problem or "a row was cut"
    if name in ("tests", "rank-tests"):
        last = said[-1] if said else "no output"
        passed = not problem and re.search(r"\b[1-9]\d* passed", last) is not None
        if device == "cpu" and problem == "exit status 5":  # no test was chosen
            passed, problem = True, ""
        rows = [{"what": last, "ok": passed}]
    found = {"rows": rows, "problem": problem, "seconds": round(time.monotonic() - began, 1)}
    if problem:
        found["output"] = said[-30:]
    return found


def _run(argv: list[str], ranks: int, file: IO[str], limit: float) -> str:
    """Run the ranks of a section, which are ended with all that they started when one fails or at
    the limit. Returns what went wrong."""
    end, problem = time.monotonic() + limit, ""
    children = [
        subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
            env={**os.environ, **env}, start_new_session=True,
        )
        for env in _environments(ranks)
    ]  # fmt: skip
    try:
        while any(child.poll() is None for child in children):
            failed = [child.returncode for child in children if child.poll()]
            if failed and not problem:
                problem, end = f"exit status {failed[0]}", min(end, time.monotonic() + STOP_S)
            if time.monotonic() > end:
                return problem or f"not done after {limit:.0f} s"
            time.sleep(0.05)
        failed = [child.returncode for child in children if child.returncode]
        return problem or (f"exit status {failed[0]}" if failed else "")
    finally:
        _end(children)


def _environments(ranks: int) -> list[dict[str, str]]:
    """What a launcher would tell each rank of this host."""
    if ranks == 1:
        return [{}]
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    both = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
            "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}  # fmt: skip
    return [{**both, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def _end(children: Sequence[subprocess.Popen[bytes]]) -> None:
    """Kill what still runs, and what it started, also in sessions of its own."""
    victims: list[psutil.Process] = []
    for child in children:
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(child.pid)
            victims += [*process.children(recursive=True), process]
        with contextlib.suppress(OSError):  # those whose parent has ended
            os.killpg(child.pid, signal.SIGKILL)
    for victim in victims:
        with contextlib.suppress(psutil.Error):
            victim.kill()
    end = time.monotonic() + STOP_S
    for child in children:
        # One that does not die hangs in the driver; the sections that follow will say so.
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(max(0.0, end - time.monotonic()))


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
    try:
        found = subprocess.run(
            [sys.executable, "-c", ask], capture_output=True, text=True, timeout=NAME_S, check=False
        )
    except subprocess.TimeoutExpired:
        sys.exit(f"gpu: the CUDA device does not answer within {NAME_S:.0f} s")
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
