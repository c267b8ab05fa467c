"""Far more requests than a server can take: what it goes on serving, and what it tells the others.

A server of the tiny model is first kept full, which gives its peak, in answers a second. Then as
many as ``--times`` that come, for ``--seconds``, each once on a connection of its own; a share of
those that are refused come again after the Retry-After that they were given. The last line is JSON:
answers a second under both loads, the seconds until a refusal, the server's memory, and how often
who came again was taken.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from benchmarks import common
from tests.helpers.jobs import Job, command
from tests.helpers.tiny import make_tiny_model

TOKENS = 60  # of an answer
SEATS, QUEUE = 8, 32
RETURNING = 20  # of the requests that are refused, one in so many comes again
ROUND_S = 0.02  # seconds between looks at how many are due


@dataclass
class Seen:
    """What became of requests. ``took``: seconds of refusals; ``again``: of those that came again
    when they were told, whether they were taken then; ``late``: seconds until they were, over what
    they were told."""

    answers: list[float] = field(default_factory=list)  # when they ended
    took: list[float] = field(default_factory=list)
    told: list[int] = field(default_factory=list)
    again: list[bool] = field(default_factory=list)
    late: list[float] = field(default_factory=list)
    odd: list[str] = field(default_factory=list)


async def ask(port: int) -> tuple[int, int, float]:
    """Status, Retry-After, and the seconds up to the head of the answer."""
    body = json.dumps({
        "model": "tiny", "prompt": "Hello there", "max_tokens": TOKENS, "ignore_eos": True,
    }).encode()  # fmt: skip
    began = time.monotonic()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(
            b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n"
            b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
        )
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        seconds = time.monotonic() - began
        await reader.read()
    finally:
        writer.close()
    names = dict(line.split(": ", 1) for line in head.splitlines()[1:] if ": " in line)
    return int(head.split()[1]), int(names.get("retry-after", 0)), seconds


async def one(port: int, seen: Seen, returns: bool) -> None:
    """A request, and where it is refused and ``returns``, those that follow."""
    first: tuple[float, int] | None = None
    for _ in range(20 if returns else 1):
        try:
            status, retry_s, seconds = await ask(port)
        except (OSError, asyncio.IncompleteReadError, ValueError) as err:
            seen.odd.append(repr(err))
            return
        if first is not None:
            seen.again.append(status == 200)
        if status == 200:
            seen.answers.append(time.monotonic())
            if first is not None:
                # The answer's own time apart: it was taken when it was sent.
                seen.late.append((time.monotonic() - seconds - first[0]) / first[1])
            return
        if status != 429:
            seen.odd.append(str(status))
            return
        seen.took.append(seconds)
        seen.told.append(retry_s)
        first = first or (time.monotonic(), retry_s)
        if returns:
            await asyncio.sleep(retry_s)


async def closed(port: int, clients: int, seconds: float) -> float:
    """Answers a second while so many clients ask one after the other."""
    seen, end = Seen(), time.monotonic() + seconds

    async def client() -> None:
        while time.monotonic() < end:
            await one(port, seen, returns=False)

    began = time.monotonic()
    await asyncio.gather(*(client() for _ in range(clients)))
    return len(seen.answers) / (time.monotonic() - began)


async def burst(port: int, rate: float, seconds: float, patience_s: float) -> tuple[Seen, float]:
    """``rate`` requests a second; what became of them, ``patience_s`` after the last, and the
    answers a second meanwhile."""
    seen, began, tasks = Seen(), time.monotonic(), set[asyncio.Task[None]]()
    count = 0
    while (now := time.monotonic() - began) < seconds:
        while count < now * rate:
            tasks.add(asyncio.create_task(one(port, seen, count % RETURNING == 0)))
            count += 1
        await asyncio.sleep(ROUND_S)
    done = sum(at < began + seconds for at in seen.answers)
    await asyncio.wait(tasks, timeout=patience_s)
    return seen, done / seconds


def memory(job: Job) -> int:
    """Resident bytes of rank 0's supervisor: the server and its scheduler."""
    (worker,) = job.matching("serve.worker_process", 0)
    parent = worker.parent()
    assert parent is not None
    return int(psutil.Process(parent.pid).memory_info().rss)


def measure(times: float, seconds: float, patience_s: float) -> dict[str, Any]:
    """The whole run."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file = folder / "config.json"
        file.write_text(json.dumps({
            "model": str(make_tiny_model(folder / "tiny")),
            "dtype": "fp32", "threads_per_rank": 1,
            "kv_cache": {"tokens_per_rank": 4096, "block_size": 16},
            "scheduler": {"max_num_seqs": SEATS, "max_queue": QUEUE},
            "server": {"port": 0, "served_model_name": "tiny"},
        }))  # fmt: skip
        job = Job(command("ds-cp", "serve", 1, ["--config", str(file)]), folder)
        try:
            port = int(job.ready().rsplit(":", 1)[1])
            asyncio.run(closed(port, SEATS, seconds / 2))  # until it knows its speed
            before = memory(job)
            peak = asyncio.run(closed(port, 2 * SEATS, seconds))
            seen, meanwhile = asyncio.run(burst(port, times * peak, seconds, patience_s))
            after = memory(job)
        finally:
            job.close()
    took = sorted(seen.took)
    return {
        "peak_per_s": round(peak, 2),
        "burst_per_s": round(meanwhile, 2),
        "goodput": round(meanwhile / peak, 3),
        "refused": len(took),
        "refusal_ms": [round(1e3 * took[int(q * (len(took) - 1))], 1) for q in (0.5, 0.99, 1.0)],
        "retry_after_s": [min(seen.told), round(statistics.median(seen.told)), max(seen.told)],
        "came_again": len(seen.again),
        "taken_then": round(statistics.mean(seen.again), 3) if seen.again else None,
        "taken_after_over_told": round(statistics.median(seen.late), 2) if seen.late else None,
        "memory_mib": [before >> 20, after >> 20],
        "odd": len(seen.odd),
        "odd_example": seen.odd[:1],
    }


def main(argv: list[str]) -> int:
    """Run and print."""
    arguments = common.parser(__doc__)
    arguments.add_argument("--times", type=float, default=50.0, help="load over the peak")
    arguments.add_argument("--seconds", type=float, default=10.0, help="of each part")
    arguments.add_argument("--patience", type=float, default=120.0, help="seconds for the last")
    arguments.add_argument("--out", type=Path)
    given: argparse.Namespace = arguments.parse_args(argv)
    result = measure(given.times, given.seconds, given.patience)
    common.finish(
        {"command": common.command("burst", argv), "commit": common.commit()}
        | common.machine() | result,
        given.out,
    )  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
