"""Run parts one after the other, each with a limit, and never leave one of them running."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from benchmarks.conformance.parts import Part, SkippedError

LEAVE_S = 40.0  # seconds that an interrupted part gets to end its servers
LAST_CHARS = 160  # of the last line that a failed part printed


@dataclass(frozen=True)
class Done:
    """How a part ended: ok, failed or skipped; why; and its seconds, preparation included."""

    name: str
    result: str
    detail: str
    seconds: float


def run_all(parts: Sequence[Part], limit_s: float, logs: Path) -> list[Done]:
    """Every part that fits into ``limit_s`` seconds together. Output goes to a file of ``logs``."""
    end = time.monotonic() + limit_s
    found = []
    for part in parts:
        found.append(run_one(part, end - time.monotonic(), logs))
        one = found[-1]
        print(f"--- {one.name}: {one.result} in {one.seconds:.0f} s {one.detail}", flush=True)
        if one.result == "failed":
            print(_log(part, logs).read_text(errors="replace")[-6000:], flush=True)
    return found


def run_one(part: Part, left_s: float, logs: Path) -> Done:
    """One part, within its own limit and ``left_s``."""
    began = time.monotonic()

    def done(result: str, detail: str) -> Done:
        return Done(part.name, result, detail, time.monotonic() - began)

    if left_s <= 0:
        return done("skipped", "no time was left; run it by itself")
    try:
        part.needs()
    except SkippedError as err:
        return done("skipped", str(err))
    left_s -= time.monotonic() - began
    if left_s <= 0:
        return done("skipped", "its preparation took the time that was left; run it again")
    with _log(part, logs).open("wb") as log:
        process = subprocess.Popen(
            part.argv,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(min(part.limit_s, left_s))
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(process)
    if code is None and left_s < part.limit_s:
        return done("skipped", "the time of all parts was used up; run it by itself")
    if code is None:
        return done("failed", f"did not end within {part.limit_s:g} s")
    if code:
        return done("failed", f"exit code {code}: {_last(part, logs)}")
    return done("ok", "")


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a part that still runs: by an interrupt, at which it ends its servers, then for good."""
    if process.poll() is not None:
        return
    os.kill(process.pid, signal.SIGINT)
    with suppress(subprocess.TimeoutExpired):
        process.wait(LEAVE_S)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _log(part: Part, logs: Path) -> Path:
    return logs / f"{part.name}.log"


def _last(part: Part, logs: Path) -> str:
    lines = _log(part, logs).read_text(errors="replace").split("\n")
    said = [line.strip() for line in lines if line.strip()]
    return said[-1][:LAST_CHARS] if said else "it printed nothing"


def table(found: Sequence[Done]) -> str:
    """The summary, a line for each part and one that counts them."""
    width = max(len(one.name) for one in found)
    lines = [
        f"{one.name:{width}}  {one.result:7}  {one.seconds:5.0f} s  {one.detail}".rstrip()
        for one in found
    ]
    counts = Counter(one.result for one in found)
    counted = f"{counts['ok']} passed, {counts['failed']} failed, {counts['skipped']} skipped"
    return "\n".join([*lines, counted])


def exit_code(found: Sequence[Done]) -> int:
    """1 where a part failed. A skipped one says why, and fails nothing."""
    return int(any(one.result == "failed" for one in found))


def interruptible() -> None:
    """Have SIGTERM end this process as an interrupt does: parts are ended with it."""

    def leave(*_: object) -> None:
        sys.exit(1)

    signal.signal(signal.SIGTERM, leave)
