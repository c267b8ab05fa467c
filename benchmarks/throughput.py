"""Short requests: what many ranks cost beside one with the same cores, and what spanning costs.

    torchrun --nproc-per-node 4 -m benchmarks.throughput [--requests 64] [--rounds 2]

A: one rank, 2 threads. B2: two ranks, 1 thread each, the same cores. B: four ranks, 1 thread each.
All in mode auto, where short requests stay on one rank each. Then the first few requests alone over
four ranks: S in mode auto, R and T with mode ring and tree forced for all, their blocks dealt out
by ``--placement``, so that they do span. SmolLM2, fp32, greedy, prefix caching off, prompts of 64
to 192 random tokens. One job holds all engines and runs them in turn, the order reversed every
other round; ranks that have no part in a run wait for its end, and the CPU seconds that they use
meanwhile are reported. The figures are tokens of output per second, best and median over rounds.

Where the time goes: wall = mean over ranks of the seconds in the model's forward call + skew (the
slowest rank of each step - that mean) + the rest of the engine. On fewer cores than ranks the
forward call's seconds include waiting for a core. The last line is one JSON object.
"""

from __future__ import annotations

import os
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch.distributed import new_group

from benchmarks.common import MODEL, command, finish, machine, parser
from ds_cp.comm.control import Control
from ds_cp.comm.ledger import Ledger
from ds_cp.comm.wire import Group, World
from ds_cp.config import Config, load_config
from ds_cp.engine.llm import LLMEngine
from ds_cp.model.loading import load_model
from ds_cp.model.source import find_model
from ds_cp.outputs import RequestOutput
from ds_cp.plan import Outcome, Plan, StepPlan
from ds_cp.sampling_params import SamplingParams
from ds_cp.startup.build import build_worker
from ds_cp.startup.join import join_job
from ds_cp.topology.hosts import Topology
from ds_cp.topology.job import detect
from ds_cp.worker.worker import Worker

BLOCK = 64  # tokens
TARGET = 0.95  # B / A


@dataclass(frozen=True)
class Case:
    """One engine: the first ``ranks`` ranks of the job with ``threads`` CPU threads each."""

    name: str
    ranks: int
    threads: int
    mode: str = "auto"
    few: bool = False  # whether it gets the first few requests only


CASES = (
    Case("A one rank 2 threads", 1, 2),
    Case("B2 two ranks 1 thread", 2, 1),
    Case("B four ranks 1 thread", 4, 1),
    Case("S few requests, auto", 4, 1, few=True),
    Case("R few requests, ring", 4, 1, "ring", few=True),
    Case("T few requests, tree", 4, 1, "tree", few=True),
)
RATIOS = (
    ("four ranks / one rank, same cores", "B", "A", TARGET),
    ("two ranks / one rank, same cores", "B2", "A", TARGET),
    ("ring forced for all / auto", "R", "S", None),
    ("tree forced for all / auto", "T", "S", None),
)


@dataclass(frozen=True)
class Pass:
    """One run of one engine. ``tokens``: the answers. Seconds: ``wall``; ``model``: in the forward
    call, per rank; ``cpu``: of the process, per rank; ``idle_cpu``: of the ranks without a part;
    the rest as in the docstring above. ``prompt_steps``: of the ``steps``, those with prompts, and
    ``prompt_s``, the seconds from their start to the next step's."""

    case: str
    tokens: list[list[int]]
    wall: float
    rate: float
    steps: int
    prompt_steps: int
    prompt_s: float
    model: list[float]
    skew: float
    rest: float
    cpu: list[float]
    idle_cpu: list[float]
    preemptions: int


class Part(World):
    """The first ranks of a joined job as a world of their own. Only they make it."""

    def __init__(self, world: World, size: int) -> None:
        self.__dict__.update(world.__dict__)
        self.size = size
        self.topology = Topology.from_hosts(list(world.topology.hosts[:size]))
        self.ledger = Ledger()
        self.everybody = self.group("everybody", [range(size)])

    def group(self, name: str, members: Sequence[Sequence[int]]) -> Group:
        ranks = next(list(some) for some in members if self.rank in some)
        handle = None
        if len(ranks) > 1:
            limit = timedelta(seconds=self.timeout_s)
            handle = new_group(ranks, timeout=limit, use_local_synchronization=True)
        return Group(name, ranks, self, handle)


