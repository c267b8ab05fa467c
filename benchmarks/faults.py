"""Faults under load: requests in flight while workers are killed or stand still, token for token.

A server of the tiny model, or of the one named, gets every kind of request once, undisturbed. Then
``--requests`` of them run, ``--flight`` at a time, while ``--faults`` faults of random kinds hit
random ranks. Every answer must be the undisturbed one; at the end no block, process or descriptor
may be left. The last line is JSON: per kind of fault the seconds until all ranks had met again, and
the longest pause of the streams that it hit.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil

from benchmarks import common
from tests.helpers.jobs import Job, command
from tests.helpers.streams import Stream
from tests.helpers.tiny import LONG, make_tiny_model

BODIES: tuple[dict[str, Any], ...] = (
    {"prompt": LONG, "max_tokens": 200, "temperature": 0},
    {"prompt": LONG, "max_tokens": 120, "temperature": 1.0, "seed": 1},
    {"prompt": "Hi", "max_tokens": 80, "temperature": 0, "logprobs": 3},
    {"prompt": "Say", "max_tokens": 60, "temperature": 1.0, "seed": 2, "presence_penalty": 0.5},
    {"prompt": "One", "max_tokens": 50, "temperature": 0.7, "seed": 3, "n": 3},
    {"prompt": "Say", "max_tokens": 40, "temperature": 1.0, "seed": 4, "ignore_eos": False,
     "structured_outputs": {"regex": "[a-f]{200}"}},
    {"prompt": LONG[:40], "max_tokens": 30, "temperature": 0, "repetition_penalty": 1.2},
)  # fmt: skip
START_S, MEND_S = 60.0, 180.0
SPREAD_S = 1.5  # a fault comes at most so long after the one before was mended
MET = re.compile(r"all ranks have met again \(generation (\d+), ([\d.]+) s\)")


@dataclass
class Fault:
    """What happened at ``at``, in ``time.monotonic()``, to the streams that were in flight.
    ``mended``: seconds until all had met again; None where no rank was lost."""

    kind: str
    at: float
    hit: list[Stream] = field(default_factory=list)
    mended: float | None = None

    def pauses(self) -> list[float]:
        """The longest time without an event from the last one before it on, of each stream."""
        found = []
        for stream in self.hit:
            times = list(stream.times)
            before = max((t for t in times if t <= self.at), default=self.at)
            since = [before, *(t for t in times if t > self.at)]
            found.append(max((b - a for a, b in pairwise(since)), default=0.0))
        return found


class Harness:
    def __init__(self, job: Job, url: str, ranks: int, rng: random.Random) -> None:
        self.job, self.url, self.ranks, self.rng = job, url, ranks, rng
        self.kinds: dict[str, Callable[[], bool]] = {
            "kill": lambda: self._kill(1),
            "kill two": lambda: self._kill(min(2, ranks)),
            "kill again while it loads": self._kill_again,
            "stand still for 1 s": lambda: self._stop(1.0),
            "stand still for ever": lambda: self._stop(None),
        }

    def workers(self) -> dict[int, psutil.Process]:
        """The worker of each rank: the older process, where another one waits."""
        found: dict[int, psutil.Process] = {}
        for rank in range(self.ranks):
            processes = self.job.matching("serve.worker_process", rank)
            found[rank] = min(processes, key=psutil.Process.create_time)
        return found

    def inject(self, kind: str, streams: list[Stream]) -> Fault:
        """Do it, and wait until all is well again."""
        before = len(MET.findall(self.job.err))
        in_flight = [stream for stream in streams if not stream.is_over]
        fault = Fault(kind, time.monotonic(), in_flight)
        if self.kinds[kind]():
            self.job.until(
                f"the end of {kind!r}", lambda: len(MET.findall(self.job.err)) > before, MEND_S
            )
            fault.mended = time.monotonic() - fault.at
        return fault

    # --- kinds of faults; whether ranks have to meet again

    def _kill(self, count: int) -> bool:
        for worker in self.rng.sample(list(self.workers().values()), count):
            worker.kill()
        return True

    def _kill_again(self) -> bool:
        rank, worker = self.rng.choice(list(self.workers().items()))
        worker.kill()

        def another() -> list[psutil.Process]:
            return [p for p in self.job.matching("serve.worker_process", rank) if p != worker]

        time.sleep(self.rng.uniform(0.0, 1.0))
        min(self.job.until("another", another, MEND_S), key=psutil.Process.create_time).kill()
        return True

    def _stop(self, seconds: float | None) -> bool:
        worker = self.rng.choice(list(self.workers().values()))
        worker.suspend()
        if seconds is None:
            return True
        time.sleep(seconds)
        worker.resume()
        return False


def run(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The whole harness; raises ``AssertionError`` where a promise is not kept."""
    rng = random.Random(args.seed)
    config = {
        "model": args.model or str(make_tiny_model(folder / "model")),
        "dtype": "fp32",
        "threads_per_rank": 1,
        "kv_cache": {"tokens_per_rank": args.tokens, "block_size": 16},
        "server": {"port": 0, "served_model_name": "tiny"},
        "fault_tolerance": {
            "hang_s": args.hang_s,
            "spare_after_s": 0 if args.spare else None,
            "spare_model": args.spare,
            "max_restarts": 5,
        },
    }
    file = folder / "config.json"
    file.write_text(json.dumps(config))
    job = Job(command("ds-cp", "serve", args.ranks, ["--config", str(file)]), folder)
    try:
        return (measure_pauses if args.pauses else measure)(job, args, rng)
    finally:
        job.close()


