"""What the engine adds to the model's own forward call, step by step, and transformers beside it.

    python -m benchmarks.overhead [--batches 1,4,16,64] [--rounds 5] [--steps 10] [--out FILE]

One rank, 2 threads, SmolLM2, fp32, greedy. For each batch size as many requests decode after
prompts of 200 tokens. *step*: from one delta to the next as a caller sees them, the next step
planned while one runs; *forward*: within it, the model's forward call with the engine's attention.
Overhead = step / forward - 1. *transformers*: the same model and prompts in one batch of equal
lengths with its own cache, sdpa attention and an argmax, in the same thread. Engine and
transformers take turns; per round the median of its steps, then min and median over rounds.

Then, in runs of their own, steps one after the other without overlap with a clock around each part:
where the time goes. The clocks themselves cost about a microsecond a call, 60 calls per request and
step. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import wait
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

import ds_cp.worker.worker as worker_module
from benchmarks.common import MODEL, command, finish, machine, parser
from ds_cp.comm.wire import World
from ds_cp.config import Config, load_config
from ds_cp.engine.core import EngineCore
from ds_cp.engine.loop import PipelinedLoop, ThreadRunner
from ds_cp.facts import Facts
from ds_cp.model.loading import load_model, load_tokenizer
from ds_cp.model.source import find_model
from ds_cp.plan import Outcome, Stop
from ds_cp.sampling_params import SamplingParams
from ds_cp.scheduler.build import build_scheduler
from ds_cp.startup.build import build_worker
from ds_cp.topology.hosts import Topology
from ds_cp.worker.step_context import StepContext
from ds_cp.worker.worker import Worker

BLOCK = 64  # tokens
TARGET_BATCH, TARGET = 16, 0.05  # overhead at most
# Parts of a step, in its order; indented ones are within the one above.
PARTS = (
    "schedule", "lead", "  encode plan", "  worker state", "  step context", "  forward",
    "    attend", "      kernel", "  sample", "  collect", "apply",
)  # fmt: skip
HIDDEN = ("schedule", "apply")  # beside the ranks' work when steps overlap


class Runner(ThreadRunner):
    """Keeps the last outcome, and can be waited for without taking anything from it."""

    last: Outcome

    def outcome(self) -> Outcome:
        self.last = super().outcome()
        return self.last

    def rest(self) -> None:
        """Wait until nothing computes."""
        wait(self._in_flight)

    def done(self, work: Callable[[], Any]) -> Any:
        """Do something else in the thread that runs the steps, and wait for it."""
        return self.call(work).result()


class Decodes:
    """Decoding requests of one engine, stepped when asked and still in between."""

    def __init__(
        self, worker: Worker, runner: Runner, facts: Facts, config: Config, tokenizer: Any,
        prompts: Sequence[Sequence[int]], new: int,
    ) -> None:  # fmt: skip
        scheduler = build_scheduler(config, facts)
        scheduler._pacer = None  # all prompts as soon as possible, so that answers are as long
        self.worker = worker
        self.core = EngineCore(scheduler, tokenizer)
        self.runner = runner
        self._loop = PipelinedLoop(self.core, self.runner)
        self.tokens: list[list[int]] = [[] for _ in prompts]
        params = SamplingParams(max_tokens=new, temperature=0.0, ignore_eos=True)
        for number, prompt in enumerate(prompts):
            self.core.add(str(number), prompt, params)
        while not all(self.tokens):
            self._advance()
        self.runner.rest()

    def _advance(self) -> bool:
        deltas = self._loop.advance()
        for delta in deltas:
            self.tokens[int(delta.request_id)] += delta.token_ids
        return bool(deltas)

    def steps(self, count: int) -> tuple[list[float], list[float], list[float]]:
        """Seconds of ``count`` steps: from delta to delta, of the forward call, of rank 0's part
        in all. The first steps after a pause are not among them."""
        stamps: list[float] = []
        forward: list[float] = []
        lead: list[float] = []
        while len(stamps) < count + 3:
            if self._advance():
                stamps.append(time.perf_counter())
                forward.append(self.runner.last.model_seconds)
                lead.append(self.runner.last.seconds)
        self.runner.rest()
        gaps = [b - a for a, b in zip(stamps, stamps[1:], strict=False)]
        return gaps[2:], forward[3:], lead[3:]

    def parts(self, count: int) -> dict[str, list[float]]:
        """Seconds of each of ``PARTS`` in ``count`` steps that follow each other."""
        while self._loop.num_in_flight:
            self.core.apply(self.runner.outcome())
            self._loop.num_in_flight -= 1
        found: dict[str, list[float]] = {part: [] for part in PARTS}
        with clocks(self.worker) as clock:
            for _ in range(count + 2):
                clock.clear()
                plan = clock.time("schedule", self.core.plan)
                assert plan is not None
                outcome = self.runner.done(partial(clock.time, "lead", self.worker.lead, plan))
                clock.time("apply", self.core.apply, outcome)
                for part in PARTS:
                    found[part].append(clock.seconds.get(part.strip(), 0.0))
        return {part: seconds[2:] for part, seconds in found.items()}

    def close(self) -> None:
        for request_id in range(len(self.tokens)):
            self.core.abort(str(request_id))
        self._loop.settle()
        self.runner.done(partial(self.worker.lead, Stop()))


class Clock:
    """Seconds by name since ``clear``."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def clear(self) -> None:
        self.seconds.clear()

    def time(self, name: str, work: Callable[..., Any], *args: Any) -> Any:
        began = time.perf_counter()
        out = work(*args)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began
        return out

    def around(self, name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args: self.time(name, work, *args)


@contextmanager
def clocks(worker: Worker) -> Iterator[Clock]:
    """A clock around each part of a step, removed at the end."""
    clock = Clock()
    with ExitStack() as stack:
        for owner, attribute, name in (
            (worker_module, "encode_plan", "encode plan"),
            (worker.state, "apply", "worker state"),
            (worker_module, "StepContext", "step context"),
            (worker, "_forward", "forward"),
            (worker, "_draw", "sample"),
            (worker, "_collect", "collect"),
        ):
            timed = clock.around(name, getattr(owner, attribute))
            stack.enter_context(patch.object(owner, attribute, timed))
        kernel = worker.layers.kernel
        timed_kernel = clock.around("kernel", kernel.paged_attention)
        stack.enter_context(patch.object(kernel, "paged_attention", timed_kernel))
        attend = StepContext.attend

        def timed_attend(self: StepContext, *args: Any) -> torch.Tensor:
            found: torch.Tensor = clock.time("attend", attend, self, *args)
            return found

        stack.enter_context(patch.object(StepContext, "attend", timed_attend))
        yield clock


class Transformers:
    """The same requests through transformers alone: one batch, equal lengths, no mask needed."""

    def __init__(self, model: Any, prompts: Sequence[Sequence[int]]) -> None:
        from transformers import DynamicCache

        self._model = model
        self._cache = DynamicCache(config=model.config)
        self._ids = torch.tensor(prompts)
        self.drawn: list[torch.Tensor] = []
        self.steps(1)

    def steps(self, count: int) -> list[float]:
        """Seconds of each of ``count`` steps."""
        seconds = []
        self._model.set_attn_implementation("sdpa")
        with torch.inference_mode():
            for _ in range(count):
                began = time.perf_counter()
                out = self._model(
                    input_ids=self._ids, past_key_values=self._cache, use_cache=True,
                    logits_to_keep=1,
                )  # fmt: skip
                self._ids = out.logits[:, -1:].argmax(-1)
                seconds.append(time.perf_counter() - began)
                self.drawn.append(self._ids)
        self._model.set_attn_implementation("ds_cp")
        return seconds

    @property
    def tokens(self) -> list[list[int]]:
        return torch.cat(self.drawn, dim=1).tolist()


def measure(
    make: Callable[[Sequence[Sequence[int]]], Decodes], model: Any, batch: int,
    args: argparse.Namespace,
) -> dict[str, Any]:  # fmt: skip
    """One batch size: rounds in turn, then the parts."""
    rng = random.Random(batch)
    prompts = [[rng.randrange(100, 40_000) for _ in range(args.context)] for _ in range(batch)]
    decodes = make(prompts)
    try:
        other = decodes.runner.done(lambda: Transformers(model, prompts))
        rounds: dict[str, list[float]] = {n: [] for n in ("step", "forward", "lead", "other")}
        for _ in range(args.rounds):
            step, forward, lead = decodes.steps(args.steps)
            beside = decodes.runner.done(lambda: other.steps(args.steps + 2))[2:]
            for name, seconds in zip(rounds, (step, forward, lead, beside), strict=True):
                rounds[name].append(statistics.median(seconds))
        parts = decodes.parts(args.steps)
    finally:
        decodes.close()
    pairs = list(zip(decodes.tokens, other.tokens, strict=True))
    return {
        "batch": batch,
        "ms": {name: [round(1e3 * s, 3) for s in seconds] for name, seconds in rounds.items()},
        "overhead": ratio(rounds["step"], rounds["forward"], -1.0),
        "step_to_transformers": ratio(rounds["step"], rounds["other"]),
        "forward_to_transformers": ratio(rounds["forward"], rounds["other"]),
        "parts_ms": {n: round(1e3 * statistics.median(s), 3) for n, s in parts.items()},
        "answers_with_equal_tokens": sum(
            all(x == y for x, y in zip(ours, theirs, strict=False)) for ours, theirs in pairs
        ),
    }


def ratio(of: list[float], to: list[float], plus: float = 0.0) -> dict[str, float]:
    """Of the minima over rounds, and the median over rounds of each round's own."""
    each = [a / b + plus for a, b in zip(of, to, strict=True)]
    return {
        "min": round(min(of) / min(to) + plus, 4),
        "median": round(statistics.median(each), 4),
    }


def show(row: dict[str, Any]) -> None:
    batch, ms, over = row["batch"], row["ms"], row["overhead"]
    limit = f"; at most {TARGET}" if batch == TARGET_BATCH else ""
    print(
        f"batch {batch}: step {min(ms['step']):.2f} ms (median {statistics.median(ms['step']):.2f})"
        f", forward {min(ms['forward']):.2f}, lead {min(ms['lead']):.2f}, transformers "
        f"{min(ms['other']):.2f}; overhead {over['min']:.3f} (min), {over['median']:.3f} (median)"
        f"{limit}; step / transformers {row['step_to_transformers']['min']:.3f} (min), "
        f"{row['step_to_transformers']['median']:.3f} (median); equal tokens in "
        f"{row['answers_with_equal_tokens']} of {batch} answers"
    )
    parts = row["parts_ms"]
    whole = parts["lead"] + sum(parts[name] for name in HIDDEN)
    for name, value in parts.items():
        note = "  (hidden when steps overlap)" if name in HIDDEN else ""
        print(f"    {name:22}{value:10.3f} ms {100 * value / whole:6.1f} %{note}", flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--batches", default="1,4,16,64")
    arguments.add_argument("--context", type=int, default=200, help="tokens of each prompt")
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--steps", type=int, default=10, help="per round")
    arguments.add_argument("--threads", type=int, default=2)
    arguments.add_argument("--out", type=Path)
    args = arguments.parse_args(argv)
    about = machine()
    batches = [int(n) for n in args.batches.split(",")]
    new = (args.rounds + 1) * (args.steps + 3) + 16
    config = load_config(
        {
            "model": MODEL,
            "dtype": "fp32",
            "kv_cache": {
                "block_size": BLOCK,
                "tokens_per_rank": max(batches) * -(-(args.context + new) // BLOCK) * BLOCK,
            },
            "scheduler": {"max_num_seqs": max(batches)},
        }
    )
    source = find_model(MODEL)

    def build() -> tuple[Any, Worker, Facts]:
        torch.set_num_threads(args.threads)
        model = load_model(source, torch.float32, torch.device("cpu"))
        alone = World(0, Topology(("here",)), torch.device("cpu"), 60.0, joined=False)
        return model, *build_worker(alone, config, model, args.threads)

    runner = Runner()
    model, worker, facts = runner.done(build)  # where the steps run, see ThreadRunner
    runner.lead = worker.lead
    tokenizer = load_tokenizer(source)

    def make(prompts: Sequence[Sequence[int]]) -> Decodes:
        return Decodes(worker, runner, facts, config, tokenizer, prompts, new)

    rows = []
    for batch in batches:
        rows.append(measure(make, model, batch, args))
        show(rows[-1])
    result = {
        "command": command("overhead", sys.argv[1:] if argv is None else argv),
        **about,
        "threads": args.threads,
        "context": args.context,
        "target": {"batch": TARGET_BATCH, "overhead": TARGET},
        "batches": rows,
    }
    runner.close()
    finish(result, args.out)


if __name__ == "__main__":
    main()
