"""Where blocks go: fill_then_spill, round_robin and balanced on the same seeded traces.

    python -m benchmarks.placement [--out DIR]

The real scheduler and the state of every rank (``WorkerState``) run, no model and no clock: an
answer has a fixed length and its tokens follow from the request, so every policy gets the same
prompts,
and the same command gives the same files bit for bit.

A trace is sessions that arrive at given steps: *chats* (one of three shared system prompts, a
question, an answer), *conversations* (two to five turns, each with everything before it as its
prompt, some steps after the answer before), *documents* (1.2 to 3 times what one rank holds, a
question and a second one later) and two prompts that no cluster of this size can hold. Bytes on
the wire are counted request by request from the spans that occur, with the shapes of SmolLM2-135M:
L = 30 layers, H = 9 query and G = 3 KV heads, D = 64, e = 4 bytes (see ``Wire``).

The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import random
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ds_cp.cost import CostModel
from ds_cp.errors import CapacityError
from ds_cp.layout import positions, total
from ds_cp.plan import StepPlan, decode_plan, encode_plan
from ds_cp.sampling_params import SamplingParams
from ds_cp.scheduler.mode_policy import ModePolicy
from ds_cp.scheduler.request import Request
from ds_cp.scheduler.scheduler import Limits, Scheduler
from ds_cp.topology.hosts import Topology
from ds_cp.worker.state import Item, StepWork, WorkerState, check_item

RESULTS = Path("benchmarks/results")
POLICIES = ("fill_then_spill", "round_robin", "balanced")
VOCAB = 49_152
LAYERS, Q_HEADS, KV_HEADS, HEAD_DIM, ELEMENT, LSE = 30, 9, 3, 64, 4, 4
BLOCK = 16  # tokens
BUDGET = 512  # tokens that a rank computes in a step
SEEDS = (1, 2, 3, 4, 5)
STEPS = 960  # in which requests arrive
BLOCKS = 256  # of one rank, on average
COLOURS = ("#1b6ca8", "#c8553d", "#4a8f4a", "#8a6fb0", "#b08a2e", "#5b5b5b", "#d17aa5", "#3fa7a0")


@dataclass(frozen=True)
class Cell:
    """A cluster: the host of each rank, its blocks, and the prompt length above which a request
    spans all ranks although fewer would hold it (None: never)."""

    name: str
    hosts: str
    blocks: tuple[int, ...]
    threshold: int | None = None


def cells() -> tuple[Cell, ...]:
    even4, even8 = (BLOCKS,) * 4, (BLOCKS,) * 8
    odd4, odd8 = (512, 256, 128, 128), (512, 256, 128, 128, 512, 256, 128, 128)
    spread = BLOCKS * BLOCK // 2
    return (
        Cell("4 ranks, 1 host", "aaaa", even4),
        Cell("4 ranks, 2 hosts", "aabb", even4),
        Cell("8 ranks, 1 host", "aaaaaaaa", even8),
        Cell("8 ranks, 2 hosts", "aaaabbbb", even8),
        Cell("4 unequal ranks, 1 host", "aaaa", odd4),
        Cell("8 unequal ranks, 2 hosts", "aaaabbbb", odd8),
        Cell("4 ranks, 1 host, long prompts spread", "aaaa", even4, spread),
        Cell("8 ranks, 2 hosts, long prompts spread", "aaaabbbb", even8, spread),
    )


def rates(num_hosts: int) -> CostModel:
    """Fixed, of the order that a 2-core CPU rank measures at start; slower links between hosts."""
    bandwidth, latency = (2.5e9, 90e-6) if num_hosts == 1 else (1.25e9, 200e-6)
    return CostModel(
        flops_per_s=50e9, bytes_per_s=bandwidth, latency_s=latency, num_layers=LAYERS,
        num_q_heads=Q_HEADS, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM, weights=134_515_008,
        element=ELEMENT,
    )  # fmt: skip


# --- traces


@dataclass(frozen=True)
class Session:
    """``opening`` tokens, then ``turns`` of (question, tokens of the answer); each turn comes
    ``pause`` steps after the answer before it."""

    number: int
    kind: str
    arrival: int
    opening: tuple[int, ...]
    turns: tuple[tuple[tuple[int, ...], int], ...]
    pause: int

    def token(self, turn: int, index: int) -> int:
        """What the pretended model says: the same whatever the placement."""
        return 1 + (self.number * 7919 + turn * 104_729 + 31 * index) % (VOCAB - 1)

    def prompt(self, turn: int) -> tuple[int, ...]:
        tokens = list(self.opening)
        for i in range(turn):
            tokens += self.turns[i][0]
            tokens += (self.token(i, index) for index in range(self.turns[i][1]))
        return (*tokens, *self.turns[turn][0])


def make_trace(ranks: int, blocks: int, steps: int, seed: int) -> list[Session]:
    """Sessions that arrive during ``steps`` steps, a third of the chats in a rush; as many per rank
    on every number of ranks, and prompts in proportion to ``blocks``, of one rank."""
    rng, capacity = random.Random(seed), blocks * BLOCK

    def text(low: int, high: int) -> tuple[int, ...]:
        length = max(1, rng.randint(low, high) * blocks // 256)
        return tuple(rng.randrange(1, VOCAB) for _ in range(length))

    systems = [text(n, n) for n in (96, 240, 400)]
    found: list[tuple[int, str, tuple[int, ...], list[tuple[tuple[int, ...], int]]]] = []
    for i in range(steps * ranks // 15):
        turns = [(text(16, 160), rng.randint(16, 128))]
        rush = steps * 3 // 5 + rng.randrange(steps // 16)
        at = rng.randrange(steps) if i % 3 else rush
        found.append((at, "chat", rng.choice(systems), turns))
    for _ in range(steps * ranks // 200):
        turns = [(text(16, 96), rng.randint(32, 128)) for _ in range(rng.randint(2, 5))]
        found.append((rng.randrange(steps), "conversation", rng.choice(systems), turns))
    for i in range(max(1, steps * ranks // 800)):
        document = text(int(1.2 * 4096), 3 * 4096)
        turns = [(text(16, 64), rng.randint(32, 128)) for _ in range(2)]
        found.append((i * 800 // ranks + rng.randrange(80), "document", document, turns))
    for i in range(2):
        found.append((steps // 3 * (i + 1), "too long", (1,) * capacity * ranks, [((1,), 8)]))
    found.sort(key=lambda f: f[0])
    return [
        Session(number, kind, arrival, opening, tuple(turns), rng.randint(4, 40))
        for number, (arrival, kind, opening, turns) in enumerate(found)
    ]


# --- bytes


class Wire:
    """What attention sends, over all ranks and layers, for the items of one step.

    Tree, of B = 1 query row with its owner and N - 1 other ranks that hold keys (FORMULAS.md,
    "all-to-all of partials to their owners (plus sharing Q)", times N): (N-1) * H*D*e out and
    (N-1) * H*(D*e+4) back, per layer. Over M hosts (the "host tree" row) each crosses a border
    once per other host, to the rank there that stands for the owner; when that one holds no keys
    it counts as one more receiver. Rounds: one out and one back, and the same again between hosts.
    Ring pass-KV over n ranks: (n-1) * S * 2*G*D*e; pass-Q: (n-1) * T * H*D*e out, and
    T * H*(D*e+4) back from every other holder. KV whose home is not its owner: 2*G*D*e a token.
    """

    ROW_OUT = LAYERS * Q_HEADS * HEAD_DIM * ELEMENT
    ROW_BACK = LAYERS * Q_HEADS * (HEAD_DIM * ELEMENT + LSE)
    KV = LAYERS * 2 * KV_HEADS * HEAD_DIM * ELEMENT

    def __init__(self, hosts: str) -> None:
        self.hosts = hosts

    def tree_hops(self, owner: int, holders: Iterable[int]) -> tuple[int, int]:
        """(messages each way, those of them between hosts) of one row block."""
        hosts = self.hosts
        place = [r for r, host in enumerate(hosts) if host == hosts[owner]].index(owner)
        reached, crossing = set(holders) | {owner}, 0
        for host in {hosts[r] for r in reached} - {hosts[owner]}:
            there = [r for r, name in enumerate(hosts) if name == host]
            reached.add(there[place % len(there)])
            crossing += 1
        return len(reached) - 1, crossing

    def attention(self, items: Sequence[Item]) -> tuple[int, int]:
        """(bytes, bytes between hosts of tree items) of some items of one step."""
        sent = crossed = 0
        for item in items:
            owned = {s.rank: total(s.q_runs) for s in item.shards if total(s.q_runs)}
            held = self.holders(item)
            if item.mode == "tree":
                for owner, rows in owned.items():
                    hops, crossing = self.tree_hops(owner, held)
                    sent += rows * hops * (self.ROW_OUT + self.ROW_BACK)
                    crossed += rows * crossing * (self.ROW_OUT + self.ROW_BACK)
            elif item.mode == "ring":
                around = self._ring_size(item, items)
                if item.ring_pass == "kv":
                    sent += (around - 1) * (item.start + item.count) * self.KV
                else:
                    sent += (around - 1) * item.count * self.ROW_OUT
                    for owner, rows in owned.items():
                        sent += rows * len(held - {owner}) * self.ROW_BACK
        return sent, crossed

    def _ring_size(self, item: Item, items: Sequence[Item]) -> int:
        """Items of one span share a ring, of all ranks that own or hold something of any."""
        span = [s.rank for s in item.shards]
        members: set[int] = set()
        for other in items:
            same = (other.mode, other.ring_pass) == (item.mode, item.ring_pass)
            if same and [s.rank for s in other.shards] == span:
                members |= self.holders(other) | {s.rank for s in other.shards if total(s.q_runs)}
        return len(members)

    @staticmethod
    def holders(item: Item) -> set[int]:
        """Ranks with keys of the item while attention runs: KV that ships is still with owners."""
        if not item.ships:
            return {s.rank for s in item.shards if total(s.k_runs)}
        return {s.rank for s in item.shards if total(s.k_runs) > s.new or total(s.q_runs)}

    def shipped(self, item: Item) -> int:
        """Bytes of new KV that travels from its owner to its home."""
        if not item.ships:
            return 0
        stay = sum(
            len(set(positions(s.q_runs)) & set(positions(s.new_home_runs))) for s in item.shards
        )
        return (item.count - stay) * self.KV

    def rounds(self, items: Sequence[Item]) -> int:
        """Exchanges that the tree items of one step need one after the other, over all layers."""
        between = inside = False
        for item in items:
            for shard in item.shards:
                if item.mode == "tree" and total(shard.q_runs):
                    hops, crossing = self.tree_hops(shard.rank, self.holders(item))
                    between |= crossing > 0
                    inside |= hops > crossing
        return 2 * LAYERS * (between + inside)


# --- one run


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
        self.mirrors = [WorkerState(rank, BLOCK) for rank in watched or (0, len(cell.blocks) - 1)]
        self.coming: dict[int, list[tuple[Session, int]]] = {}  # step -> sessions, turn
        for session in trace:
            self.coming.setdefault(session.arrival, []).append((session, 0))
        self.live: dict[int, tuple[Request, Session, int]] = {}  # ..., turn
        self.works: list[StepWork] = []  # what the last step means for the watched ranks

    def all_steps(self, limit: int = 100_000) -> Tally:
        """Step until everybody has been served."""
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
            plan = decode_plan(encode_plan(plan))
            works = self.works = [mirror.apply(plan) for mirror in self.mirrors]
            spanning = [item for item in works[0].items if item.mode != "local"]
            for item in spanning:
                check_item(item)
            self._count(plan, spanning)
            tally.handed_over += len(works[0].handoffs)
        self._look()
        tally.steps += 1
        if plan is not None:
            for draw in works[0].draws:
                self._took(draw.sequence.number)
        return spanning

    def _arrive(self, session: Session, turn: int) -> None:
        params = SamplingParams(max_tokens=session.turns[turn][1], temperature=0, ignore_eos=True)
        try:
            request = self.scheduler.admit("", session.prompt(turn), params, seed=0)
        except CapacityError:
            self.tally.refused += 1
            return
        self.live[request.number] = request, session, turn

    def _took(self, number: int) -> None:
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
        """Tokens whose KV is stored for somebody who runs, as a share of what all ranks hold."""
        allocator, running = self.scheduler.allocator, self.scheduler.running
        blocks = sum(allocator.num_used(rank) for rank in range(len(self.cell.blocks)))
        blocks -= sum(len(held) for r in running for held in r.reserved.values())
        tokens = blocks * BLOCK - sum(r.table.open_slots for r in running if r.table)
        return tokens / allocator.capacity_tokens

    def _count(self, plan: StepPlan, spanning: Sequence[Item]) -> None:
        tally, wire = self.tally, self.wire
        streams = {n for d in plan.decodes if d.mode != "local" for n in d.requests}
        decodes = [item for item in spanning if item.sequence.number in streams]
        prompts = [item for item in spanning if item.sequence.number not in streams]
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
                    self._read(reads, shard.rank, total(shard.k_runs))
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


def make_filling(cell: Cell, seed: int) -> list[Session]:
    """A document of 1.5 ranks, then every other step a request of 1/64 to 3/16 of a rank, twice as
    many as fit; every answer goes on for as long as there is room."""
    rng, capacity = random.Random(seed), sum(cell.blocks) * BLOCK
    one = capacity // len(cell.blocks)
    lengths = [3 * one // 2]
    while sum(lengths) < 2 * capacity:
        lengths.append(rng.randint(one // 64, 3 * one // 16))
    limit = min(cell.blocks) * BLOCK  # so that mode local admits all but the document
    found = []
    for number, length in enumerate(lengths):
        question = tuple(rng.randrange(1, VOCAB) for _ in range(length))
        turns = ((question, max(limit - length, BLOCK)),)
        found.append(Session(number, "filling", 2 * number, (), turns, 0))
    return found


def fill(cell: Cell, placement: str, mode: str, seed: int) -> dict[str, Any]:
    """How full the ranks get before the first request has to wait and, when nobody new comes, until
    the first one has to give way."""
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


# --- all runs


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
    """Every policy on every cell and trace, in an order that does not depend on who is done
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
                name: value if isinstance(value, str | list) else _mean([r[name] for r in rows])
                for name, value in rows[0].items() if name != "seed"
            }
            for rows in found.values()
        ]  # fmt: skip


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return round(sum(known) / len(known), 4) if known else None


