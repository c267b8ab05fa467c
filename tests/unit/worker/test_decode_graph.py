"""Decode steps over static buffers, on the CPU: a graph that repeats the call it captured, and a
kernel that reads nothing but tensors, as captured ones do."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from ds_cp.attention.batch import Part, make_batch, parts_with_room
from ds_cp.attention.kernels.reference import ReferenceKernel
from ds_cp.attention.spec import LayerSpec
from ds_cp.comm.wire import World
from ds_cp.engine.llm import LLMEngine
from ds_cp.kv.pool import KVPool
from ds_cp.layout import Block, Blocks
from ds_cp.sampling_params import SamplingParams
from ds_cp.topology.hosts import Topology
from ds_cp.worker.decode_graph import (
    MARGIN,
    DecodeGraphs,
    DecodeInputs,
    Graph,
    cuda_graphs,
    padded_keys,
    padded_sizes,
)
from tests.helpers.engines import engine_on, tiny_llama

CPU = torch.device("cpu")
SIZE = 16


class TensorKernel(ReferenceKernel):
    """Knows of a batch what its tensors say, and not ``parts``."""

    capturable = True

    def paged_attention(
        self, q_THD: Any, q_positions: Any, pages: Any, batch: Any, spec: Any, into: Any = None
    ) -> Any:
        assert not batch.derived, "kept from another run"
        batch.derived["a run"] = True
        starts, bounds = batch.q_starts.tolist(), batch.block_starts.tolist()
        assert len(starts) == len(bounds) == len(batch.parts) + 1
        columns = [x.tolist() for x in (batch.blocks, batch.firsts, batch.keys)]
        parts = []
        for i, part in enumerate(batch.parts):
            blocks = Blocks(map(Block, *(c[bounds[i] : bounds[i + 1]] for c in columns)))
            assert sum(n for _, n in part.q_runs) == starts[i + 1] - starts[i] == 1
            parts.append(Part(((int(q_positions[starts[i]]), 1),), blocks))
        batch.derived.clear()
        again = make_batch(parts, CPU)
        return super().paged_attention(q_THD, q_positions, pages, again, spec, into)


class Repeated:
    """A graph: what is captured is run again, with the arguments that it had then."""

    made: list[Repeated] = []

    def __init__(self) -> None:
        self.replays = 0
        self._run: Callable[[], None] = lambda: None
        Repeated.made.append(self)

    def capture(self, run: Callable[[], None]) -> None:
        run()
        self._run = run

    def replay(self) -> None:
        self.replays += 1
        self._run()


@pytest.fixture(autouse=True)
def no_graphs() -> None:
    Repeated.made = []


# --- over random keys


def specs() -> list[LayerSpec]:
    return [
        LayerSpec(4, 2, 8, 0.3),
        LayerSpec(4, 2, 8, 0.3, window=5, sinks=torch.linspace(-1, 1, 4)),
    ]


def forward(ids: torch.Tensor, positions: torch.Tensor, step: Any) -> torch.Tensor:
    """A model of two layers of attention: the logits tell every number that went in."""
    gen = torch.Generator().manual_seed(5)
    x = torch.randn(100, 32, generator=gen)[ids[0]] + torch.sin(positions[0])[:, None]
    for layer in range(2):
        q = (x @ torch.randn(32, 32, generator=gen) / 6).view(-1, 4, 8).transpose(0, 1)[None]
        k, v = (
            (x @ torch.randn(32, 16, generator=gen) / 6).view(-1, 2, 8).transpose(0, 1)[None]
            for _ in range(2)
        )
        x = x + step.attend(layer, q, k, v)[0].flatten(1)
    return x


class Requests:
    """Sequences of random lengths over a pool of random keys, and their next steps."""

    def __init__(self, seed: int, lengths: list[int]) -> None:
        self.rng = random.Random(seed)
        self.pool = KVPool(specs(), 60, SIZE, torch.float32, CPU, scratch=True)
        gen = torch.Generator().manual_seed(seed)
        self.pool._data[:60] = torch.randn(60, self.pool.block_elements, generator=gen)
        self.free = self.rng.sample(range(60), 60)
        self.lengths = lengths
        self.blocks = [[self.free.pop() for _ in range(-(-n // SIZE))] for n in lengths]

    def step(self, which: list[int]) -> DecodeInputs:
        """One more token of each of ``which``."""
        ids, positions, blocks, places, parts = [], [], [], [], []
        for i in which:
            index, place = divmod(self.lengths[i], SIZE)
            if place == 0:
                self.blocks[i].append(self.free.pop())
            self.lengths[i] += 1
            ids.append(self.rng.randrange(100))
            positions.append(self.lengths[i] - 1)
            blocks.append(self.blocks[i][index])
            places.append(place)
            table = Blocks(
                Block(b, j * SIZE, min(SIZE, self.lengths[i] - j * SIZE))
                for j, b in enumerate(self.blocks[i])
            )
            parts.append(Part(((positions[-1], 1),), table))
        tensors = [torch.tensor(x) for x in (ids, positions, blocks, places)]
        return DecodeInputs(*tensors, make_batch(parts, CPU))


class Eager:
    """The step without buffers."""

    def __init__(self, inputs: DecodeInputs, pool: KVPool) -> None:
        self.inputs, self.pool, self.kernel = inputs, pool, ReferenceKernel()

    def attend(self, layer: int, q: Any, k: Any, v: Any) -> torch.Tensor:
        from ds_cp.attention import finish

        x, spec, pages = self.inputs, specs()[layer], self.pool.layer(layer)
        self.kernel.write(pages, k[0].transpose(0, 1), v[0].transpose(0, 1), x.blocks, x.places)
        q_THD = q[0].transpose(0, 1)
        part = self.kernel.paged_attention(q_THD, x.positions, pages, x.batch, spec)
        return finish(part, spec, q.dtype)[None]


def graphs_over(
    pool: KVPool, max_rows: int, kernel: Any = None, run: Any = forward,
    make_graph: Callable[[], Graph] = Repeated, max_blocks: int = 20,
) -> tuple[DecodeGraphs, list[str]]:  # fmt: skip
    notes: list[str] = []
    assert pool.scratch is not None
    found = DecodeGraphs(
        run, specs(), pool, kernel or TensorKernel(), pool.scratch, max_rows, max_blocks, CPU,
        make_graph, notes.append,
    )  # fmt: skip
    return found, notes


def test_steps_of_changing_company_give_the_eager_numbers() -> None:
    """Rows come and go, sequences grow over block borders; no other block is written."""
    lengths = [1, 15, 16, 17, 40, 63, 5, 100]
    ours, theirs = Requests(3, list(lengths)), Requests(3, list(lengths))
    graphs, notes = graphs_over(ours.pool, 6)
    rng = random.Random(1)
    for _ in range(30):
        which = rng.sample(range(8), rng.randint(1, 6))
        got = graphs.run(ours.step(which))
        inputs = theirs.step(which)
        want = forward(inputs.ids[None], inputs.positions[None], Eager(inputs, theirs.pool))
        assert got is not None
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ours.pool._data[:60], theirs.pool._data[:60], atol=1e-5, rtol=0)
    assert graphs.captured == [(1, 4096), (2, 4096), (4, 4096), (6, 4096)] and not notes
    assert sum(graph.replays for graph in Repeated.made) == 30


def interpreted() -> None:
    """In a process where Triton interprets (tests/dist/test_triton.py): the same, by the kernels
    that are captured."""
    from ds_cp.attention.kernels.cuda import CudaKernel
    from ds_cp.attention.kernels.triton_kernel import TritonKernel
    from ds_cp.worker import decode_graph

    lengths = [1, 15, 17, 63, 5, 520]  # the last one is split
    ours, theirs = Requests(3, list(lengths)), Requests(3, list(lengths))
    decode_graph.FEWEST_KEYS = 2048  # of this process alone, to be quick
    graphs, _ = graphs_over(ours.pool, 4, CudaKernel(TritonKernel(), (), CPU))
    for which in ([5, 0, 2], [2], [0, 3, 4, 1], [5, 3]):
        got, inputs = graphs.run(ours.step(which)), theirs.step(which)
        want = forward(inputs.ids[None], inputs.positions[None], Eager(inputs, theirs.pool))
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ours.pool._data[:60], theirs.pool._data[:60], atol=1e-5, rtol=0)
    print(graphs.captured)


def test_what_does_not_fit_runs_eagerly() -> None:
    requests = Requests(1, [20, 30, 40])
    few, _ = graphs_over(requests.pool, 2)
    assert few.run(requests.step([0, 1, 2])) is None
    short, _ = graphs_over(requests.pool, 4, max_blocks=1)
    assert short.run(requests.step([0, 1, 2])) is None
    unable, notes = graphs_over(requests.pool, 4, ReferenceKernel())
    assert unable.run(requests.step([0])) is None and unable.run(requests.step([1])) is None
    assert notes == [
        "decode steps are not captured in CUDA graphs: kernel reference, as it is set up, plans "
        "each step on the host"
    ]
    assert not Repeated.made


def test_more_keys_take_another_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ds_cp.worker.decode_graph.FEWEST_KEYS", 64)
    monkeypatch.setattr("ds_cp.worker.decode_graph.MARGIN", 16)
    requests = Requests(1, [20, 40, 200])
    graphs, _ = graphs_over(requests.pool, 4)
    for which in ([0], [1], [0, 1], [2], [0, 2], [0]):
        assert graphs.run(requests.step(which)) is not None
    assert graphs.captured == [(1, 64), (1, 256), (2, 256), (2, 1024)][:2] + [(2, 256)]


@pytest.mark.parametrize("late", [False, True])
def test_a_capture_that_fails_is_one_line(late: bool) -> None:
    class Refused(Repeated):
        def capture(self, run: Callable[[], None]) -> None:
            super().capture(run)
            if not late or len(Repeated.made) > 1:
                raise RuntimeError("operation not permitted when stream is capturing\nmore")

    requests = Requests(2, [20, 30, 40])
    graphs, notes = graphs_over(requests.pool, 4, make_graph=Refused)
    if late:
        assert graphs.run(requests.step([0])) is not None
    for _ in range(3):
        assert graphs.run(requests.step([0, 1])) is None
        assert graphs.run(requests.step([0])) is None
    assert notes == [
        "decode steps are not captured in CUDA graphs: operation not permitted when stream is "
        "capturing"
    ]


def test_padded_sizes() -> None:
    assert padded_sizes(1) == [1]
    assert padded_sizes(6) == [1, 2, 4, 6]
    assert padded_sizes(64) == [1, 2, 4, 8, 16, 32, 64]


def test_room_for_whatever_a_kernel_plans() -> None:
    """No requests with so many rows and keys have more pieces than the captured parts."""
    rng = random.Random(3)
    for _ in range(300):
        rows = rng.choice([1, 2, 5, 64])
        lengths = [rng.choice([1, rng.randint(1, 600), rng.randint(1, 70000)]) for _ in range(rows)]
        size = next(s for s in padded_sizes(64) if s >= rows)
        block = rng.choice([16, 64, 256])
        parts = parts_with_room(size, padded_keys(sum(lengths)), block)
        assert len(parts) == size and all(sum(n for _, n in p.q_runs) == 1 for p in parts)
        for piece in (128, 512, MARGIN):
            firsts = [(n - 1) // block * block for n in lengths]
            used = sum(first // piece + 1 for first in firsts)
            room = sum(
                p.blocks.firsts[-1] // piece - p.blocks.firsts[0] // piece + 1 for p in parts
            )
            assert used <= room


# --- in the engine


def alone(model: Any, device: torch.device = CPU) -> LLMEngine:
    world = World(0, Topology(("here",)), device, 60.0, joined=False)
    config: dict[str, Any] = {"kv_cache": {"tokens_per_rank": 1024, "block_size": SIZE}}
    if device.type == "cpu":
        config["attention"] = {"backend": "reference"}
    return engine_on(world, model, config)


def answers(engine: LLMEngine) -> list[Any]:
    prompts = [[1, 2, 3], [4] * 40, [7, 8], [9] * 17, [5, 6]]
    params = [
        SamplingParams(max_tokens=20, temperature=0.0, logprobs=2),
        SamplingParams(max_tokens=7, temperature=0.0),
        SamplingParams(max_tokens=20, seed=5, top_p=0.9),
        SamplingParams(max_tokens=3, temperature=0.0),
        SamplingParams(max_tokens=12, seed=1, presence_penalty=1.0, prompt_logprobs=1),
    ]
    outputs = engine.generate(prompts, params)
    return [(list(o.outputs[0].token_ids), o.outputs[0].logprobs) for o in outputs]


def with_graphs(monkeypatch: pytest.MonkeyPatch) -> LLMEngine:
    from ds_cp.kv import pool as pool_module

    init = KVPool.__init__

    def with_scratch(self: Any, *args: Any, **changes: Any) -> None:
        init(self, *args, **{**changes, "scratch": True})

    monkeypatch.setattr(pool_module.KVPool, "__init__", with_scratch)
    engine = alone(tiny_llama())
    worker = engine._worker
    object.__setattr__(worker.layers, "kernel", TensorOrWhole())
    worker.capture_decodes(4, 64, Repeated)
    return engine


def test_an_engine_with_graphs_gives_the_tokens_of_one_without(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = answers(alone(tiny_llama()))
    got = answers(with_graphs(monkeypatch))
    assert [ids for ids, _ in got] == [ids for ids, _ in plain]
    replays = sum(graph.replays for graph in Repeated.made)
    assert replays > 10, "steps of prompts and of five rows ran eagerly, the others did not"


class TensorOrWhole(TensorKernel):
    """For steps with prompts, which are not captured, the reference kernel."""

    def paged_attention(
        self, q_THD: Any, q_positions: Any, pages: Any, batch: Any, spec: Any, into: Any = None
    ) -> Any:
        if into is None:  # how a captured step asks
            return super().paged_attention(q_THD, q_positions, pages, batch, spec)
        return ReferenceKernel.paged_attention(self, q_THD, q_positions, pages, batch, spec, into)


@pytest.mark.gpu
def test_an_engine_with_cuda_graphs() -> None:
    cuda = torch.device("cuda", 0)
    engine = alone(tiny_llama().to(cuda), cuda)
    captured = answers(engine)
    graphs = engine._worker.graphs
    assert graphs is not None and graphs.decodes.captured
    engine._worker.graphs = None
    assert [ids for ids, _ in answers(engine)] == [ids for ids, _ in captured]


@pytest.mark.gpu
def test_a_captured_operation_runs_again_over_new_numbers() -> None:
    cuda = torch.device("cuda", 0)
    graph = cuda_graphs(cuda)()
    source, target = torch.zeros(3, device=cuda), torch.zeros(3, device=cuda)
    graph.capture(lambda: target.copy_(source * 2) and None)
    for number in (1.0, 5.0):
        source.fill_(number)
        graph.replay()
        assert target.tolist() == [2 * number] * 3
