"""The benchmarks of the scheduler and of placement on tiny sizes: their figures add up, and the
bytes they count are those that the attention code hands to the wire."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import scheduler_time
from benchmarks.placement import report
from benchmarks.placement.simulate import POLICIES, Run, compare
from benchmarks.placement.traces import BLOCK, Cell, Session, make_trace
from benchmarks.placement.wire import LAYERS, Wire
from ds_cp.attention import LayerSpec
from ds_cp.attention.kernels.reference import ReferenceKernel
from ds_cp.comm.tree import Route, RowBlock
from ds_cp.kv.pool import KVPool
from ds_cp.topology.hosts import Topology
from ds_cp.worker.shipment import SCHEME_SHIP
from ds_cp.worker.state import StepWork
from ds_cp.worker.step_context import Layers, StepContext

H, G, D, E = 9, 3, 64, 4  # SmolLM2-135M, fp32
TINY = (
    Cell("3 ranks", "aaa", (24, 24, 24)),
    Cell("4 ranks on 2 hosts", "aabb", (16, 48, 16, 16)),
    Cell("4 ranks on 2 hosts, spread", "aabb", (24, 24, 24, 24), 40),
    Cell("5 ranks on 2 hosts", "aabbb", (24, 24, 24, 24, 24), 40),
)


def tiny_trace(cell: Cell) -> list[Session]:
    """Chats, conversations, a document of more than one rank, two that are refused."""
    ranks = len(cell.blocks)
    return make_trace(ranks, sum(cell.blocks) // ranks, 90, 1)


# --- placement: what is on the wire


class _Done:
    def before_work(self) -> None:
        pass

    def wait(self) -> None:
        pass


class RecordingGroup:
    """A rank's place in a job without its other ranks: the bytes that it sends are counted."""

    def __init__(self, hosts: str, rank: int) -> None:
        topology = Topology.from_hosts(hosts)
        self.rank, self.size, self.name = rank, len(hosts), "recording"
        self.hosts = tuple(topology.host_index(r) for r in range(self.size))
        self.ring = topology.ring_order()
        self.device = torch.device("cpu")
        self.bytes: Counter[str] = Counter()
        self.crossed: Counter[str] = Counter()
        self.rounds: Counter[str] = Counter()

    def exchange(self, sends: Sequence[Any], recvs: Sequence[Any], scheme: str) -> _Done:
        for _, buffer in recvs:
            buffer.zero_()
        for peer, tensor in sends:
            self.bytes[scheme] += tensor.nbytes
            if self.hosts[peer] != self.hosts[self.rank]:
                self.crossed[scheme] += tensor.nbytes
        self.rounds[scheme] += any(t.numel() for _, t in (*sends, *recvs))
        return _Done()

    def prepare(self, sends: Sequence[Any], recvs: Sequence[Any], scheme: str) -> SimpleNamespace:
        return SimpleNamespace(start=partial(self.exchange, sends, recvs, scheme))


def attend(cell: Cell, rank: int, work: StepWork) -> RecordingGroup:
    """One layer of the real step on one rank."""
    group, spec = RecordingGroup(cell.hosts, rank), LayerSpec(H, G, D, 0.125)
    pool = KVPool([spec], cell.blocks[rank], BLOCK, torch.float32, group.device)
    layers = Layers([spec], pool, ReferenceKernel(), group)  # type: ignore[arg-type]
    step = StepContext(work, layers)
    q, kv = torch.zeros(1, H, step.num_rows, D), torch.zeros(1, G, step.num_rows, D)
    step.attend(0, q, kv, kv)
    return group