def measure(job: Job, args: argparse.Namespace, rng: random.Random) -> dict[str, Any]:
    """With a server that starts."""
    url = job.ready()
    harness = Harness(job, url, args.ranks, rng)
    expected = [Stream(url, body).end() for body in BODIES]
    books = state(job, url)
    began = time.monotonic()
    running: list[Stream] = []
    asked, wrong, faults = 0, 0, []
    next_at = began
    while asked < args.requests or running or len(faults) < args.faults:
        while len(running) < args.flight and (asked < args.requests or len(faults) < args.faults):
            running.append(Stream(url, BODIES[rng.randrange(len(BODIES))]))
            asked += 1
        if len(faults) < args.faults and time.monotonic() >= next_at:
            faults.append(harness.inject(rng.choice(args.kinds or list(harness.kinds)), running))
            next_at = time.monotonic() + rng.uniform(0.0, SPREAD_S)
            print(f"{len(faults)}/{args.faults} {faults[-1].kind}", file=sys.stderr, flush=True)
        for stream in [stream for stream in running if stream.is_over]:
            running.remove(stream)
            good = not stream.errors and stream.answers == expected[BODIES.index(stream.body)]
            if not good:
                wrong += 1
                print(f"wrong: {stream.body} {stream.errors}", file=sys.stderr, flush=True)
        time.sleep(0.01)
    seconds = time.monotonic() - began
    job.until("idle", lambda: gauge(url, "ds_cp:num_requests_running") == 0, START_S)
    left = {name: (books[name], now) for name, now in state(job, url).items() if books[name] != now}
    return {
        **common.machine(),
        "commit": common.commit(),
        "command": common.command("faults", sys.argv[1:]),
        "requests": asked,
        "lost_or_wrong": wrong,
        "faults": len(faults),
        "seconds": round(seconds, 1),
        "left_behind": left,
        "kinds": {kind: summary(faults, kind) for kind in harness.kinds},
    }


