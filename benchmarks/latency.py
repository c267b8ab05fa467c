"""What one request waits: for its first token behind a shared prefix, for the next beside a prompt.

    python -m benchmarks.latency [--out FILE]                          one rank, 2 threads
    torchrun --nproc-per-node 2 -m benchmarks.latency [--out FILE]     two ranks, 1 thread each

SmolLM2, fp32, greedy, random tokens. Times are taken on rank 0 where deltas come out of the engine.

*Prefix*: 20 requests share 4,000 tokens and differ in 20 more. Seconds to the first token of the
first, the miss, and of the other 19, the hits, each alone; then of 19 new ones all at once. Every
round has another prefix; min and median over rounds.

*Prompt beside decodes*: 4 requests decode, first quietly, then while a prompt of 7,000 tokens is
computed beside them in chunks of the engine's own choice, then quietly again. Milliseconds from one
token of a request to its next: median, p90, p99, max, and their ratio to the quiet median before;
of the median also to the mean of before and after, since their contexts grow meanwhile. The same
with other values of ``scheduler.decode_slowdown`` and a shorter prompt. Seconds to the first token
of the prompt beside them, and alone. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import MODEL, command, finish, machine, parser
from benchmarks.sessions import Driver, Sessions, text
from ds_cp.config import Config, load_config
from ds_cp.engine.loop import ThreadRunner
from ds_cp.facts import Facts
from ds_cp.startup.build import build_worker
from ds_cp.startup.join import join_job
from ds_cp.startup.resources import socket_environment
from ds_cp.topology.job import detect
from ds_cp.worker.worker import Worker

BLOCK = 64  # tokens
DECODE_PROMPT = 200  # tokens of the prompt of a decoding request
SETTLE = 10  # decode steps that are not timed
MISS_TARGET, DECODE_TARGET = 0.15, 2.0  # hit / miss; median beside a prompt / quiet


# --- a shared prefix


def prefix(sessions: Sessions, args: argparse.Namespace) -> dict[str, Any]:
    rounds: list[dict[str, Any]] = []
    with sessions.open() as driver:
        if driver is not None:
            driver.first_tokens({"warm": text(random.Random(99), 600)}, args.new)
            for number in range(args.rounds):
                rounds.append(one_prefix(driver, number, args))
    if not sessions.is_driver:
        return {}
    kinds = ("hit_s", "worst_hit_s", "burst_s")
    ratios = {what: [r[what] / r["miss_s"] for r in rounds] for what in kinds}
    found: dict[str, Any] = {
        "tokens": args.prefix,
        "requests": args.requests,
        "rounds": rounds,
        "hit_to_miss": {
            what: {
                "min": round(min(r[what] for r in rounds) / min(r["miss_s"] for r in rounds), 4),
                "median": round(statistics.median(each), 4),
            }
            for what, each in ratios.items()
        },
        "target": MISS_TARGET,
    }
    shown = ", ".join(
        f"{title} {found['hit_to_miss'][key]['min']:.3f} (min) "
        f"{found['hit_to_miss'][key]['median']:.3f} (median)"
        for title, key in (("hit", "hit_s"), ("worst hit", "worst_hit_s"),
                           ("all at once", "burst_s"))
    )  # fmt: skip
    print(f"prefix, over the miss: {shown}; at most {MISS_TARGET}", flush=True)
    return found


def one_prefix(driver: Driver, number: int, args: argparse.Namespace) -> dict[str, Any]:
    """A miss, then hits one by one, then hits at once."""
    rng = random.Random(number)
    shared = text(rng, args.prefix)

    def request(name: str) -> dict[str, list[int]]:
        return {f"{number} {name}": shared + text(rng, args.tail)}

    (miss,) = driver.first_tokens(request("miss"), args.new)
    hits = []
    for i in range(args.requests - 1):
        hits += driver.first_tokens(request(f"hit {i}"), args.new)
    together: dict[str, list[int]] = {}
    for i in range(args.requests - 1):
        together |= request(f"burst {i}")
    burst = driver.first_tokens(together, args.new)
    cached = [driver.cached[f"{number} hit {i}"] for i in range(args.requests - 1)]
    found = {
        "miss_s": round(miss, 4),
        "hit_s": round(statistics.median(hits), 4),
        "worst_hit_s": round(max(hits), 4),
        "burst_s": round(statistics.median(burst), 4),
        "worst_burst_s": round(max(burst), 4),
        "prompt_tokens": args.prefix + args.tail,
        "cached_tokens_miss": driver.cached[f"{number} miss"],
        "cached_tokens_hits": sorted(set(cached)),
        "cached_tokens_burst": sorted({driver.cached[name] for name in together}),
    }
    print(
        f"prefix round {number + 1}: miss {miss:.3f} s, hits {found['hit_s']:.3f} (median) "
        f"{found['worst_hit_s']:.3f} (worst), {len(burst)} at once {found['burst_s']:.3f} (median) "
        f"{found['worst_burst_s']:.3f} (worst); of {found['prompt_tokens']} prompt tokens cached: "
        f"{found['cached_tokens_miss']}, {found['cached_tokens_hits']}, "
        f"{found['cached_tokens_burst']}",
        flush=True,
    )
    return found


# --- a prompt beside decoding requests


def beside(
    sessions: Sessions, slowdown: float, prompt: int, args: argparse.Namespace
) -> dict[str, Any]:
    """One prompt of ``prompt`` tokens beside decoding requests; first alone in its own engine."""
    rng = random.Random(prompt)  # the engines share no cache, so the prompts may be the same
    long, alone = text(rng, prompt), 0.0
    with sessions.open(slowdown) as driver:
        if driver is not None:
            (alone,) = driver.first_tokens({"long": long}, 1)
    with sessions.open(slowdown) as driver:
        if driver is not None:
            decodes = [f"decode {n}" for n in range(args.decodes)]
            for name in decodes:
                driver.add(name, text(rng, DECODE_PROMPT), args.decode_tokens)

            def run(count: int) -> None:
                """``count`` more tokens of every decoding request."""
                want = {name: len(driver.stamps[name]) + count for name in decodes}
                driver.until(lambda: all(len(driver.stamps[n]) >= want[n] for n in decodes))

            run(SETTLE)
            began_quiet = time.perf_counter()
            run(args.quiet)
            began = time.perf_counter()
            number = driver.add("long", long, 1)
            driver.until(lambda: bool(driver.stamps["long"]))
            ended = driver.stamps["long"][0]
            run(SETTLE)
            began_after = time.perf_counter()
            run(args.quiet)
            quiet = gaps(driver, decodes, began_quiet, began)
            after = gaps(driver, decodes, began_after, time.perf_counter())
            busy = gaps(driver, decodes, began, ended)
            chunks = [(round(at - began, 2), n) for at, n in driver.chunks[number]]
            found = said(slowdown, prompt, quiet, busy, after, ended - began, alone, chunks)
            return {**found, "modes": driver.core.stats().mode_counts}
    return {}


def gaps(driver: Driver, decodes: Sequence[str], begin: float, end: float) -> list[float]:
    """Milliseconds from one token to the next, of all requests, where both came in the interval;
    the step under way when it began counts."""
    found = []
    for name in decodes:
        stamps = driver.stamps[name]
        found += [
            1e3 * (b - a) for a, b in zip(stamps, stamps[1:], strict=False) if begin < b <= end
        ]
    return found


def spread(ms: list[float]) -> dict[str, float]:
    ordered = sorted(ms)
    last = len(ordered) - 1
    return {
        "median": round(statistics.median(ordered), 2),
        "p90": round(ordered[round(0.90 * last)], 2),
        "p99": round(ordered[round(0.99 * last)], 2),
        "max": round(ordered[-1], 2),
        "count": len(ordered),
    }


def said(
    slowdown: float, prompt: int, quiet: list[float], busy: list[float], after: list[float],
    first: float, alone: float, chunks: list[tuple[float, int]],
) -> dict[str, Any]:  # fmt: skip
    """The figures of one run, printed and returned."""
    calm, loud = spread(quiet), spread(busy)
    ratios = {
        which: round(loud[which] / calm["median"], 3) for which in ("median", "p90", "p99", "max")
    }
    sizes = [n for _, n in chunks]
    settled = spread(after)
    mean = loud["median"] / ((calm["median"] + settled["median"]) / 2)
    found = {
        "decode_slowdown": slowdown,
        "prompt_tokens": prompt,
        "quiet_ms": calm,
        "beside_ms": loud,
        "quiet_after_ms": settled,
        "ratio_to_quiet_median": ratios,
        "ratio_of_median_to_mean_quiet": round(mean, 3),
        "p90_to_quiet_p90": round(loud["p90"] / calm["p90"], 3),
        "first_token_s": round(first, 3),
        "first_token_alone_s": round(alone, 3),
        "first_token_ratio": round(first / alone, 3),
        "chunks": chunks,
    }
    tenths = [sizes[len(sizes) * i // 10] for i in range(10)]
    limit = f"; at most {DECODE_TARGET} for the median" if slowdown == DECODE_TARGET else ""
    print(
        f"{prompt} tokens beside decodes, decode_slowdown {slowdown:g}: quiet "
        f"{calm['median']:.1f} ms (p90 {calm['p90']:.1f}, p99 {calm['p99']:.1f}, after "
        f"{settled['median']:.1f}), beside {loud['median']:.1f} (p90 "
        f"{loud['p90']:.1f}, p99 {loud['p99']:.1f}, max {loud['max']:.1f}); ratio "
        + ", ".join(f"{which} {value:.2f}" for which, value in ratios.items())
        + f"{limit}, {mean:.2f} to the mean of before and after; first token {first:.2f} s, "
        f"alone {alone:.2f} s; {len(sizes)} chunks, "
        f"at each tenth: {tenths}",
        flush=True,
    )
    return found


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parser(__doc__)
    arguments.add_argument(
        "--prefix", type=int, default=4000, help="shared tokens; 0: not this part"
    )
    arguments.add_argument("--tail", type=int, default=20, help="tokens of each request's own")
    arguments.add_argument("--requests", type=int, default=20)
    arguments.add_argument("--new", type=int, default=4, help="new tokens of each")
    arguments.add_argument("--rounds", type=int, default=2, help="of the shared prefix")
    arguments.add_argument("--prompt", type=int, default=7000, help="tokens; 0: not this part")
    arguments.add_argument("--decodes", type=int, default=4)
    arguments.add_argument("--quiet", type=int, default=40, help="quiet tokens of each request")
    arguments.add_argument("--slowdowns", default="1.5,4", help="decode_slowdown, besides 2")
    arguments.add_argument("--shorter", type=int, default=2500, help="tokens of the prompt there")
    arguments.add_argument("--out", type=Path)
    args = arguments.parse_args(argv)
    about = machine()
    args.decode_tokens = 2000
    runs = [(2.0, args.prompt)] if args.prompt else []
    if args.prompt and args.slowdowns:
        runs += [(float(s), args.shorter) for s in ("2", *args.slowdowns.split(","))]
    burst = args.requests * 2 * (args.tail + args.new + BLOCK)
    decodes = args.decodes * (DECODE_PROMPT + args.decode_tokens + BLOCK)
    need = max(args.prefix + burst, max(args.prompt, args.shorter) + decodes)
    tokens = -(-need // BLOCK) * BLOCK
    job = detect(os.environ)
    threads = 2 if job.world_size == 1 else 1

    def config(slowdown: float) -> Config:
        return load_config(
            {
                "model": MODEL,
                "dtype": "fp32",
                "threads_per_rank": threads,
                "kv_cache": {"block_size": BLOCK, "tokens_per_rank": tokens},
                "scheduler": {"decode_slowdown": slowdown},
            }
        )

    for variable, value in socket_environment(job).items():
        os.environ.setdefault(variable, value)

    def build() -> tuple[Worker, Facts]:
        world, _ = join_job(job, config(2.0))
        return build_worker(world, config(2.0), None, threads)

    runner = ThreadRunner()  # on rank 0 everything is computed there, as in a worker's process
    worker, facts = runner.call(build).result() if job.rank == 0 else build()
    world = worker.world
    sessions = Sessions(worker, runner, facts, config)
    shared = prefix(sessions, args) if args.prefix else {}
    prompts = [beside(sessions, slowdown, length, args) for slowdown, length in runs]
    if sessions.is_driver:
        result = {
            "command": command("latency", sys.argv[1:] if argv is None else argv, world.size),
            **about,
            "ranks": world.size,
            "threads_per_rank": threads,
            "decodes": args.decodes,
            "prefix": shared,
            "prompt_beside_decodes": prompts,
        }
        finish(result, args.out)
    runner.close()
    world.leave()


if __name__ == "__main__":
    main()