# --- what it looks like


COLUMNS: tuple[tuple[str, Callable[[dict[str, Any]], str]], ...] = (
    ("policy", lambda r: r["policy"]),
    ("stored at first wait", lambda r: _percent(r["resident_at_first_queue"])),
    ("stored at first preemption", lambda r: _percent(r["resident_at_first_preemption"])),
    ("refused", lambda r: f"{r['refused']:.0f}"),
    ("preempted", lambda r: f"{r['preemptions']:.0f}"),
    ("decode KB a token", lambda r: _kilo(r["decode_bytes_per_token"])),
    ("of it between hosts", lambda r: _kilo(r["decode_bytes_between_hosts_per_token"])),
    ("exchanges a decode step", lambda r: f"{r['exchanges_per_decode_step']:.0f}"),
    ("prefill KV shipped, MB", lambda r: f"{r['prefill_shipped_bytes'] / 1e6:.0f}"),
    ("prefix KV copied, MB", lambda r: f"{r['prefix_copied_bytes'] / 1e6:.0f}"),
    ("longest KV on a rank", lambda r: f"{r['longest_kv_on_one_rank']:.0f}"),
    ("stayed local", lambda r: _percent(r["local_share"])),
    ("prefix hits, tokens", lambda r: f"{r['prefix_hit_tokens']:.0f}"),
    ("of prompts", lambda r: _percent(r["prefix_hit_share"])),
    ("evicted", lambda r: f"{r['evictions']:.0f}"),
    ("max / mean", lambda r: f"{r['imbalance']:.2f}"),
    ("steps", lambda r: f"{r['steps']:.0f}"),
)  # fmt: skip
BEST: tuple[tuple[str, str, int], ...] = (  # figure, its name, 1 where less is better
    ("decode_bytes_per_token", "decode bytes a token", 1),
    ("exchanges_per_decode_step", "exchanges a decode step", 1),
    ("prefill_shipped_bytes", "prefill KV shipped", 1),
    ("prefix_copied_bytes", "prefix KV copied", 1),
    ("longest_kv_on_one_rank", "longest KV on a rank", 1),
    ("kv_read_by_busiest_rank", "KV that the busiest rank reads in a decode step", 1),
    ("local_share", "stayed local", -1),
    ("prefix_hit_tokens", "prefix-hit tokens", -1),
    ("imbalance", "max / mean of used blocks", 1),
    ("preemptions", "preemptions", 1),
    ("steps", "steps", 1),
)
EXPLAINED = """\
# Placement policies on the same traces

1. Each row is a mean over {seeds} seeded traces; every policy gets the same arrivals, prompts and answers, in mode auto, blocks of 16 tokens, {budget} tokens of budget a rank and step. Command: `{command}`; no clock, no device, the same files each time.
2. *Stored at first wait*, *at first preemption*: tokens whose KV is stored, as a share of what all ranks hold, when for the first time a request waits that needs more blocks than are available, and when one has to give its blocks back. Blocks promised to a prompt that is being computed are not counted, so a document that waits or has just begun makes these small; the table *Filling* shows the same without documents that come late. A dash: it did not happen.
3. *Refused*: prompts longer than all ranks together hold. *Preempted*: requests that gave way and were computed again.
4. *Decode KB a token*: what all ranks send for attention in decode steps, in 1,000 bytes by token of an answer, local ones included: (N-1) * L*H*D*e of queries and (N-1) * L*H*(D*e+4) of partials for a stream over N ranks (FORMULAS: all-to-all of partials to their owners, plus sharing Q; between hosts once per other host), SmolLM2-135M in fp32: L 30, H 9, G 3, D 64, e 4.
5. *Exchanges a decode step*: rounds one after the other, over the 30 layers: 60 when some stream spans one host, 120 when some stream spans two, 0 when none spans; all streams of a step share them.
6. *Prefill KV shipped*: new KV computed on another rank than it is stored on, 2*L*G*D*e a token; *prefix KV copied*: cached blocks copied to the rank of a request that stays local. *Longest KV on a rank*: the most tokens of one stream that one rank reads in a decode step, which bounds how much spanning helps.
7. *Stayed local*: answers that were on one rank from first to last token. *Prefix hits*: prompt tokens that were found instead of computed; *evicted*: cached blocks given away for new ones.
8. *Max / mean*: used share of the fullest rank by that of all ranks, each summed over the steps; 1 is level. *Steps*: to serve the whole trace, new sessions arrive until step {steps}."""  # noqa: E501


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.0f} %"


