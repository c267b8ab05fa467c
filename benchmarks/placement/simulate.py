"""The real scheduler and every watched rank's state over a trace, without model and clock."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from benchmarks.placement.traces import (
    BLOCK,
    STEPS,
    VOCAB,
    Cell,
    Session,
    make_filling,
    make_trace,
)
from benchmarks.placement.wire import KV_HEADS, Q_HEADS, Wire, rates
from ds_cp.errors import CapacityError
from ds_cp.plan import StepPlan
from ds_cp.sampling_params import SamplingParams
from ds_cp.scheduler.admission import Limits
from ds_cp.scheduler.mode_policy import ModePolicy
from ds_cp.scheduler.request import Request
from ds_cp.scheduler.scheduler import Scheduler
from ds_cp.topology.hosts import Topology
from ds_cp.worker.state import Item, StepWork, check_item
from tests.helpers.cluster import SimulatedRanks

POLICIES = ("fill_then_spill", "round_robin", "balanced")
BUDGET = 512  # tokens that a rank computes in a step


@dataclass
class Tally:
    """Sums and extremes over the steps of one run."""

    steps: int = 0
    answered: int = 0  # tokens
    decode_steps: int = 0
    spanning_tokens: int = 0
    decode_bytes: int = 0
    decode_bytes_between_hosts: int = 0
    exchanges: int = 0
    handed_over: int = 0
    prefill_bytes: int = 0
    shipped_bytes: int = 0
    copied_bytes: int = 0
    longest: int = 0
    busiest: int = 0
    used_by_fullest: float = 0.0
    used_by_all: float = 0.0
    refused: int = 0
    waited: int = 0
    at_queue: float | None = None
    at_preemption: float | None = None
    peak: float = 0.0
    local: int = 0
    finished: int = 0
    used: list[list[float]] = field(default_factory=list)  # per step, share of each rank


class Run:
    """One policy on one cell and trace, step by step."""

    def __init__(
        self,
        cell: Cell,
        placement: str,
        trace: Sequence[Session],
        mode: str = "auto",
        budget: int = BUDGET,
        watched: Sequence[int] = (),
    ) -> None:
        self.cell, self.tally, self.wire = cell, Tally(), Wire(cell.hosts)
        topology = Topology.from_hosts(cell.hosts)
        policy = ModePolicy(
            mode=mode, ring_pass="auto", local_threshold=cell.threshold,
            num_hosts=topology.num_hosts, num_q_heads=Q_HEADS, num_kv_heads=KV_HEADS,
            cost=rates(topology.num_hosts),
        )  # fmt: skip
        limits = Limits(10**9, 4096, budget, 10**6, VOCAB, (0,))
        self.scheduler = Scheduler(
            limits, cell.blocks, BLOCK, placement, "zigzag", policy, topology.ring_order(),
            pacer=None,
        )  # fmt: skip
        self.ranks = SimulatedRanks(watched or (0, len(cell.blocks) - 1), BLOCK)
        self.coming: dict[int, list[tuple[Session, int]]] = {}  # step -> sessions, turn
        for session in trace:
            self.coming.setdefault(session.arrival, []).append((session, 0))
        self.live: dict[int, tuple[Request, Session, int]] = {}  # ..., turn
        self.works: list[StepWork] = []  # what the last step means for the watched ranks

    def all_steps(self, limit: int = 100_000) -> Tally:
        """Step until every request has ended."""
        while self.coming or self.live:
            assert self.tally.steps < limit, "the trace does not end"
            self.step()
        self.scheduler.check_integrity()
        return self.tally

    def step(self) -> list[Item]:
        """Arrivals, a plan, its tokens; returns the items that span."""
        tally, scheduler = self.tally, self.scheduler
        for session, turn in self.coming.pop(tally.steps, []):
            self._arrive(session, turn)
        before, resident = scheduler.num_preemptions, self._resident()
        plan = scheduler.schedule()
        if scheduler.num_preemptions > before and tally.at_preemption is None:
            tally.at_preemption = resident
        spanning: list[Item] = []
        self.works = []
        if plan is not None:
            works = self.works = self.ranks.apply(plan)
            spanning = [item for item in works[0].items if item.mode != "local"]
            for item in spanning:
                check_item(item)
            self._count(plan, spanning)
            tally.handed_over += len(works[0].handoffs)
        self._look()
        tally.steps += 1
        if plan is not None:
            for draw in works[0].draws:
                self._record(draw.sequence.number)
        return spanning

    def _arrive(self, session: Session, turn: int) -> None:
        params = SamplingParams(max_tokens=session.turns[turn][1], temperature=0, ignore_eos=True)
        try:
            request = self.scheduler.admit("", session.prompt(turn), params, seed=0)
        except CapacityError:
            self.tally.refused += 1
            return
        self.live[request.number] = request, session, turn

    def _record(self, number: int) -> None:
        request, session, turn = self.live[number]
        token = session.token(turn, len(request.output))
        self.tally.answered += 1
        if self.scheduler.record_token(request, token) is None:
            return
        del self.live[number]
        self.tally.finished += 1
        self.tally.local += request.modes == ["local"]
        if turn + 1 < len(session.turns):
            at = self.tally.steps + session.pause
            self.coming.setdefault(at, []).append((session, turn + 1))

    def _resident(self) -> float:
        """Tokens whose KV is stored for running requests, as a share of what all ranks hold."""
        allocator, running = self.scheduler.allocator, self.scheduler.running
        blocks = sum(allocator.num_used(rank) for rank in range(len(self.cell.blocks)))
        blocks -= sum(len(held) for r in running for held in r.reserved.values())
        tokens = blocks * BLOCK - sum(r.table.open_slots for r in running if r.table)
        return tokens / allocator.capacity_tokens

    def _count(self, plan: StepPlan, spanning: Sequence[Item]) -> None:
        tally, wire = self.tally, self.wire
        spanning_decodes = {n for d in plan.decodes if d.mode != "local" for n in d.requests}
        decodes = [item for item in spanning if item.sequence.number in spanning_decodes]
        prompts = [item for item in spanning if item.sequence.number not in spanning_decodes]
        sent, crossed = wire.attention(decodes)
        tally.decode_bytes += sent
        tally.decode_bytes_between_hosts += crossed
        tally.prefill_bytes += wire.attention(prompts)[0]
        tally.shipped_bytes += sum(wire.shipped(item) for item in spanning)
        away = sum(t.source[0] != t.target[0] for t in plan.transfers)
        tally.copied_bytes += away * BLOCK * wire.KV
        tally.spanning_tokens += len(decodes)
        if plan.decodes:
            tally.decode_steps += 1
            tally.exchanges += wire.rounds(decodes)
            reads = [0] * len(self.cell.blocks)  # KV tokens that the decode of this step reads
            for d in plan.decodes:
                for number in d.requests:
                    if d.mode == "local":
                        table = self.live[number][0].table
                        assert table is not None
                        self._read(reads, table.last_rank, table.num_tokens)
            for item in decodes:
                for shard in item.shards:
                    self._read(reads, shard.rank, shard.blocks.num_keys)
            tally.busiest += max(reads)

    def _read(self, reads: list[int], rank: int, tokens: int) -> None:
        reads[rank] += tokens
        self.tally.longest = max(self.tally.longest, tokens)

    def _look(self) -> None:
        """At the pool, after a step was planned."""
        tally, scheduler = self.tally, self.scheduler
        allocator, blocks = scheduler.allocator, self.cell.blocks
        tally.used.append([allocator.num_used(r) / n for r, n in enumerate(blocks)])
        used = sum(allocator.num_used(r) for r in range(len(blocks))) / sum(blocks)
        resident = self._resident()
        tally.peak = max(tally.peak, resident)
        tally.used_by_fullest += max(tally.used[-1])
        tally.used_by_all += used
        tally.waited += len(scheduler.waiting)
        first = scheduler.waiting.first()
        if first is not None and tally.at_queue is None:
            available = allocator.available()
            room = max(available) if scheduler.block_manager.only_local else sum(available)
            if -(-first.num_tokens // BLOCK) > room:
                tally.at_queue = resident

    def figures(self) -> dict[str, Any]:
        """The row of this run."""
        tally, homes = self.tally, self.scheduler.block_manager
        return {
            "resident_at_first_queue": _rounded(tally.at_queue),
            "resident_at_first_preemption": _rounded(tally.at_preemption),
            "peak_resident": _rounded(tally.peak),
            "refused": tally.refused,
            "preemptions": self.scheduler.num_preemptions,
            "decode_bytes_per_token": round(tally.decode_bytes / tally.answered),
            "decode_bytes_between_hosts_per_token": round(
                tally.decode_bytes_between_hosts / tally.answered
            ),
            "exchanges_per_decode_step": round(tally.exchanges / tally.decode_steps, 1),
            "prefill_shipped_bytes": tally.shipped_bytes,
            "prefix_copied_bytes": tally.copied_bytes,
            "prefill_attention_bytes": tally.prefill_bytes,
            "longest_kv_on_one_rank": tally.longest,
            "kv_read_by_busiest_rank": round(tally.busiest / tally.decode_steps),
            "local_share": _rounded(tally.local / tally.finished),
            "spanning_token_share": _rounded(tally.spanning_tokens / tally.answered),
            "tokens_handed_over": tally.handed_over,
            "prefix_hit_tokens": homes.hits,
            "prefix_hit_share": _rounded(homes.hits / homes.queries),
            "evictions": self.scheduler.allocator.evictions,
            "imbalance": round(tally.used_by_fullest / tally.used_by_all, 3),
            "mean_waiting": round(tally.waited / tally.steps, 2),
            "finished": tally.finished,
            "answer_tokens": tally.answered,
            "steps": tally.steps,
        }


def _rounded(share: float | None) -> float | None:
    return None if share is None else round(share, 4)


def fill(cell: Cell, placement: str, mode: str, seed: int) -> dict[str, Any]:
    """How full the ranks get until the first request has to wait and, without new ones, until the
    first one is preempted."""
    run = Run(cell, placement, make_filling(cell, seed), mode, budget=10**6)
    while run.tally.at_queue is None:
        run.step()
    run.coming.clear()
    for request in list(run.scheduler.waiting):
        run.scheduler.finish(request, "abort")
        del run.live[request.number]
    while run.tally.at_preemption is None:
        run.step()
    return {
        "cell": cell.name, "policy": placement, "mode": mode, "seed": seed,
        "at_first_wait": _rounded(run.tally.at_queue),
        "at_first_preemption": _rounded(run.tally.at_preemption),
        "refused": run.tally.refused,
    }  # fmt: skip


def run_trace(
    cell: Cell, policy: str, seed: int, steps: int
) -> tuple[dict[str, Any], list[list[float]]]:
    """Figures, and the used share of each rank over the steps."""
    ranks = len(cell.blocks)
    run = Run(cell, policy, make_trace(ranks, sum(cell.blocks) // ranks, steps, seed))
    used = run.all_steps().used
    about = {
        "cell": cell.name, "hosts": cell.hosts, "blocks": list(cell.blocks),
        "local_threshold": cell.threshold, "policy": policy, "seed": seed,
    }  # fmt: skip
    return {**about, **run.figures()}, used


def compare(
    some: Sequence[Cell], seeds: Sequence[int], processes: int, steps: int = STEPS
) -> Result:
    """Every policy on every cell and trace, in an order that does not depend on which run ends
    first."""
    asks = [(cell, policy, seed, steps) for cell in some for policy in POLICIES for seed in seeds]
    fills = [
        (cell, policy, mode, seed)
        for cell in some if cell.threshold is None
        for policy, mode in [*((p, "auto") for p in POLICIES), ("fill_then_spill", "local")]
        for seed in seeds
    ]  # fmt: skip
    with ProcessPoolExecutor(processes) as pool:
        traced = list(pool.map(run_trace, *zip(*asks, strict=True)))
        filled = list(pool.map(fill, *zip(*fills, strict=True)))
    pictured = zip(asks[:: len(seeds)], traced[:: len(seeds)], strict=True)  # the first seed
    used = {(ask[0].name, ask[1]): shares for ask, (_, shares) in pictured}
    return Result([row for row, _ in traced], filled, used)


@dataclass(frozen=True)
class Result:
    """``rows`` and ``fills``: one per cell, policy and seed; ``used``: of the first seed."""

    rows: list[dict[str, Any]]
    fills: list[dict[str, Any]]
    used: dict[tuple[str, str], list[list[float]]]

    def means(self) -> list[dict[str, Any]]:
        """The rows of each cell and policy as one, means over the seeds; None where it is none in
        any."""
        found: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for row in self.rows:
            found.setdefault((row["cell"], row["policy"]), []).append(row)
        return [
            {
                name: value if isinstance(value, str | list) else mean([r[name] for r in rows])
                for name, value in rows[0].items() if name != "seed"
            }
            for rows in found.values()
        ]  # fmt: skip


def mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return round(sum(known) / len(known), 4) if known else None
