"""Decode steps of requests that span, recorded and replayed: over CPU ranks by a graph that repeats
what it recorded, with exchanges that are silent while it records, as captured ones are."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from ds_cp.attention.batch import Part, make_batch
from ds_cp.attention.kernels.choose import find_kernels
from ds_cp.attention.kernels.reference import ReferenceKernel
from ds_cp.comm.pending import Pending
from ds_cp.comm.wire import World
from ds_cp.kv.pool import KVPool
from ds_cp.layout import Block, Blocks
from ds_cp.model.wiring import probe_layers
from ds_cp.sampling_params import SamplingParams
from ds_cp.worker.decode_graph import cuda_graphs
from tests.helpers.absent_peer import Steps, world_of_two
from tests.helpers.engines import engine_on, tiny_llama
from tests.helpers.ranks import run_ranks

pytestmark = pytest.mark.cpu_only("graphs that are emulated; has a test of its own marked gpu")

ROOT = Path(__file__).resolve().parents[2]
SIZE = 4
PROMPTS = [[1, 2, 3], [4] * 40, [7, 8] * 9]
NEW = [60, 64, 12]  # tokens of each


class TensorKernel(ReferenceKernel):
    """For batches with room, knows what their tensors say, and not ``parts``."""

    capturable = True

    def paged_attention(
        self, q_THD: Any, q_positions: Any, pages: Any, batch: Any, spec: Any, into: Any = None
    ) -> Any:
        starts, bounds = batch.q_starts.tolist(), batch.block_starts.tolist()
        columns = [x.tolist() for x in (batch.blocks, batch.firsts, batch.keys)]
        parts = []
        for i in range(len(batch.parts)):
            blocks = Blocks(map(Block, *(c[bounds[i] : bounds[i + 1]] for c in columns)))
            rows = starts[i + 1] - starts[i]
            runs = ((int(q_positions[starts[i]]), rows),) if rows else ()
            parts.append(Part(runs, blocks))
        again = make_batch(parts, torch.device("cpu"), starts[0])
        return super().paged_attention(q_THD, q_positions, pages, again, spec, into)


class Switch:
    """A transport that can be told to do nothing."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.silent = inner, False

    def exchange(self, sends: Any, recvs: Any, what: str) -> Pending:
        return Pending(None, what) if self.silent else self.inner.exchange(sends, recvs, what)

    def all_reduce(self, tensor: Any, what: str) -> None:
        assert not self.silent
        self.inner.all_reduce(tensor, what)

    def broadcast(self, tensor: Any, what: str) -> None:
        self.inner.broadcast(tensor, what)

    def close(self) -> None:
        self.inner.close()


class Repeated:
    """A graph. ``fails``: its recording does, when it is through with it."""

    def __init__(self, switch: Switch, ledger: Any, fails: bool) -> None:
        self.switch, self.ledger, self.fails, self.replays = switch, ledger, fails, 0
        self.run: Callable[[], None] = lambda: None
        self.released = False

    def capture(self, run: Callable[[], None]) -> None:
        run()
        self.run = run

    def record(self, run: Callable[[], None]) -> None:
        self.switch.silent = True
        try:
            run()
        finally:
            self.switch.silent = False
        if self.fails:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        self.run = run

    def release(self) -> None:
        self.released = True

    def replay(self) -> None:
        assert not self.released
        self.replays += 1
        before = {k: list(v) for k, v in self.ledger._counts.items()}
        self.run()
        self.ledger._counts = before


def spread(world: World, graphs: bool, fails: int = -1) -> Any:
    """Tokens on rank 0, then what this rank did. With ``graphs`` steps are captured, on rank
    ``fails`` in vain."""
    init = KVPool.__init__

    def with_scratch(self: Any, *args: Any, **changes: Any) -> None:
        init(self, *args, **{**changes, "scratch": True})

    KVPool.__init__ = with_scratch  # type: ignore[method-assign]
    config = {
        "kv_cache": {"tokens_per_rank": 400, "block_size": SIZE, "placement": "round_robin"},
        "context_parallel": {"mode": "tree"},
        "attention": {"backend": "reference"},
        "scheduler": {"max_num_seqs": 8},
    }
    engine = engine_on(world, tiny_llama(), config)
    worker = engine._worker
    made: list[Repeated] = []
    notes: list[str] = []
    if graphs:
        object.__setattr__(worker.layers, "kernel", TensorKernel())
        switch = Switch(worker.cp.transport)
        worker.cp.transport = switch

        def make() -> Repeated:
            made.append(Repeated(switch, world.ledger, world.rank == fails))
            return made[-1]

        worker.capture_decodes(8, 64, make, spans=True)
        worker.graphs.spans._note = notes.append
    world.ledger.clear()
    outputs = engine.generate(PROMPTS, [SamplingParams(max_tokens=n, temperature=0.0) for n in NEW])
    tokens = [list(o.outputs[0].token_ids) for o in outputs] if world.rank == 0 else None
    kinds = worker.graphs.spans.captured if worker.graphs is not None else []
    sent = {k: v for k, v in world.ledger.schemes().items() if k.startswith("tree")}
    return tokens, sent, [graph.replays for graph in made], kinds, notes


