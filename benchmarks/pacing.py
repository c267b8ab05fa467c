"""How much a decoding request is slowed by a long prompt, on its own rank and on another one.

    torchrun --nproc-per-node 2 -m benchmarks.pacing [--rounds 3] [--prompt 5000] [--out FILE]

A random Llama of 4 layers and hidden size 256 in fp32. One request decodes on rank 0; after 150
tokens a prompt comes, placed on rank 0 (rank 1 is closed) or on rank 1 (which has less work).
Slowdown: the median time between two tokens while the prompt is computed / the median of the 100
tokens before it. The bound is ``scheduler.decode_slowdown``, 2. Rounds alternate between the ranks.
The last line is one JSON object.
"""

from __future__ import annotations

import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.common import command, finish, machine, parser
from ds_cp.config import Config, load_config
from ds_cp.engine.core import EngineCore
from ds_cp.engine.loop import InlineLoop
from ds_cp.facts import Facts
from ds_cp.plan import Stop
from ds_cp.sampling_params import SamplingParams
from ds_cp.scheduler.build import build_scheduler
from ds_cp.startup.build import build_worker
from ds_cp.startup.join import join_job
from ds_cp.topology.job import detect
from ds_cp.worker.worker import Worker

QUIET = 150  # tokens before the prompt comes
SETTLED = 50  # of these, not counted


def model() -> LlamaForCausalLM:
    """The same weights on every rank."""
    torch.manual_seed(11)
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4}
    config = LlamaConfig(
        vocab_size=128, max_position_embeddings=16384, bos_token_id=None, eos_token_id=None,
        **sizes, **heads,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def one_round(
    worker: Worker, facts: Facts, config: Config, rank: int, prompt: list[int]
) -> dict[str, Any]:
    """Rank 0's side of one round, with the prompt on ``rank``."""
    core = EngineCore(build_scheduler(config, facts, paced=True), None)
    loop = InlineLoop(core, worker.lead)
    core.add("decode", [1] * 20, SamplingParams(max_tokens=16000, temperature=0.0))
    if rank == 0:
        core.scheduler.block_manager.closed.add(1)
    quiet: list[float] = []
    beside: list[float] = []
    began, last, placed = 0.0, time.perf_counter(), -1
    while True:
        deltas = loop.advance()
        now = time.perf_counter()
        names = [delta.request_id for delta in deltas]
        if "decode" in names:
            (beside if began else quiet).append(now - last)
            last = now
        if len(quiet) == QUIET and not began:
            began = now
            [request] = core.add("prompt", prompt, SamplingParams(max_tokens=1))
        elif began and request.table is not None:
            placed = request.table.last_rank
        if "prompt" in names:
            break
    for name in ("decode", "prompt"):
        core.abort(name)
    loop.settle()
    worker.lead(Stop())
    assert placed == rank, f"the prompt was placed on rank {placed}, not {rank}"
    before = statistics.median(quiet[SETTLED:])
    return {
        "prompt_on_rank": rank,
        "quiet_ms": round(before * 1e3, 2),
        "beside_ms": round(statistics.median(beside) * 1e3, 2),
        "slowdown": round(statistics.median(beside) / before, 2),
        "slowdown_of_means": round(statistics.mean(beside) / statistics.mean(quiet[SETTLED:]), 2),
        "first_token_s": round(now - began, 1),
        "steps": len(beside),
    }


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--prompt", type=int, default=5000, help="tokens of the prompt")
    arguments.add_argument("--out", type=Path)
    args = arguments.parse_args()
    before = machine()
    config = load_config(
        {
            "model": "a loaded model",
            "threads_per_rank": 1,
            "context_parallel": {"mode": "local"},
            "kv_cache": {"tokens_per_rank": 16384, "block_size": 16},
        }
    )
    world, threads = join_job(detect(os.environ), config)
    worker, facts = build_worker(world, config, model(), threads)
    prompt = [i * 7 % 120 + 1 for i in range(args.prompt)]
    rounds: list[dict[str, Any]] = []
    for _ in range(args.rounds):
        for rank in (0, 1):
            if world.rank != 0:
                worker.follow()
                continue
            rounds.append(one_round(worker, facts, config, rank, prompt))
            print(rounds[-1], flush=True)
    if world.rank == 0:
        slowdowns = {
            f"slowdown_rank_{rank}": statistics.median(
                found["slowdown"] for found in rounds if found["prompt_on_rank"] == rank
            )
            for rank in (0, 1)
        }
        argv = ["--rounds", str(args.rounds), "--prompt", str(args.prompt)]
        about = {"command": command("pacing", argv, 2), **before}
        finish({"benchmark": "pacing", **about, **slowdowns, "rounds": rounds}, args.out)
    world.leave()


if __name__ == "__main__":
    main()