def _kilo(count: float) -> str:
    return f"{count / 1000:.1f}"


def wins(rows: Sequence[dict[str, Any]], figure: str, sign: int) -> dict[str, int]:
    """On how many (cell, seed) each policy is best; a tie counts for all who share it."""
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["cell"], row["seed"]), []).append(row)
    found = dict.fromkeys(POLICIES, 0)
    for group in groups.values():
        best = min(sign * row[figure] for row in group)
        for row in group:
            found[row["policy"]] += sign * row[figure] == best
    return found


def markdown(result: Result, seeds: Sequence[int], command: str) -> str:
    """The page: what is what, what one learns, and the tables."""
    lines = [EXPLAINED.format(seeds=len(seeds), budget=BUDGET, steps=STEPS, command=command)]
    lines += [f"{number}. {text}" for number, text in enumerate(learned(result), 9)]
    lines += ["", "![Used blocks of each rank](placement.svg)"]
    means = result.means()
    for cell in dict.fromkeys(row["cell"] for row in means):
        rows = [row for row in means if row["cell"] == cell]
        long = rows[0]["local_threshold"]
        about = f"blocks {', '.join(map(str, rows[0]['blocks']))}"
        if long:
            about += f"; prompts above {long:.0f} tokens span all ranks"
        table = [[show(row) for _, show in COLUMNS] for row in rows]
        lines += ["", f"## {cell}", "", f"{about}.", "", *_table([c for c, _ in COLUMNS], table)]
    lines += ["", "## Filling", "", FILLING, "", *_table(*_filling(result.fills))]
    count = len(result.rows) // len(POLICIES)
    best = [
        [name, *(str(n) for n in wins(result.rows, figure, sign).values())]
        for figure, name, sign in BEST
    ]
    lines += ["", "## Best how often", "", f"Of {count} traces, ties counted for each.", ""]
    lines += _table(["lowest, or for local and hits highest", *POLICIES], best)
    return "\n".join(lines) + "\n"