@pytest.mark.parametrize("cell", TINY, ids=lambda cell: cell.name)
def test_bytes_counted_are_bytes_sent(cell: Cell) -> None:
    """Step by step, over all ranks: attention of decode and prefill, and KV that ships."""
    run = Run(cell, "balanced", tiny_trace(cell), budget=40, watched=range(len(cell.blocks)))
    tally, seen = run.tally, Counter[str]()
    while run.coming or run.live:
        before = (tally.decode_bytes, tally.prefill_bytes, tally.shipped_bytes)
        rounds, crossed = tally.exchanges, tally.decode_bytes_between_hosts
        spanning = run.step()
        if not spanning or tally.steps % 3:
            continue
        groups = [attend(cell, rank, work) for rank, work in enumerate(run.works)]
        sent = sum((group.bytes for group in groups), Counter[str]())
        shipped = sent.pop(SCHEME_SHIP, 0)
        assert LAYERS * shipped == tally.shipped_bytes - before[2]
        attention = tally.decode_bytes + tally.prefill_bytes - before[0] - before[1]
        assert LAYERS * sum(sent.values()) == attention
        seen.update(sent)
        seen["shipped"] += shipped
        if all(item.count == 1 for item in spanning):
            most = max(sum(n for s, n in g.rounds.items() if s != SCHEME_SHIP) for g in groups)
            assert most * LAYERS <= tally.exchanges - rounds <= 4 * LAYERS
            if len(set(cell.hosts)) == 1:
                assert tally.exchanges - rounds == most * LAYERS == 2 * LAYERS
            between = sum(sum(group.crossed.values()) for group in groups)
            assert LAYERS * between == tally.decode_bytes_between_hosts - crossed
    assert seen["tree_q"] and seen["tree_partials"] and seen["shipped"]
    # Prompts go by ring on one host, and on several where two ranks take part.
    assert seen["ring_pass_kv"] + seen["ring_pass_q"] or cell.hosts != "aaa"


def test_tree_hops_are_those_of_the_exchange() -> None:
    """Every owner and every set of holders on uneven hosts."""
    for hosts in ("aaaa", "aabb", "abbb", "abcab"):
        ranks = range(len(hosts))
        of_rank = [sorted(set(hosts)).index(host) for host in hosts]
        for owner in ranks:
            for held in range(1, 2 ** len(hosts)):
                holders = tuple(r for r in ranks if held >> r & 1)
                messages = crossing = 0
                for rank in ranks:
                    route = Route([RowBlock(0, owner, 1, holders)], of_rank, rank)
                    messages += len(route.away) + len(route.inside)
                    crossing += len(route.away)
                assert Wire(hosts).tree_hops(owner, holders) == (messages, crossing)


# --- placement: the figures


@pytest.mark.parametrize("policy", POLICIES)
def test_placement_figures_add_up(policy: str) -> None:
    """Against what the trace asks for, and sums made here from the scheduler's own tables."""
    cell = TINY[0]
    trace = tiny_trace(cell)
    run = Run(cell, policy, trace, budget=40, watched=range(3))
    spanning = longest = sent = 0
    while run.coming or run.live:
        before = run.tally.decode_bytes
        decoding = {r.number for r in run.scheduler.running if not r.prefilling}
        run.step()
        if not run.works:
            continue
        draws = Counter(draw.sequence.number for draw in run.works[0].draws)
        assert all(len(work.draws) == len(run.works[0].draws) for work in run.works)
        assert max(draws.values(), default=0) <= 1
        for request in run.scheduler.running:
            sequences = [state.sequences[request.number] for state in run.ranks.states]
            assert request.table is not None
            assert all(s.table.homes == request.table.homes for s in sequences)
        sent += run.tally.decode_bytes - before
        for item in run.works[0].items:
            if item.sequence.number in decoding and item.mode == "tree":
                spanning += 1
                longest = max(longest, *(s.blocks.num_keys for s in item.shards))
                before += LAYERS * (len(item.shards) - 1) * H * (2 * D * E + 4)
        assert run.tally.decode_bytes == before
        run.scheduler.check_integrity()
    figures = run.figures()
    turns = [(s, turn) for s in trace if s.kind != "too long" for turn in range(len(s.turns))]
    assert figures["finished"] == len(turns) and figures["refused"] == 2
    assert figures["answer_tokens"] == sum(s.turns[turn][1] for s, turn in turns)
    assert figures["decode_bytes_per_token"] == round(sent / figures["answer_tokens"])
    assert figures["spanning_token_share"] == round(spanning / figures["answer_tokens"], 4)
    assert 0 < longest <= figures["longest_kv_on_one_rank"] <= 24 * BLOCK
    assert figures["preemptions"] > 0 and 0 < figures["resident_at_first_preemption"] <= 1
    assert 0 < figures["prefix_hit_share"] < 1 and figures["evictions"] > 0
    assert 1 <= figures["imbalance"] <= 3
    assert len(run.tally.used) == figures["steps"]
    assert sum(run.scheduler.allocator.num_used(rank) for rank in range(3)) == 0


