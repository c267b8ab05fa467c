"""How long an exchange between the ranks of one host takes: shared memory beside gloo, in one run.

    torchrun --nproc-per-node 2 -m benchmarks.wire [--rounds N] [--out FILE]

Each rank sends to the next one and receives from the one before (``exchange``), takes part in a
sum (``all_reduce``) and in a broadcast with an answer (``plan``: 4 KiB out, 1 KiB back from every
rank). ``pauses``: as in the layers of a decode, rank 0 works for 0.2 to 1 ms, then asks the other
ranks, which wait for that and answer, each by a message; the time is from asking to the last
answer. The carriers take turns, a few exchanges each. A row gives the least and the median time, of
the slowest rank; ``copy`` is a plain copy of the same bytes.
"""

from __future__ import annotations

import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import command, commit, finish, machine, parser
from ds_cp.comm import process_group
from ds_cp.comm.wire import Group, World
from ds_cp.config import load_config
from ds_cp.startup.join import join_job
from ds_cp.startup.resources import socket_environment
from ds_cp.topology.job import detect

SIZES = (1024, 16 * 1024, 256 * 1024, 2**20, 8 * 2**20)
TURN = 20  # exchanges of one carrier before it is the other's turn
PLAN, ANSWER = 4096, 1024
PAUSES_S = 0.2e-3, 1e-3
Exchange = Callable[[], float | None]  # returns seconds where they are not those of the whole call


def exchange(group: Group, nbytes: int) -> Exchange:
    mine, coming = torch.zeros(nbytes, dtype=torch.uint8), torch.empty(nbytes, dtype=torch.uint8)
    sends = [((group.rank + 1) % group.size, mine)]
    recvs = [((group.rank - 1) % group.size, coming)]
    return lambda: group.exchange(sends, recvs, "bench").wait()


def all_reduce(group: Group, nbytes: int) -> Exchange:
    tensor = torch.zeros(nbytes // 4)
    return lambda: group.all_reduce(tensor, "bench")


def plan(group: Group, nbytes: int) -> Exchange:
    frame = torch.zeros(nbytes, dtype=torch.uint8)
    answers = [torch.zeros(ANSWER, dtype=torch.uint8) for _ in range(group.size)]
    others = list(enumerate(answers))[1:]
    lead = group.rank == 0

    def once() -> None:
        group.broadcast(frame, "bench")
        pending = group.exchange([] if lead else [(0, answers[0])], others if lead else [], "bench")
        pending.wait()

    return once


def pauses(group: Group, nbytes: int) -> Exchange:
    rng, work = random.Random(2), torch.ones(4096)
    mine = torch.zeros(nbytes, dtype=torch.uint8)
    others = [peer for peer in range(group.size) if peer != group.rank]
    coming = [(peer, torch.empty_like(mine)) for peer in others]

    def ask() -> float:
        until = time.perf_counter() + rng.uniform(*PAUSES_S)
        while time.perf_counter() < until:
            work.mul_(1.0)
        began = time.perf_counter()
        asked = group.exchange([(peer, mine) for peer in others], [], "bench")
        answers = group.exchange([], coming, "bench")
        asked.wait()
        answers.wait()
        return time.perf_counter() - began

    def answer() -> float:
        group.exchange([], coming[:1], "bench").wait()
        group.exchange([(0, mine)], [], "bench").wait()
        return 0.0

    return answer if group.rank else ask


def timed(work: Exchange, count: int) -> list[float]:
    found = []
    for _ in range(count):
        began = time.perf_counter()
        seconds = work()
        found.append(time.perf_counter() - began if seconds is None else seconds)
    return found


def copied(nbytes: int) -> float:
    """Seconds of a copy of so many bytes, the least of several."""
    source = torch.zeros(nbytes, dtype=torch.uint8)
    target = torch.zeros_like(source)

    def once() -> None:
        target.copy_(source)

    return min(timed(once, 50))


def slowest(world: World, seconds: Sequence[float]) -> list[float]:
    """Of each figure the largest of all ranks."""
    rows = [torch.tensor(seconds, dtype=torch.float64) for _ in range(world.size)]
    everybody = range(world.size)
    others = [(r, rows[r]) for r in everybody if r != world.rank]
    mine = [(r, rows[world.rank]) for r in everybody if r != world.rank]
    world.everybody.exchange(mine, others, "bench").wait()
    largest: list[float] = torch.stack(rows).amax(0).tolist()
    return largest


def row(
    world: World, carriers: dict[str, Group], what: Callable[[Group, int], Exchange],
    nbytes: int, rounds: int,
) -> dict[str, Any]:  # fmt: skip
    """One kind of exchange and one size, the carriers in turns."""
    works = {name: what(group, nbytes) for name, group in carriers.items()}
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for work in works.values():
        timed(work, TURN)  # warm
    for _ in range(max(1, rounds // TURN)):
        for name, work in works.items():
            carriers[name].barrier()
            seconds[name] += timed(work, TURN)
    found: dict[str, Any] = {"what": what.__name__, "bytes": nbytes}
    for name, values in seconds.items():
        least, median = slowest(world, [min(values), statistics.median(values)])
        found[f"{name}_min_us"] = round(least * 1e6, 1)
        found[f"{name}_median_us"] = round(median * 1e6, 1)
    if what is exchange:
        found["copy_min_us"] = round(copied(nbytes) * 1e6, 1)
    return found


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--rounds", type=int, default=400)
    arguments.add_argument("--out", type=Path)
    args = arguments.parse_args(argv)
    about = machine()
    job = detect(os.environ)
    for variable, value in socket_environment(job).items():
        os.environ.setdefault(variable, value)
    config = load_config({"model": "none", "threads_per_rank": 1, "device": "cpu"})
    world, _ = join_job(job, config)
    ranks = list(range(world.size))
    far = process_group.new_group(ranks, world.timeout_s)
    carriers = {"shared": world.group("shared", [ranks]), "gloo": Group("gloo", ranks, world, far)}
    rows = []
    kinds = ((exchange, SIZES), (pauses, SIZES[1:2]), (all_reduce, SIZES[:2]), (plan, (PLAN,)))
    for what, sizes in kinds:
        for nbytes in sizes:
            rounds = args.rounds if nbytes < 2**20 else max(TURN, args.rounds // 8)
            rows.append(row(world, carriers, what, nbytes, rounds))
    if world.rank == 0:
        print(*world.notes, sep="\n", end="\n" if world.notes else "")
        print(
            "| exchange | bytes | shared: min, median us | gloo: min, median us | min, median x |"
        )
        print("|---|---|---|---|---|")
        for r in rows:
            least = r["gloo_min_us"] / r["shared_min_us"]
            median = r["gloo_median_us"] / r["shared_median_us"]
            print(
                f"| {r['what']} | {r['bytes']} | {r['shared_min_us']}, {r['shared_median_us']} "
                f"| {r['gloo_min_us']}, {r['gloo_median_us']} | {r.get('copy_min_us', '')} "
                f"| {least:.1f}x, {median:.1f}x |"
            )
        told = sys.argv[1:] if argv is None else argv
        head = {"benchmark": "wire", "command": command("wire", told, world.size)}
        finish({**head, **about, "commit": commit(), "ranks": world.size, "rows": rows}, args.out)
    carriers["gloo"].close()
    world.leave()


if __name__ == "__main__":
    main()