def measure_pauses(job: Job, args: argparse.Namespace, rng: random.Random) -> dict[str, Any]:
    """``--pauses`` kills of a worker of the server, each while one stream runs a rank, and one that
    spans ranks: seconds until the death was known, and the longest pause of each stream since."""
    url = job.ready()
    harness = Harness(job, url, args.ranks, rng)
    span = {"prompt": [100 + n % 5000 for n in range(args.span)], "max_tokens": 24 + args.pauses}
    bodies = [{"prompt": f"Number {rank}", "max_tokens": 600, "temperature": 0}
              for rank in range(args.ranks)]  # fmt: skip
    known, local, spanning, prefill = [], [], [], []
    for number in range(args.pauses):
        asked = time.monotonic()
        streams = [Stream(url, span | {"temperature": 0})]
        job.until("the span", lambda: streams[0].count > 0, MEND_S)  # noqa: B023
        prefill.append(streams[0].times[0] - asked)
        streams += [Stream(url, body) for body in bodies]
        job.until("tokens", lambda: all(one.count > 2 for one in streams), MEND_S)  # noqa: B023
        assert not any(one.is_over for one in streams), "a stream was over before the fault"
        fault = Fault("kill", time.monotonic(), streams)
        list(harness.workers().values())[rng.randrange(args.ranks)].kill()
        while job.err.count("; another worker takes its place") <= number:
            time.sleep(0.001)
        known.append(time.monotonic() - fault.at)
        streams[0].end()
        first, *others = fault.pauses()
        spanning.append(first)
        local += others
        for stream in streams[1:]:
            stream.close()
    return {
        **common.machine(),
        "commit": common.commit(),
        "command": common.command("faults", sys.argv[1:]),
        "known_s": quantiles(known),
        "local_pause_s": quantiles(local),
        "spanning_pause_s": quantiles(spanning),
        "prefill_s": quantiles(prefill),
        "met_again_s": quantiles([float(found[1]) for found in MET.findall(job.err)]),
    }


def quantiles(values: list[float]) -> list[float] | None:
    """Median, 99th percentile and worst."""
    values = sorted(values)
    if not values:
        return None
    return [round(values[int(share * (len(values) - 1))], 3) for share in (0.5, 0.99, 1.0)]


def summary(faults: list[Fault], kind: str) -> dict[str, Any]:
    """Of the faults of one kind: medians and the worst, in seconds."""
    some = [fault for fault in faults if fault.kind == kind]
    mended = [fault.mended for fault in some if fault.mended is not None]
    pauses = [pause for fault in some for pause in fault.pauses()]
    return {"faults": len(some), "mended_s": quantiles(mended), "pause_s": quantiles(pauses)}


def state(job: Job, url: str) -> dict[str, Any]:
    """What is the same before and after: processes, descriptors of supervisors, used blocks."""
    processes = job.processes()
    names = Counter("worker" if "worker_process" in " ".join(p.cmdline()) else "other"
                    for p in processes)  # fmt: skip
    workers = job.matching("serve.worker_process")
    supervisors = {p.ppid() for p in workers}
    return {
        "processes": dict(names),
        "descriptors": sum(psutil.Process(pid).num_fds() for pid in supervisors),
        "used_blocks": gauge(url, "ds_cp:kv_blocks", 'state="used"'),
    }


def gauge(url: str, name: str, only: str = "") -> float:
    """The sum of a metric over its labels, those among them in ``only``."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=60) as answer:
        text = answer.read().decode()
    return sum(
        float(line.rsplit(" ", 1)[1])
        for line in text.splitlines()
        if line.startswith((f"{name}{{", f"{name} ")) and only in line
    )


def main() -> int:
    """Exit code 1 when an answer was lost or wrong, or something was left behind."""
    parser = common.parser(__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument("--flight", type=int, default=8, help="requests at a time")
    parser.add_argument("--faults", type=int, default=10)
    parser.add_argument("--kinds", nargs="*", help="of faults; default: all")
    parser.add_argument("--tokens", type=int, default=1024, help="KV tokens of a rank")
    parser.add_argument("--hang_s", type=float, default=5.0)
    parser.add_argument("--spare", action="store_true", help="processes wait with the model loaded")
    parser.add_argument("--pauses", type=int, default=0, help="kills whose pauses are measured")
    parser.add_argument("--span", type=int, default=4000, help="tokens of the prompt that spans")
    parser.add_argument("--model", help="a folder; default: the tiny model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = run(args, Path(folder))
    common.finish(result, args.out)
    return int(bool(result.get("lost_or_wrong") or result.get("left_behind")))


if __name__ == "__main__":
    sys.exit(main())