FILLING = """\
One document of 1.5 average ranks, then every other step a request of 64 to 768 tokens, none ends: \
stored share when the first has to wait, and after that (nobody new) when the first has to give \
way; in brackets, over the seeds, how often the document was refused. The row *mode local* cannot \
span."""


def _filling(fills: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    names = list(dict.fromkeys(row["cell"] for row in fills))
    kinds = list(dict.fromkeys((row["policy"], row["mode"]) for row in fills))
    body = []
    for policy, mode in kinds:
        line = ["mode local" if mode == "local" else policy]
        for name in names:
            rows = [r for r in fills if (r["cell"], r["policy"], r["mode"]) == (name, policy, mode)]
            wait, preempted = (
                _percent(_mean([r[f] for r in rows])) for f in ("at_first_wait",
                                                                "at_first_preemption")
            )  # fmt: skip
            line.append(f"{wait}, {preempted} ({sum(r['refused'] for r in rows)})")
        body.append(line)
    return ["policy", *names], body


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    rows = [head, ["---"] * len(head), *body]
    return [f"| {' | '.join(row)} |" for row in rows]


def learned(result: Result) -> list[str]:
    """What the numbers show, as numbers."""
    auto = [r for r in result.fills if r["mode"] == "auto"]
    local = [r for r in result.fills if r["mode"] == "local"]
    apart = 0.0
    for figure in ("at_first_wait", "at_first_preemption"):
        for cell, seed in {(r["cell"], r["seed"]) for r in auto}:
            some = [r[figure] for r in auto if (r["cell"], r["seed"]) == (cell, seed)]
            apart = max(apart, max(some) - min(some))
    fits = (
        f"What fits hardly depends on the policy: filling, the three differ by at most "
        f"{100 * apart:.1f} points; the first preemption comes at "
        f"{_percent(_mean([r['at_first_preemption'] for r in auto]))} stored, in mode local at "
        f"{_percent(_mean([r['at_first_preemption'] for r in local]))}."
    )
    total_of = {p: [r for r in result.rows if r["policy"] == p] for p in POLICIES}
    parts = []
    for figure, name, unit in (
        ("decode_bytes_per_token", "decode KB a token", 1e3),
        ("longest_kv_on_one_rank", "longest KV on a rank", 1),
        ("prefill_shipped_bytes", "prefill KV shipped in MB", 1e6),
        ("local_share", "stayed local in %", 0.01),
    ):
        means = [f"{(_mean([r[figure] for r in total_of[p]]) or 0) / unit:.0f}" for p in POLICIES]
        parts.append(f"{name} {' / '.join(means)}")
    count = len(result.rows) // len(POLICIES)
    bests = []
    for figure, name, sign in BEST[:1] + BEST[2:5:2]:
        found = wins(result.rows, figure, sign)
        policy = max(POLICIES, key=found.__getitem__)
        bests.append(f"{name} is lowest with {policy} in {found[policy]}")
    over = (
        f"Means over all {count} traces, {' / '.join(POLICIES)}: {'; '.join(parts)}. "
        f"Of these traces, {', '.join(bests)}; the last table has the rest."
    )
    return [fits, over]


def plot(result: Result, path: Path) -> None:
    """A row of panels per cell, one per policy: used share of each rank over steps."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "ds_cp", "svg.fonttype": "none"})
    from matplotlib import pyplot

    names = list(dict.fromkeys(cell for cell, _ in result.used))
    shown = [names[0], *(n for n in names if n != names[0] and names[0] in n)][:2]
    figure, axes = pyplot.subplots(
        len(shown), len(POLICIES), figsize=(9, 1 + 1.9 * len(shown)), sharex=True, sharey=True,
        squeeze=False, layout="constrained",
    )  # fmt: skip
    for line, cell in zip(axes, shown, strict=True):
        for axis, policy in zip(line, POLICIES, strict=True):
            used = result.used[cell, policy]
            wide = max(1, len(used) // 160)  # steps that one point is the mean of
            parts = [used[at : at + wide] for at in range(0, len(used), wide)]
            for rank in range(len(used[0])):
                axis.plot(
                    [wide * i for i in range(len(parts))],
                    [100 * sum(step[rank] for step in part) / len(part) for part in parts],
                    color=COLOURS[rank % len(COLOURS)], linewidth=0.9, label=f"rank {rank}",
                )  # fmt: skip
            axis.set_ylim(0, 103)
            axis.set_title(policy, fontsize=9)
            axis.grid(True, linewidth=0.3, color="#cccccc")
            axis.spines[["top", "right"]].set_visible(False)
        line[0].set_ylabel(f"{cell.replace(', long', f',{chr(10)}long')}\nused blocks, %",
                           fontsize=8)  # fmt: skip
    for axis in axes[-1]:
        axis.set_xlabel("step", fontsize=8)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False,
                  fontsize=8)  # fmt: skip
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def write(result: Result, out: Path, seeds: Sequence[int], args: Sequence[str]) -> None:
    """placement.json, .md and .svg in ``out``."""
    command = " ".join(["python -m benchmarks.placement", *args])
    found = {
        "command": command, "seeds": list(seeds),
        "shapes": {"layers": LAYERS, "q_heads": Q_HEADS, "kv_heads": KV_HEADS,
                   "head_dim": HEAD_DIM, "element": ELEMENT, "block_size": BLOCK},
        "means": result.means(), "rows": result.rows, "filling": result.fills,
    }  # fmt: skip
    lines = [
        f" {json.dumps(name)}: " + (
            "[\n  " + ",\n  ".join(map(json.dumps, value)) + "\n ]"
            if name in ("means", "rows", "filling") else json.dumps(value)
        )
        for name, value in found.items()
    ]  # fmt: skip
    (out / "placement.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")
    (out / "placement.md").write_text(markdown(result, seeds, command))
    plot(result, out / "placement.svg")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    result = compare(cells(), SEEDS, args.processes)
    write(result, args.out, SEEDS, [])
    short = ("cell", "policy", "decode_bytes_per_token", "longest_kv_on_one_rank", "steps")
    print(json.dumps([{name: row[name] for name in short} for row in result.means()]))


if __name__ == "__main__":
    main()
