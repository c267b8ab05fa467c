"""How long a prompt's beginning takes to come back from host memory, beside computing it.

    python -m benchmarks.host_tier [--model DIR] [--tokens 4000] [--rounds 3] [--folder DIR]
    torchrun --nproc-per-node 2 -m benchmarks.host_tier ...
    python -m benchmarks.host_tier --scheduler

The device's KV, over all ranks, is so small that two prompts of ``--tokens`` take turns in it: each
gives the other's blocks to the host, and finds its own there. Seconds from a request's first step
to its first token: *computed*, of two prompts that are new; *back*, of those two again, round by
round, their last block computed as always. *copies*: blocks that went to the host and came back.
The answers must be the same.

``--scheduler``: what host memory costs rank 0 in a step, without a model: the scheduler's own time
(``scheduler_time``, 256 requests, every block that a request opens is evicted) with and without
host memory that takes each of these blocks, in turns. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
from pathlib import Path
from typing import Any

import ds_cp
from benchmarks.common import MODEL, command, finish, machine, parser
from benchmarks.scheduler_time import Bench, Load
from ds_cp.engine.llm import LLMEngine
from ds_cp.sampling_params import SamplingParams
from ds_cp.scheduler.host_moves import HostRules

BLOCK = 64  # tokens
TARGET = 0.3  # of the time of computing it, at most
LOAD = Load(256, 100_000, 1)  # of ``--scheduler``
TURNS, STEPS = 6, 200  # steps of a turn


def engine_of(model: str, tokens: int, folder: str | None, ranks: int) -> LLMEngine:
    """An engine whose devices hold one prompt and a bit, and whose hosts hold more than two."""
    blocks = -(-tokens // BLOCK // ranks) + 2
    kv: dict[str, Any] = {
        "block_size": BLOCK, "tokens_per_rank": blocks * BLOCK, "host_memory_per_rank": "512MiB",
    }  # fmt: skip
    if folder is not None:
        kv["host_folder"] = folder
    return ds_cp.init_inference(model, {"kv_cache": kv})


def first_token_s(engine: LLMEngine, prompt: list[int]) -> tuple[float, int, tuple[int, ...]]:
    """Seconds of a prompt from its first step to its first token; tokens found; the answer. Rank 0
    alone learns them."""
    found = engine.generate(prompt, SamplingParams(max_tokens=1, temperature=0.0))
    if not engine.is_driver:
        return 0.0, 0, ()
    times = found[0].metrics
    assert times.first_scheduled_time is not None and times.first_token_time is not None
    seconds = times.first_token_time - times.first_scheduled_time
    return seconds, times.cached_tokens, found[0].outputs[0].token_ids


def measure(engine: LLMEngine, tokens: int, rounds: int) -> dict[str, Any]:
    """The figures of one engine; on rank 0."""
    draw = random.Random(7)
    prompts = [[draw.randrange(1000, 40_000) for _ in range(tokens)] for _ in range(2)]
    first_token_s(engine, [5] * BLOCK)  # what is loaded with the first step
    new = [first_token_s(engine, prompt) for prompt in prompts]
    back = [first_token_s(engine, prompt) for _ in range(rounds) for prompt in prompts]
    if not engine.is_driver:
        return {}
    for at, (_, found, answer) in enumerate(back):
        assert found == (tokens - 1) // BLOCK * BLOCK, f"{found} of {tokens} tokens were found"
        assert answer == new[at % 2][2], "another token than when it was computed"
    computed = min(seconds for seconds, _, _ in new)
    restored = statistics.median(seconds for seconds, _, _ in back)
    host = engine._driver.scheduler.block_manager.host
    return {
        "ranks": engine.facts.cp_size,
        "tokens": tokens,
        "computed_s": round(computed, 4),
        "back_s": round(restored, 4),
        "back_each_s": [round(seconds, 4) for seconds, _, _ in back],
        "ratio": round(restored / computed, 4),
        "target": TARGET,
        "copies": [host.tier.spilled, host.restored],
        "host_gb_per_s": round(engine.facts.host_gb_per_s, 2),
        "kernel": engine.facts.kernel,
        "dtype": engine.facts.dtype,
    }


def scheduler_ms() -> dict[str, Any]:
    """Milliseconds of rank 0 in a step, with and without host memory."""
    kinds = {"without": None, "with": HostRules((LOAD.blocks // LOAD.ranks,) * LOAD.ranks)}
    benches = {kind: Bench(LOAD, host=host) for kind, host in kinds.items()}
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(TURNS):
        for kind, bench in benches.items():
            times[kind].append(bench.measure(STEPS)["ms"]["cpu"]["median"])
    found = {kind: round(min(each), 4) for kind, each in times.items()}
    spilled = benches["with"].scheduler.block_manager.host.tier.spilled
    return {
        "requests": LOAD.requests,
        "blocks": LOAD.blocks,
        "cpu_ms": found,
        "turns_ms": times,
        "spilled_per_step": round(spilled / (TURNS * (STEPS + 40)), 1),
    }


def main(argv: list[str]) -> int:
    args = _arguments().parse_args(argv)
    about, ranks = machine(), int(os.environ.get("WORLD_SIZE", "1"))
    named = {"benchmark": "host_tier", "command": command("host_tier", argv, ranks), **about}
    if args.scheduler:
        found = scheduler_ms()
        print(f"ms of rank 0 in a step: {found['cpu_ms']}")
        finish({**named, **found}, args.out)
        return 0
    engine = engine_of(args.model, args.tokens, args.folder, ranks)
    try:
        found = measure(engine, args.tokens, args.rounds)
    finally:
        engine.shutdown()
    if not found:
        return 0
    print(
        f"{args.tokens} tokens: computed in {found['computed_s']} s, back from the host in "
        f"{found['back_s']} s, {found['ratio']:.1%} (at most {TARGET:.0%})"
    )
    finish({**named, **found}, args.out)
    return int(found["ratio"] > TARGET)


def _arguments() -> argparse.ArgumentParser:
    found = parser(__doc__)
    found.add_argument("--model", default=MODEL)
    found.add_argument("--tokens", type=int, default=4000)
    found.add_argument("--rounds", type=int, default=3)
    found.add_argument("--folder", help="keep it on this folder's disk instead of in memory")
    found.add_argument("--scheduler", action="store_true", help="rank 0's own time instead")
    found.add_argument("--out", type=Path)
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
