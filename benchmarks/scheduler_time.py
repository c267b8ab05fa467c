"""What one step costs on rank 0 before and after the ranks work: the scheduler's own time.

    python -m benchmarks.scheduler_time [--out DIR] [--profile]

256 requests decode over 100,000 blocks of 16 tokens, on 1 and 4 ranks, two steps under way as in
the engine. Each request opens a block every 16 tokens; when one ends the next arrives, half of them
with one of eight system prompts. Pools: *evicting*, prefix caching on and every block that no
request holds cached, in random order, so that each allocation evicts; *fragmented*, half of the
blocks in use at random and no caching, so that free blocks lie alone. Once more with every request
on all ranks. Then with 16 to 1024 requests, and with 1,000 to 1,000,000 blocks (there with blocks
of 64 and short requests, so that 256 of them fit in the smallest pool).

Timed apart: ``schedule``; ``record`` (observe_step, and record_token for every drawn token); the
two together; their ``cpu`` time, which leaves out waiting for a core; encoding the plan; and on
the ranks decoding it and ``WorkerState.apply``. Times in milliseconds: median, p99, min over
steps. The last line is one JSON object.
"""

from __future__ import annotations

import cProfile
import json
import pstats
import random
import statistics
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, command, machine, parser, pyplot
from ds_cp.engine.loop import DEPTH
from ds_cp.plan import StepPlan, decode_plan, encode_plan
from ds_cp.sampling_params import SamplingParams
from ds_cp.scheduler.admission import Limits
from ds_cp.scheduler.host_moves import HostRules
from ds_cp.scheduler.mode_policy import ModePolicy
from ds_cp.scheduler.request import Request
from ds_cp.scheduler.scheduler import Scheduler
from ds_cp.worker.state import WorkerState

VOCAB = 49_152
SYSTEM_PROMPTS, SYSTEM_TOKENS = 8, 256
PARTS = ("schedule", "record", "both", "cpu", "encode", "decode", "apply", "admit")
TARGET_MS = 1.0  # ms a step of schedule and record together, 256 requests, 100,000 blocks
REQUESTS = (16, 32, 64, 128, 256, 512, 1024)
BLOCKS = (1_000, 3_000, 10_000, 30_000, 100_000, 300_000, 1_000_000)
COLOURS = {1: "#1b6ca8", 4: "#c8553d"}  # by ranks


@dataclass(frozen=True)
class Load:
    """``requests`` running over ``blocks`` in all; ``prompt`` and ``answer``: tokens, from and to;
    ``spanning``: each of them on all ranks, else on one."""

    requests: int
    blocks: int
    ranks: int
    pool: str = "evicting"
    block_size: int = 16
    prompt: tuple[int, int] = (64, 1024)
    answer: tuple[int, int] = (64, 448)
    spanning: bool = False


def short(requests: int, blocks: int, ranks: int) -> Load:
    """Requests of at most 4 blocks, on average half of that."""
    return Load(requests, blocks, ranks, "evicting", 64, (32, 96), (64, 128))