@pytest.mark.parametrize("hosts", ["aa", "aba"])
def test_replayed_steps_give_the_tokens_and_the_bytes_of_eager_ones(hosts: str) -> None:
    """Whole requests come and go beside those that span, on other ranks; blocks fill up."""
    plain = run_ranks(spread, len(hosts), False, hosts=list(hosts))
    found = run_ranks(spread, len(hosts), True, hosts=list(hosts))
    assert found[0][0] == plain[0][0]
    assert [sent for _, sent, *_ in found] == [sent for _, sent, *_ in plain]
    replays = [by_graph for _, _, by_graph, _, _ in found]
    assert sum(replays[0]) > 5 and all(some == replays[0] for some in replays)
    assert all(kinds == found[0][3] and kinds for *_, kinds, _ in found)
    assert not any(notes for *_, notes in found)


def test_a_recording_that_fails_on_one_rank_ends_it_on_all() -> None:
    plain = run_ranks(spread, 2, False)
    found = run_ranks(spread, 2, True, 1)
    assert found[0][0] == plain[0][0]
    assert [sent for _, sent, *_ in found] == [sent for _, sent, *_ in plain]
    assert [kinds for *_, kinds, _ in found] == [[], []]
    what = "decode steps of requests that span ranks are not captured in CUDA graphs: "
    assert [notes for *_, notes in found] == [
        [what + "it failed on another rank"],
        [what + "operation not permitted when stream is capturing"],
    ]


def beside_an_absent_peer(
    steps: Callable[[], Steps], make_graph: Callable[[], Any], beside: Sequence[int]
) -> Any:
    """Eager steps and replayed ones give the same logits, each with so many local requests
    ``beside``, while blocks fill up. Returns the kinds that were captured."""
    eager, replayed = steps(), steps()
    notes: list[str] = []
    graphs = replayed.graphs(make_graph, notes.append)
    for whole in beside:
        want, got = eager.run(None, whole), replayed.run(graphs, whole)
        assert len(want) > whole
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    assert not notes
    return graphs.captured


def interpreted() -> None:
    """In a process where Triton interprets: by the kernels that are captured, with the plans that
    they make for what there is room for."""
    from ds_cp.attention.kernels.triton_kernel import TritonKernel
    from ds_cp.worker import decode_graph

    decode_graph.FEWEST_KEYS = 2048  # of this process alone, to be quick
    world, model = world_of_two(torch.device("cpu")), tiny_llama(num_hidden_layers=1)
    specs = probe_layers(model)

    def steps() -> Steps:
        return Steps(model, specs, TritonKernel(), world, 2, 1, 520, 9, 8)

    switch = Switch(world.everybody.transport)
    beside = (1, 1, 1, 1, 0, 0, 0, 0, 1)
    kinds = beside_an_absent_peer(steps, lambda: Repeated(switch, world.ledger, False), beside)
    print(len(kinds))


def test_steps_by_the_triton_kernels() -> None:
    code = "from tests.dist import test_span_graph as t; t.interpreted()"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True, text=True, timeout=250,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == 2, "with and without local requests"


@pytest.mark.gpu
def test_steps_are_captured_on_one_gpu() -> None:
    """Real graphs and kernels; nothing in such a step waits for the device."""
    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    world, model = world_of_two(device), tiny_llama().to(device)
    specs = probe_layers(model)
    [kernel] = find_kernels("auto", device, model.dtype, specs, 16, check=False).kernels
    made = cuda_graphs(device)
    kinds = beside_an_absent_peer(
        lambda: Steps(model, specs, kernel, world, 4, 2, 700, 14, 16), made,
        (2, 2, 2, 2, 1, 2, 0, 0, 0, 0, 2, 1, 2, 2),
    )  # fmt: skip
    assert len(kinds) >= 2


def test_graphs_end_before_the_connections_do() -> None:
    """NCCL would wait for them for ever."""
    world, model = world_of_two(torch.device("cpu")), tiny_llama()
    specs = probe_layers(model)
    steps = Steps(model, specs, TensorKernel(), world, 2, 0, 40, 6, 16)
    made: list[Repeated] = []

    def make() -> Repeated:
        made.append(Repeated(Switch(world.everybody.transport), world.ledger, False))
        return made[-1]

    graphs = steps.graphs(make, pytest.fail)
    for _ in range(6):
        steps.run(graphs)
    assert graphs.captured and made[0].replays
    world.leave()
    assert made[0].released and not graphs.captured
    world.leave()


def on_cuda(world: World) -> Any:
    """Tokens with graphs and without, and how many kinds were captured."""
    config = {
        "kv_cache": {"tokens_per_rank": 512, "block_size": 16, "placement": "round_robin"},
        "context_parallel": {"mode": "tree"},
    }
    engine = engine_on(world, tiny_llama().to(world.device), config)
    params = [SamplingParams(max_tokens=n, temperature=0.0) for n in NEW]
    found = [engine.generate(PROMPTS, params)]
    graphs = engine._worker.graphs
    assert graphs is not None and graphs.spans is not None
    captured = len(graphs.spans.captured)
    engine._worker.graphs = None
    found.append(engine.generate(PROMPTS, params))
    return [[o.outputs[0].token_ids for o in some] for some in found], captured


@pytest.mark.gpu
@pytest.mark.skipif(
    torch.cuda.device_count() < 2,
    reason="needs two CUDA devices: there, pytest -m gpu tests/dist/test_span_graph.py",
)
def test_steps_over_nccl_are_captured() -> None:
    results = run_ranks(on_cuda, 2, device="cuda:each")
    assert all(captured for _, captured in results)
    with_graphs, without = results[0][0]
    assert with_graphs == without
