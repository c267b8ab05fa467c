"""How long a prompt's beginning takes to come back from host memory, beside computing it.

    python -m benchmarks.host_tier [--model DIR] [--tokens 4000] [--rounds 3] [--folder DIR]

One rank, the device's KV so small that two prompts of ``--tokens`` take turns in it: each gives the
other's blocks to the host, and finds its own there. Seconds from a request's first step to its
first token: *computed*, of two prompts that are new; *back*, of those two again, round by round,
their last block computed as always. *copies*: blocks that went to the host and came back. The
answers must be the same. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
from pathlib import Path
from typing import Any

import ds_cp
from benchmarks.common import MODEL, command, finish, machine, parser
from ds_cp.engine.llm import LLMEngine
from ds_cp.sampling_params import SamplingParams

BLOCK = 64  # tokens
TARGET = 0.3  # of the time of computing it, at most


def engine_of(model: str, tokens: int, folder: str | None) -> LLMEngine:
    """An engine whose device holds one prompt and a bit, and whose host holds four."""
    blocks = -(-tokens // BLOCK) + 2
    kv: dict[str, Any] = {
        "block_size": BLOCK, "tokens_per_rank": blocks * BLOCK, "host_memory_per_rank": "1GiB",
    }  # fmt: skip
    if folder is not None:
        kv["host_folder"] = folder
    return ds_cp.init_inference(model, {"kv_cache": kv})


def first_token_s(engine: LLMEngine, prompt: list[int]) -> tuple[float, int, tuple[int, ...]]:
    """Seconds of a prompt from its first step to its first token; tokens found; the answer."""
    [output] = engine.generate(prompt, SamplingParams(max_tokens=1, temperature=0.0))
    times = output.metrics
    assert times.first_scheduled_time is not None and times.first_token_time is not None
    seconds = times.first_token_time - times.first_scheduled_time
    return seconds, times.cached_tokens, output.outputs[0].token_ids


def measure(engine: LLMEngine, tokens: int, rounds: int) -> dict[str, Any]:
    """The figures of one engine."""
    draw = random.Random(7)
    prompts = [[draw.randrange(1000, 40_000) for _ in range(tokens)] for _ in range(2)]
    first_token_s(engine, [5] * BLOCK)  # what is loaded with the first step
    new = [first_token_s(engine, prompt) for prompt in prompts]
    back = [first_token_s(engine, prompt) for _ in range(rounds) for prompt in prompts]
    for at, (_, found, answer) in enumerate(back):
        assert found == (tokens - 1) // BLOCK * BLOCK, f"{found} of {tokens} tokens were found"
        assert answer == new[at % 2][2], "another token than when it was computed"
    computed = min(seconds for seconds, _, _ in new)
    restored = statistics.median(seconds for seconds, _, _ in back)
    host = engine._driver.scheduler.block_manager.host
    return {
        "tokens": tokens,
        "computed_s": round(computed, 4),
        "back_s": round(restored, 4),
        "ratio": round(restored / computed, 4),
        "target": TARGET,
        "copies": [host.tier.spilled, host.restored],
        "host_gb_per_s": round(engine.facts.host_gb_per_s, 2),
        "kernel": engine.facts.kernel,
        "dtype": engine.facts.dtype,
    }


def main(argv: list[str]) -> int:
    args = _arguments().parse_args(argv)
    about = machine()
    engine = engine_of(args.model, args.tokens, args.folder)
    try:
        found = measure(engine, args.tokens, args.rounds)
    finally:
        engine.shutdown()
    print(
        f"{args.tokens} tokens: computed in {found['computed_s']} s, back from the host in "
        f"{found['back_s']} s, {found['ratio']:.1%} (at most {TARGET:.0%})"
    )
    finish({"benchmark": "host_tier", "command": command("host_tier", argv), **about, **found},
           args.out)  # fmt: skip
    return int(found["ratio"] > TARGET)


def _arguments() -> argparse.ArgumentParser:
    found = parser(__doc__)
    found.add_argument("--model", default=MODEL)
    found.add_argument("--tokens", type=int, default=4000)
    found.add_argument("--rounds", type=int, default=3)
    found.add_argument("--folder", help="keep it on this folder's disk instead of in memory")
    found.add_argument("--out", type=Path)
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