def test_placement_files_are_the_same_twice(tmp_path: Path) -> None:
    """Once in one process and once in two: JSON, page and picture, byte for byte."""
    pytest.importorskip("matplotlib")
    cells = TINY[::2]
    for name, processes in (("one", 1), ("two", 2)):
        (tmp_path / name).mkdir()
        result = compare(cells, (1, 2), processes, steps=40)
        report.write(result, tmp_path / name, (1, 2), [])
    names = {path.name for path in (tmp_path / "one").iterdir()}
    assert names == {"placement.json", "placement.md", "placement.svg"}
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    found = json.loads((tmp_path / "one" / "placement.json").read_text())
    assert len(found["rows"]) == len(cells) * len(POLICIES) * 2
    for row in found["means"]:
        of = [r for r in found["rows"] if (r["cell"], r["policy"]) == (row["cell"], row["policy"])]
        assert row["steps"] == sum(r["steps"] for r in of) / 2
    for figure, _, sign in report.BEST:
        wins = report.wins(found["rows"], figure, sign)
        assert sum(wins.values()) >= len(cells) * 2, "each trace has a best policy"
    fills = {(r["cell"], r["policy"], r["mode"], r["seed"]): r for r in found["filling"]}
    for (cell, policy, mode, seed), row in fills.items():
        assert 0 < row["at_first_wait"] <= 1 and 0 < row["at_first_preemption"] <= 1
        assert row["refused"] == (mode == "local"), (cell, policy, seed)


# --- scheduler time


def test_scheduler_time_on_tiny_sizes(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found = scheduler_time.measure_all((2, 4), (120, 240), (1, 3), (4, 600), steps=60)
    assert [len(found[part]) for part in ("headline", "requests", "blocks")] == [5, 4, 4]
    for row in [row for rows in found.values() for row in rows]:
        ms, per = row["ms"], row["per_step"]
        assert set(ms) == set(scheduler_time.PARTS) - (set() if per["arrivals"] else {"admit"})
        assert all(0 < t["min"] <= t["median"] <= t["p99"] for t in ms.values())
        assert ms["both"]["min"] >= ms["schedule"]["min"] + ms["record"]["min"] - 2e-4  # rounded
        assert ms["both"]["p99"] <= ms["schedule"]["p99"] + max(ms["record"]["p99"], 1e3)
        assert row["preemptions"] == 0 and per["plan_bytes"] > 0
        assert row["requests"] - 1 <= per["running"] <= row["requests"]
        # What is opened was evicted, but for blocks that ended requests left without a name.
        unnamed = 2 * per["arrivals"] + (row["requests"] + 1) / row["steps"]
        evicted = per["blocks_opened"] if row["pool"] == "evicting" else 0.0
        assert evicted - unnamed <= per["evictions"] <= evicted
    short = scheduler_time.write(found, tmp_path, ["--tiny"])
    saved = json.loads((tmp_path / "scheduler_time.json").read_text())
    assert saved["command"].endswith(" --tiny")
    for part, rows in found.items():
        assert [row["ms"] for row in saved[part]] == [row["ms"] for row in rows]
    assert short["1 ranks evicting"] == found["headline"][0]["ms"]["both"]
    assert (tmp_path / "scheduler_time.svg").read_text().count("<svg") == 1


def test_scheduler_time_keeps_blocks_in_balance() -> None:
    """After many steps the allocator still balances, and every step that ran was timed."""
    load = scheduler_time.Load(5, 300, 2, prompt=(20, 60), answer=(10, 40))
    bench = scheduler_time.Bench(load)
    row = bench.measure(100, warm=5)
    bench.scheduler.check_integrity()
    assert len(bench.times["schedule"]) == len(bench.times["both"]) == 100
    pairs = zip(bench.times["schedule"], bench.times["record"], bench.times["both"], strict=True)
    assert all(both == pytest.approx(a + b) for a, b, both in pairs)
    assert len(bench.times["admit"]) == bench.arrivals == round(100 * row["per_step"]["arrivals"])
