"""Speed against what ds_cp replaces, interleaved in one run: prefill and decode on SmolLM2, fp32.

    torchrun --nproc-per-node 2 -m benchmarks.speed [--tokens 7000] [--rounds 3] [--out FILE]

A: transformers, one process, 2 threads. B: one rank, 2 threads. C: two ranks, 1 thread each,
spanning. D: one rank, 1 thread. E: transformers, 1 thread. Each round runs all in turn; times in
seconds, min and median over rounds; what counts are the ratios. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import MODEL, command, finish, machine, parser
from ds_cp.comm.wire import World
from ds_cp.config import Config, load_config
from ds_cp.engine.core import EngineCore
from ds_cp.engine.llm import LLMEngine
from ds_cp.model.loading import load_model
from ds_cp.model.source import find_model
from ds_cp.outputs import Delta
from ds_cp.plan import Outcome
from ds_cp.sampling_params import SamplingParams
from ds_cp.startup.build import build_worker
from ds_cp.startup.join import join_job
from ds_cp.topology.hosts import Topology
from ds_cp.topology.job import detect


def config_of(tokens: int, mode: str, placement: str, threshold: int | str = "auto") -> Config:
    budget = -(-(tokens + 64) // 64) * 64
    return load_config(
        {
            "model": MODEL,
            "dtype": "fp32",
            "context_parallel": {"mode": mode, "local_threshold": threshold},
            # The same prompt comes in every round, and its prefill is what is measured.
            "kv_cache": {
                "tokens_per_rank": budget,
                "placement": placement,
                "prefix_caching": False,
            },
        }
    )


def time_engine(engine: LLMEngine, prompt: list[int], new: int) -> tuple[float, float]:
    """(seconds to the first token, seconds per further token, median) on the driver.

    A token's time is when its outcome has reached the scheduler, after it planned the next step.
    """
    params = SamplingParams(max_tokens=new, temperature=0.0, ignore_eos=True)
    core = engine._core
    if core is None:  # another rank, which follows
        engine.generate(prompt, params)
        return 0.0, 0.0
    stamps: list[float] = []

    def stamped(outcome: Outcome) -> list[Delta]:
        if outcome.sampled:  # a chunk of the prompt that is not the last draws nothing
            stamps.append(time.perf_counter())
        return EngineCore.apply(core, outcome)

    core.apply = stamped  # type: ignore[method-assign]
    began = time.perf_counter()
    [output] = engine.generate(prompt, params)
    del core.apply
    assert len(stamps) == new, f"{len(stamps)} steps gave {new} tokens"
    assert output.metrics.cached_tokens == 0, "this would not measure the prefill"
    gaps = [b - a for a, b in zip(stamps, stamps[1:], strict=False)]
    return stamps[0] - began, statistics.median(gaps)


def time_transformers(model: Any, prompt: list[int], new: int) -> tuple[float, float]:
    """The same through transformers with its own cache and its default (sdpa) attention."""
    from transformers import DynamicCache

    model.set_attn_implementation("sdpa")
    cache = DynamicCache(config=model.config)
    ids = torch.tensor([prompt])
    stamps = [time.perf_counter()]
    with torch.inference_mode():
        for _ in range(new):
            out = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            ids = out.logits[:, -1:].argmax(-1)
            stamps.append(time.perf_counter())
    gaps = [b - a for a, b in zip(stamps[1:], stamps[2:], strict=False)]
    model.set_attn_implementation("ds_cp")
    return stamps[1] - stamps[0], statistics.median(gaps)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--tokens", type=int, default=7000)
    arguments.add_argument("--new", type=int, default=16)
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--mode", default="auto", help="mode of the spanning runs")
    arguments.add_argument("--placement", default="balanced")
    arguments.add_argument("--out", type=Path)
    args, _ = arguments.parse_known_args()  # launchers may add --local_rank
    about = machine()
    spanning = config_of(args.tokens, args.mode, args.placement, 0)
    local = config_of(args.tokens, "auto", args.placement)
    job = detect(os.environ)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", job.interface or "lo")
    world, _ = join_job(job, spanning)
    torch.set_num_threads(1)
    model = load_model(find_model(spanning.model), torch.float32, torch.device("cpu"))
    both = LLMEngine(world, *build_worker(world, spanning, model, 1), spanning, None)
    alone = World(0, Topology(("here",)), torch.device("cpu"), 60.0, joined=False)
    one = LLMEngine(alone, *build_worker(alone, local, model, 2), local, None)
    gen = torch.Generator().manual_seed(0)
    prompt = torch.randint(100, 40000, (args.tokens,), generator=gen).tolist()
    warm = prompt[:256]

    def spanning_run(p: list[int]) -> tuple[float, float]:
        torch.set_num_threads(1)
        return time_engine(both, p, args.new)

    def on_rank_0(run: Callable[[], tuple[float, float]], threads: int) -> tuple[float, float]:
        if world.rank != 0:
            return 0.0, 0.0
        torch.set_num_threads(threads)
        return run()

    def all_five(p: list[int]) -> dict[str, tuple[float, float]]:
        return {
            "A transformers 2 threads": on_rank_0(lambda: time_transformers(model, p, args.new), 2),
            "B one rank 2 threads": on_rank_0(lambda: time_engine(one, p, args.new), 2),
            "C two ranks 1 thread": spanning_run(p),
            "D one rank 1 thread": on_rank_0(lambda: time_engine(one, p, args.new), 1),
            "E transformers 1 thread": on_rank_0(lambda: time_transformers(model, p, args.new), 1),
        }

    all_five(warm)
    rounds = []
    for number in range(args.rounds):
        rounds.append(all_five(prompt))
        if world.rank == 0:
            print(f"round {number + 1}: " + ", ".join(
                f"{name[0]} {a:.2f} s / {b * 1e3:.1f} ms" for name, (a, b) in rounds[-1].items()
            ), flush=True)  # fmt: skip
    if world.rank == 0:
        report(args, about, rounds, dataclasses.asdict(both.facts))
    world.leave()


def report(
    args: argparse.Namespace,
    about: dict[str, Any],
    rounds: list[dict[str, tuple[float, float]]],
    facts: dict[str, Any],
) -> None:
    """Print the ratios and the result."""

    def ratio(a: str, b: str, which: int, how: Callable[[list[float]], float]) -> float:
        pick = {name[0]: name for name in rounds[0]}
        return round(
            how([r[pick[a]][which] for r in rounds]) / how([r[pick[b]][which] for r in rounds]), 3
        )

    ratios = {}
    for title, a, b, which, limit in (
        ("prefill: one rank / transformers, 2 threads", "B", "A", 0, 1.1),
        ("decode: one rank / transformers, 2 threads", "B", "A", 1, 1.1),
        ("prefill: one rank / transformers, 1 thread", "D", "E", 0, 1.1),
        ("decode: one rank / transformers, 1 thread", "D", "E", 1, 1.1),
        ("prefill: two ranks of 1 thread / one rank of 2", "C", "B", 0, 1.1),
        ("decode: two ranks of 1 thread / one rank of 1", "C", "D", 1, 1.4),
    ):
        low, middle = ratio(a, b, which, min), ratio(a, b, which, statistics.median)
        ratios[title] = {"min": low, "median": middle, "limit": limit}
        print(f"{title}: {low} (min), {middle} (median); limit {limit}")
    result = {
        "command": command("speed", sys.argv[1:], 2),
        **about,
        "args": {k: str(v) for k, v in vars(args).items()},
        "seconds": rounds,
        "ratios": ratios,
        "links": facts["links"],
    }
    finish(result, args.out)


if __name__ == "__main__":
    main()
