"""Half an hour of mixed load on one server: memory stays flat, and the books balance at the end.

``--requests`` requests of all kinds, spread over ``--minutes``, a tenth of which their clients
leave; every minute a worker is killed and a rank is drained and reopened. Every answer is compared
with the undisturbed one. Memory is each process's own (USS) every ``SAMPLE_S``: of what lives long
enough, the median of its last third may be ``FLAT`` above that of the third before at most. The
last line is JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import sys
import tempfile
import threading
import time
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from benchmarks import common
from benchmarks.faults.books import books, shared_files
from benchmarks.faults.kinds import Scene
from benchmarks.faults.life import SETTLE_S
from benchmarks.faults.load import BODIES, Load, Tally
from benchmarks.faults.server import configure
from tests.helpers.jobs import Job, command, post
from tests.helpers.streams import Stream

SAMPLE_S = 5.0
WARM_S = 60.0  # of a process's life, in which caches and arenas fill
LEAST_SAMPLES = 12  # of a process that is judged
FLAT = 0.03
LEAVES = 0.1  # share of requests whose clients leave


class Memory:
    """Samples of the own memory of every process of a job, by pid: seconds since the start, MiB."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._began = time.monotonic()
        self._ends = threading.Event()
        self.samples: dict[int, list[tuple[float, float]]] = defaultdict(list)
        self.names: dict[int, str] = {}
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """No more samples."""
        self._ends.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ends.wait(SAMPLE_S):
            for process in self._job.processes():
                with contextlib.suppress(psutil.Error):
                    mib = process.memory_full_info().uss / 2**20
                    at = time.monotonic() - self._began
                    self.samples[process.pid].append((round(at, 1), round(mib, 2)))
                    self.names.setdefault(process.pid, " ".join(process.cmdline())[-60:])

    def growth(self) -> dict[str, dict[str, Any]]:
        """Of every process that lived long enough: MiB in its middle and last third, and the share
        by which the last is above."""
        found = {}
        for pid, samples in self.samples.items():
            warm = [mib for at, mib in samples if at - samples[0][0] >= WARM_S]
            if len(warm) < LEAST_SAMPLES:
                continue
            third = len(warm) // 3
            middle, last = median(warm[third : 2 * third]), median(warm[-third:])
            found[f"{pid} {self.names[pid]}"] = {
                "minutes": round((samples[-1][0] - samples[0][0]) / 60, 1),
                "middle_mib": round(middle, 1),
                "last_mib": round(last, 1),
                "growth": round(last / middle - 1, 4),
            }
        return found


class Trouble:
    """Every minute, in a thread: a worker is killed, and half a minute later a rank is drained and
    reopened."""

    def __init__(self, scene: Scene, url: str) -> None:
        self._scene, self._url = scene, url
        self._ends = threading.Event()
        self.kills, self.drains = 0, 0
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """No more of it."""
        self._ends.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ends.wait(30.0):
            with contextlib.suppress(psutil.Error):
                self._scene.worker().kill()
                self.kills += 1
            if self._ends.wait(30.0):
                return
            rank = self._scene.rng.randrange(self._scene.ranks)
            with contextlib.suppress(OSError):  # the others may not hold what runs
                post(f"{self._url}/ranks/{rank}/drain", {})
                self.drains += 1
            self._ends.wait(2.0)
            with contextlib.suppress(OSError):
                post(f"{self._url}/ranks/{rank}/reopen", {})


def run(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The whole soak."""
    rng = random.Random(args.seed)
    file = configure(folder, None, args)
    shared = shared_files()
    job = Job(command("ds-cp", "serve", args.ranks, ["--config", str(file)]), folder)
    try:
        url = job.ready()
        expected: list[Any] = [Stream(url, body).end() for body in BODIES]
        before = books(job, url)
        tally = Tally()
        load = Load(url, 0, expected, rng, tally)
        memory = Memory(job)
        trouble = Trouble(Scene(job, url, args.ranks, load, None, random.Random(rng.random())), url)
        seconds = spread(load, args, rng)
        trouble.close()
        load.close()
        memory.close()
        limit = time.monotonic() + SETTLE_S
        while (now := books(job, url)) != before and time.monotonic() < limit:
            time.sleep(0.5)
        job.process.terminate()
        job.gone(60)
    finally:
        job.close()
    growth = memory.growth()
    return {
        **common.machine(),
        "commit": common.commit(),
        "command": common.command("soak", sys.argv[1:]),
        "ranks": args.ranks,
        "minutes": round(seconds / 60, 1),
        "requests": tally.asked,
        "right": tally.right,
        "clients_left": tally.refused,
        "lost_or_wrong": tally.wrong,
        "kills": trouble.kills,
        "drains": trouble.drains,
        "left_behind": {k: (v, now[k]) for k, v in before.items() if now[k] != v},
        "shared_files_left": shared_files() - shared,
        "exit_code": job.process.returncode,
        "memory": growth,
        "not_flat": [name for name, one in growth.items() if one["growth"] > FLAT],
        "uss_mib": {str(pid): samples[::6] for pid, samples in memory.samples.items()},
    }


def spread(load: Load, args: argparse.Namespace, rng: random.Random) -> float:
    """Ask all requests, evenly over the time, at most ``flight`` at a time; the seconds it took."""
    began = time.monotonic()
    for number in range(args.requests):
        due = began + number * args.minutes * 60 / args.requests
        while time.monotonic() < due or len(load.streams) >= args.flight:
            time.sleep(0.005)
        stream = load.ask(rng.choice(BODIES))
        if rng.random() < LEAVES:
            threading.Timer(rng.uniform(0.0, 0.5), stream.leave).start()
        if number % 500 == 499:
            done = f"{number + 1}/{args.requests} after {time.monotonic() - began:.0f} s"
            print(done, file=sys.stderr, flush=True)
    return time.monotonic() - began


def main() -> int:
    """Exit code 1 when an answer was lost or wrong, memory grew, or something was left behind."""
    parser = common.parser(__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--flight", type=int, default=12, help="requests at a time, at most")
    parser.add_argument("--tokens", type=int, default=1024, help="KV tokens of a rank")
    parser.add_argument("--hang_s", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        result = run(args, Path(name))
    common.finish(result, args.out)
    wrong = ("lost_or_wrong", "left_behind", "not_flat", "exit_code")
    return int(any(result[name] for name in wrong) or result["shared_files_left"] > 0)


if __name__ == "__main__":
    sys.exit(main())