class Watch:
    """Records of every step of a rank when it began, the seconds in the model's forward call, and
    whether prompts are in it."""

    def __init__(self, worker: Worker) -> None:
        self.began: list[float] = []
        self.model: list[float] = []
        self.prompts: list[bool] = []
        self._worker, self._run = worker, worker.run

    def __enter__(self) -> Watch:
        self._worker.run = self._timed  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        self._worker.run = self._run  # type: ignore[method-assign]

    def _timed(self, plan: Plan, began: float | None = None) -> Outcome:
        if not isinstance(plan, StepPlan):
            return self._run(plan, began)
        self.began.append(time.perf_counter())
        self.prompts.append(bool(plan.chunks))
        before = self._worker.model_seconds
        outcome = self._run(plan, began)
        self.model.append(self._worker.model_seconds - before)
        return outcome


def config_of(case: Case, tokens: int, slack: float, placement: str, slowdown: float) -> Config:
    """``slack``: KV of all ranks / of the need; at 2.5 two of four ranks hold all requests."""
    spread = 1.0 if case.ranks == 1 else slack / case.ranks
    return load_config(
        {
            "model": MODEL,
            "dtype": "fp32",
            "threads_per_rank": case.threads,
            "context_parallel": {"mode": case.mode},
            "kv_cache": {
                "block_size": BLOCK,
                "tokens_per_rank": max(4, -(-int(tokens * spread) // BLOCK)) * BLOCK,
                "prefix_caching": False,
                "placement": "fill_then_spill" if case.mode == "auto" else placement,
            },
            "scheduler": {"max_num_seqs": 64, "max_queue": 4096, "decode_slowdown": slowdown},
            "comm": {"timeout_s": 600},
        }
    )


def make_prompts(count: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(100, 40_000) for _ in range(rng.randint(64, 192))] for _ in range(count)]


def build(
    world: World, model: Any, cases: Sequence[Case], configs: Sequence[Config]
) -> dict[str, LLMEngine]:
    """The engines in which this rank has a part. Those of as many ranks share a worker."""
    seats: dict[int, tuple[World, Any]] = {}
    engines = {}
    for case, config in sorted(zip(cases, configs, strict=True), key=lambda pair: pair[0].ranks):
        if world.rank >= case.ranks:
            continue
        if case.ranks not in seats:
            torch.set_num_threads(case.threads)
            if case.ranks == 1:
                seat = World(0, Topology(("here",)), world.device, 60.0, joined=False)
            else:
                seat = world if case.ranks == world.size else Part(world, case.ranks)
            seats[case.ranks] = seat, build_worker(seat, config, model, case.threads)
        seat, (worker, facts) = seats[case.ranks]
        engines[case.name] = LLMEngine(seat, worker, facts, config, None)
    return engines


def run_pass(
    world: World, case: Case, engine: LLMEngine | None, prompts: list[list[int]], new: int
) -> Pass | None:
    """Run the prompts through ``case``'s engine; every rank of the job calls it. Rank 0 returns
    what came of it."""
    params = SamplingParams(max_tokens=new, temperature=0.0, ignore_eos=True)
    outputs: list[RequestOutput] = []
    model: list[float] = []
    watch: Watch | None = None
    before = 0
    world.everybody.barrier()
    cpu, began = time.process_time(), time.perf_counter()
    if engine is not None:
        torch.set_num_threads(case.threads)
        if engine._core is not None:
            before = engine._core.scheduler.num_preemptions
        with Watch(engine._worker) as watch:
            outputs = engine.generate(prompts, params)
        model = watch.model
    ended = time.perf_counter()
    world.everybody.barrier()  # ranks without a part have waited here all the time
    mine = torch.tensor([time.process_time() - cpu, *model], dtype=torch.float64)
    others = {
        rank: torch.empty(len(model) + 1 if rank < case.ranks else 1, dtype=torch.float64)
        for rank in range(1, world.size)
    }
    Control(world).collect(mine, list(others.items()) if world.rank == 0 else [])
    if world.rank != 0:
        return None
    assert engine is not None and engine._core is not None and watch is not None
    all_ranks = [mine, *others.values()]
    model_NS = torch.stack([found[1:] for found in all_ranks[: case.ranks]])
    cpus = [round(float(found[0]), 3) for found in all_ranks]
    slowest = float(model_NS.max(dim=0).values.sum())
    mean = float(model_NS.sum()) / case.ranks
    wall = ended - began
    lengths = [b - a for a, b in zip(watch.began, [*watch.began[1:], ended], strict=True)]
    return Pass(
        case=case.name,
        tokens=[list(output.outputs[0].token_ids) for output in outputs],
        wall=wall,
        rate=sum(len(output.outputs[0].token_ids) for output in outputs) / wall,
        steps=len(lengths),
        prompt_steps=sum(watch.prompts),
        prompt_s=sum(s for s, has in zip(lengths, watch.prompts, strict=True) if has),
        model=[round(s, 3) for s in model_NS.sum(dim=1).tolist()],
        skew=slowest - mean,
        rest=wall - slowest,
        cpu=cpus[: case.ranks],
        idle_cpu=cpus[case.ranks :],
        preemptions=engine._core.scheduler.num_preemptions - before,
    )


def show(found: Pass) -> None:
    mean = sum(found.model) / len(found.model)
    print(
        f"{found.case}: {found.rate:.1f} tokens/s, {found.wall:.2f} s = model {mean:.2f} (ranks "
        f"{', '.join(f'{s:.2f}' for s in found.model)}) + skew {found.skew:.2f} + rest "
        f"{found.rest:.2f}; {found.steps} steps, {found.prompt_steps} with prompts "
        f"({found.prompt_s:.2f} s); CPU {sum(found.cpu):.2f} s, idle ranks "
        f"{sum(found.idle_cpu):.2f} s; {found.preemptions} preemptions",
        flush=True,
    )


def summarise(rounds: list[dict[str, Pass]]) -> dict[str, Any]:
    """Rates, ratios (best and median over rounds) and equal answers, printed and returned."""
    full = {case.name.split()[0]: case.name for case in CASES}
    rates = {key: [r[name].rate for r in rounds if name in r] for key, name in full.items()}
    ratios: dict[str, Any] = {}
    for title, a, b, least in RATIOS:
        if not rates[a] or not rates[b]:
            continue
        best = max(rates[a]) / max(rates[b])
        middle = statistics.median(rates[a]) / statistics.median(rates[b])
        ratios[title] = {"best": round(best, 3), "median": round(middle, 3), "at least": least}
        limit = "" if least is None else f"; at least {least}"
        print(f"{title}: {best:.3f} (best), {middle:.3f} (median){limit}")
    same: dict[str, str] = {}
    wanted = rounds[0][full["A"]].tokens
    for name in rounds[0]:
        answers = [(r[name].tokens, wanted) for r in rounds]
        equal = sum(x == y for got, want in answers for x, y in zip(got, want, strict=False))
        same[name] = f"{equal} of {sum(len(got) for got, _ in answers)}"
    print("answers equal to A's: " + ", ".join(f"{n.split()[0]} {s}" for n, s in same.items()))
    return {
        "tokens_per_s": {full[k]: [round(x, 2) for x in v] for k, v in rates.items() if v},
        "ratios": ratios,
        "answers_equal_to_A": same,
    }


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--requests", type=int, default=64)
    arguments.add_argument("--few", type=int, default=8, help="requests of S, R, T; 0: without")
    arguments.add_argument("--tokens", type=int, default=32, help="new tokens of each request")
    arguments.add_argument("--rounds", type=int, default=2)
    arguments.add_argument("--slack", type=float, default=2.5, help="KV of all ranks / of the need")
    arguments.add_argument("--placement", default="round_robin", help="under mode ring and tree")
    arguments.add_argument("--slowdown", type=float, default=2.0, help="scheduler.decode_slowdown")
    arguments.add_argument("--out", type=Path)
    args = arguments.parse_args(argv)
    about = machine()
    prompts = make_prompts(args.requests)
    budget = sum(-(-(len(p) + args.tokens) // BLOCK) * BLOCK for p in prompts)
    job = detect(os.environ)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", job.interface or "lo")
    cases = [c for c in CASES if c.ranks <= job.world_size and not (c.few and args.few < 1)]
    configs = [config_of(case, budget, args.slack, args.placement, args.slowdown) for case in cases]
    world, _ = join_job(job, configs[-1])
    model = load_model(find_model(MODEL), torch.float32, torch.device("cpu"))
    engines = build(world, model, cases, configs)

    def run(case: Case, count: int, new: int) -> Pass | None:
        return run_pass(world, case, engines.get(case.name), prompts[:count], new)

    for case in cases:  # warm: the pages, the pacer
        run(case, min(4, args.requests), min(8, args.tokens))
    rounds: list[dict[str, Pass]] = []
    for number in range(args.rounds):
        done = {}
        for case in cases if number % 2 == 0 else list(reversed(cases)):
            count = min(args.few, args.requests) if case.few else args.requests
            found = run(case, count, args.tokens)
            if found is not None:
                done[case.name] = found
                show(found)
        rounds.append(done)
    if world.rank == 0:
        result = {
            "command": command("throughput", sys.argv[1:] if argv is None else argv, world.size),
            **about,
            "requests": args.requests,
            "few": args.few,
            "slack": args.slack,
            "prompt_tokens": sum(map(len, prompts)),
            "new_tokens": args.tokens,
            "decode_slowdown": args.slowdown,
            **summarise(rounds),
            "passes": [
                {k: v for k, v in asdict(found).items() if k != "tokens"}
                for done in rounds
                for found in done.values()
            ],
        }
        finish(result, args.out)
    world.leave()


if __name__ == "__main__":
    main()