class Bench:
    """One scheduler under one load, stepped and timed."""

    def __init__(self, load: Load, seed: int = 1, host: HostRules | None = None) -> None:
        self.load = load
        self.random = random.Random(seed)
        share = load.blocks // load.ranks
        limits = Limits(1_000_000, load.requests, 8192, 10_000, VOCAB, (0,))
        policy = ModePolicy(
            mode="auto", ring_pass="auto", local_threshold=0 if load.spanning else None,
            num_hosts=1, num_q_heads=9, num_kv_heads=3,
        )  # fmt: skip
        self.scheduler = Scheduler(
            limits, [share] * load.ranks, load.block_size, "balanced", "zigzag", policy,
            range(load.ranks), prefix_caching=load.pool == "evicting", host=host,
        )  # fmt: skip
        self._fill()
        self.state = WorkerState(0, load.block_size)
        self.live: dict[int, Request] = {}
        self.flying: deque[tuple[StepPlan, list[tuple[int, int]]]] = deque()
        self.times: dict[str, list[float]] = {}
        self.profiler: cProfile.Profile | None = None
        low, high = load.prompt
        self._words = [self.random.randrange(1, VOCAB) for _ in range(2 * high + 10_000)]
        self._systems = [self._text(SYSTEM_TOKENS) for _ in range(SYSTEM_PROMPTS)]
        for _ in range(load.requests):  # as if they had begun at different times
            self._arrive(self.random.random())
        self._reset()
        while len(self.scheduler.waiting) or any(r.prefilling for r in self.scheduler.running):
            self.step()

    def _fill(self) -> None:
        """The pool as it is after hours: nothing untouched."""
        allocator, load = self.scheduler.allocator, self.load
        for rank, count in enumerate(allocator.blocks_per_rank):
            blocks = list(allocator.allocate(rank, count))
            if load.pool == "evicting":
                for block in blocks:
                    allocator.put(self.random.randbytes(32), (rank, block))
                self.random.shuffle(blocks)
            else:
                blocks = self.random.sample(blocks, count // 2)
            allocator.release([(rank, block) for block in blocks])

    def _text(self, count: int) -> list[int]:
        """Tokens that hardly ever repeat."""
        at = self.random.randrange(len(self._words) - count)
        step = self.random.randrange(1, VOCAB)
        return [(word + step) % VOCAB for word in self._words[at : at + count]]

    def _arrive(self, part: float = 1.0) -> None:
        """One more request waits; ``part`` of its answer is still to come."""
        load, rng = self.load, self.random
        prompt = self._text(rng.randint(*load.prompt))
        if len(prompt) > SYSTEM_TOKENS and rng.random() < 0.5:
            prompt[:SYSTEM_TOKENS] = rng.choice(self._systems)
        answer = max(2, int(part * rng.randint(*load.answer)))
        params = SamplingParams(max_tokens=answer, temperature=0.0, ignore_eos=True)
        began = time.perf_counter()
        request = self.scheduler.admit("", prompt, params, seed=1)
        if part == 1.0:
            self.times["admit"].append(1e3 * (time.perf_counter() - began))
        self.live[request.number] = request

    def _reset(self) -> None:
        self.times = {part: [] for part in PARTS}
        self.steps = self.arrivals = self.opened = self.running = self.nbytes = 0
        self._evictions = self.scheduler.allocator.evictions

    def step(self) -> None:
        """Plan one step, and record the tokens of the one before the last."""
        scheduler, times, clock = self.scheduler, self.times, time.perf_counter
        while len(self.live) < self.load.requests:
            self._arrive()
            self.arrivals += 1
        before = time.thread_time()
        marks = [clock()]
        if self.profiler:
            self.profiler.enable()
        plan = scheduler.schedule()
        if self.profiler:
            self.profiler.disable()
        assert plan is not None
        marks.append(clock())
        cpu = time.thread_time() - before
        payload = encode_plan(plan)
        marks.append(clock())
        received = decode_plan(payload)
        assert isinstance(received, StepPlan)
        marks.append(clock())
        work = self.state.apply(received)
        marks.append(clock())
        drawn = [(d.sequence.number, self.random.randrange(1, VOCAB)) for d in work.draws]
        self.flying.append((plan, drawn))
        before = time.thread_time()
        record, ended = self._record() if len(self.flying) == DEPTH else (0.0, [])
        times["cpu"].append(1e3 * (cpu + time.thread_time() - before))
        for number in ended:
            del self.live[number]
        spans = [1e3 * (b - a) for a, b in zip(marks, marks[1:], strict=False)]
        for name, span in zip(("schedule", "encode", "decode", "apply"), spans, strict=True):
            times[name].append(span)
        times["record"].append(record)
        times["both"].append(spans[0] + record)
        self.steps += 1
        self.opened += len(plan.grown) + sum(len(chunk.homes) for chunk in plan.chunks)
        self.running += len(scheduler.running)
        self.nbytes += len(payload)

    def _record(self) -> tuple[float, list[int]]:
        """The oldest step under way is done; milliseconds, and the requests that ended."""
        plan, drawn = self.flying.popleft()
        scheduler, live = self.scheduler, self.live
        ended = []
        began = time.perf_counter()
        if self.profiler:
            self.profiler.enable()
        scheduler.observe_step(plan.step, 0.02)
        for number, token in drawn:
            if scheduler.record_token(live[number], token) is not None:
                ended.append(number)
        if self.profiler:
            self.profiler.disable()
        return 1e3 * (time.perf_counter() - began), ended

    def measure(self, steps: int, warm: int = 40) -> dict[str, Any]:
        """Figures over ``steps`` steps."""
        for _ in range(warm):
            self.step()
        self._reset()
        for _ in range(steps):
            self.step()
        evicted = self.scheduler.allocator.evictions - self._evictions
        return {
            **asdict(self.load),
            "steps": steps,
            "preemptions": self.scheduler.num_preemptions,
            "per_step": {
                "running": round(self.running / steps, 1),
                "arrivals": round(self.arrivals / steps, 2),
                "blocks_opened": round(self.opened / steps, 2),
                "evictions": round(evicted / steps, 2),
                "plan_bytes": round(self.nbytes / steps),
            },
            "ms": {part: summary(self.times[part]) for part in PARTS if self.times[part]},
        }


def summary(times: Sequence[float]) -> dict[str, float]:
    """median, p99 and min, to a tenth of a microsecond."""
    ordered = sorted(times)
    p99 = ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
    found = {"median": statistics.median(ordered), "p99": p99, "min": ordered[0]}
    return {name: round(value, 4) for name, value in found.items()}


def measure_all(
    requests: Sequence[int] = REQUESTS,
    blocks: Sequence[int] = BLOCKS,
    ranks: Sequence[int] = (1, 4),
    headline: tuple[int, int] = (256, 100_000),
    steps: int = 400,
) -> dict[str, list[dict[str, Any]]]:
    """Every load, by part of the benchmark."""
    few = max(20, steps // 3)
    found: dict[str, list[dict[str, Any]]] = {"headline": [], "requests": [], "blocks": []}
    for pool in ("evicting", "fragmented"):
        for n in ranks:
            found["headline"].append(Bench(Load(*headline, n, pool)).measure(steps))
            show(found["headline"][-1])
    found["headline"].append(Bench(Load(*headline, max(ranks), spanning=True)).measure(few))
    show(found["headline"][-1])
    for n in ranks:
        for count in requests:
            found["requests"].append(Bench(Load(count, headline[1], n)).measure(few))
            show(found["requests"][-1])
    for n in ranks:
        for count in blocks:
            found["blocks"].append(Bench(short(headline[0], count, n)).measure(few))
            show(found["blocks"][-1])
    return found


def show(row: dict[str, Any]) -> None:
    ms, per, kind = row["ms"], row["per_step"], row["pool"] + " spanning" * row["spanning"]
    parts = ", ".join(
        f"{part} {ms[part]['median']:.3f}"
        for part in ("cpu", "schedule", "record", "encode", "decode", "apply")
    )
    print(
        f"{row['requests']:5} requests {row['blocks']:8} blocks {row['ranks']} rank(s) "
        f"{kind}: schedule+record {ms['both']['median']:.3f} ms, "
        f"p99 {ms['both']['p99']:.3f}, min {ms['both']['min']:.3f} ({parts}; "
        f"{per['plan_bytes']} B, {per['arrivals']} arrivals, {per['blocks_opened']} blocks a step)",
        flush=True,
    )


def plot(found: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Two panels, log axes: schedule + record by requests and by blocks."""
    from matplotlib.ticker import NullLocator

    plots = pyplot()
    figure, axes = plots.subplots(1, 2, figsize=(8.4, 3.6), sharey=True, layout="constrained")
    for axis, by in zip(axes, ("requests", "blocks"), strict=True):
        fixed = found[by][0]["blocks" if by == "requests" else "requests"]
        for ranks in sorted({row["ranks"] for row in found[by]}):
            rows = [row for row in found[by] if row["ranks"] == ranks]
            at = [row[by] for row in rows]
            colour, name = COLOURS.get(ranks, "black"), f"{ranks} rank{'s' * (ranks > 1)}"
            for figures, style in (("median", "-"), ("p99", ":")):
                ms = [row["ms"]["both"][figures] for row in rows]
                axis.plot(
                    at, ms, style, color=colour, marker="o", markersize=3.5 * (style == "-"),
                    linewidth=1.4, label=f"{name}, {figures}",
                )  # fmt: skip
        axis.axhline(TARGET_MS, color="#777777", linewidth=0.8, dashes=(6, 3), label="target")
        axis.set(xscale="log", yscale="log", xlabel="running requests" if by == "requests"
                 else "blocks of all ranks")  # fmt: skip
        axis.set_title(
            f"{fixed:,} blocks of {found[by][0]['block_size']}" if by == "requests"
            else f"{fixed:,} requests, blocks of {found[by][0]['block_size']}", fontsize=10,
        )  # fmt: skip
        axis.grid(True, which="major", linewidth=0.4, color="#cccccc")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_xticks([row["requests"] for row in found["requests"] if row["ranks"] == 1])
    axes[0].xaxis.set_major_formatter("{x:.0f}")
    axes[0].xaxis.set_minor_locator(NullLocator())
    axes[0].set_ylabel("schedule + record, ms per step")
    axes[1].legend(frameon=False, fontsize=8)
    figure.savefig(path, metadata={"Date": None})
    plots.close(figure)


def profile(steps: int = 300) -> None:
    """Where the time of schedule and record goes, 256 requests over 100,000 blocks."""
    for ranks in (1, 4):
        bench = Bench(Load(256, 100_000, ranks))
        bench.profiler = cProfile.Profile()
        bench.measure(steps, warm=0)
        print(f"{ranks} rank(s), {steps} steps of schedule and record")
        pstats.Stats(bench.profiler).sort_stats("tottime").print_stats(22)


def write(found: dict[str, list[dict[str, Any]]], out: Path, args: Sequence[str]) -> dict[str, Any]:
    """scheduler_time.json and .svg in ``out``; returns the short form."""
    result = {
        "command": command("scheduler_time", args),
        **machine(),
        **found,
    }
    (out / "scheduler_time.json").write_text(json.dumps(result, indent=1) + "\n")
    plot(found, out / "scheduler_time.svg")
    best = {
        f"{row['ranks']} ranks {row['pool']}{' spanning' * row['spanning']}": row["ms"]["both"]
        for row in found["headline"]
    }
    return {"date": result["date"], "machine": result["machine"], "target_ms": TARGET_MS, **best}


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--out", type=Path, default=RESULTS)
    arguments.add_argument("--steps", type=int, default=400)
    arguments.add_argument("--profile", action="store_true", help="where the time goes; no files")
    args = arguments.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.profile:
        profile()
        return
    found = measure_all(steps=args.steps)
    shown = [] if args.steps == 400 else ["--steps", str(args.steps)]
    print(json.dumps(write(found, args.out, shown)))


if __name__ == "__main__":
    main()
