"""Decode steps of one rank of two whose peer is not there: what it would send is zeros.

The numbers are not those of a model, but they follow from the step alone, and every operation on
this rank is one of a step that spans ranks. So one GPU shows whether such steps can be captured,
and what a replay saves; over NCCL it takes two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from ds_cp.attention import LayerSpec, PagedKernel
from ds_cp.comm.pending import Pending
from ds_cp.comm.wire import World
from ds_cp.kv.pool import KVPool
from ds_cp.model.wiring import CONTEXT
from ds_cp.plan import Begin, Decodes, Sampling, StepPlan
from ds_cp.topology.hosts import Topology
from ds_cp.worker.decode_graph import Graph
from ds_cp.worker.span_graph import SpanGraphs
from ds_cp.worker.state import WorkerState
from ds_cp.worker.step_context import Layers, StepContext


class Absent:
    """Carries nothing, in the order of the current stream. See ``Transport``."""

    def exchange(self, sends: Any, recvs: Any, what: str) -> Pending:
        for _, tensor in recvs:
            tensor.zero_()
        return Pending(None, what)

    def all_reduce(self, tensor: torch.Tensor, what: str) -> None: ...

    def broadcast(self, tensor: torch.Tensor, what: str) -> None: ...

    def close(self) -> None: ...


def world_of_two(device: torch.device) -> World:
    """Rank 0's; its group of all has both ranks."""
    world = World(0, Topology(("here", "here")), device, 60.0, joined=False, backend="nccl")
    world.everybody.transport = world.everybody.on_device = Absent()
    return world


class Steps:
    """Requests of ``length`` tokens over random keys: ``spanning`` ones, their blocks dealt out to
    both ranks in turn, which own their next tokens half and half, and ``whole`` ones on rank 0.
    ``model``: wired; ``most``: steps that there is room for."""

    def __init__(
        self, model: Any, specs: Sequence[LayerSpec], kernel: PagedKernel, world: World,
        spanning: int, whole: int, length: int, most: int, block_size: int,
    ) -> None:  # fmt: skip
        self.world, self.model, self.whole, self.spanning = world, model, whole, spanning
        count, size = spanning + whole, block_size
        blocks = -(-(length + most) // size)
        self.pool = KVPool(
            specs, count * blocks, size, model.dtype, world.device, kernel.packed, scratch=True
        )
        seed = torch.Generator(world.device).manual_seed(7)
        self.pool._data.normal_(generator=seed)
        self.layers = Layers(list(specs), self.pool, kernel, world.everybody)
        self.state = WorkerState(0, size)
        self._free = iter(range(count * blocks))
        vocabulary, tokens = model.config.vocab_size, length + most
        self.state.apply(
            StepPlan(
                0,
                begins=tuple(
                    Begin(
                        n, tuple((31 * i + n) % vocabulary for i in range(tokens)), tokens,
                        tuple(self._home(n, i) for i in range(-(-length // size))), length,
                        Sampling(),
                    )
                    for n in range(count)
                ),
            )
        )  # fmt: skip
        self._step = 0

    def _home(self, request: int, index: int) -> tuple[int, int]:
        rank = (request + index) % 2 if request < self.spanning else 0
        return rank, next(self._free)

    def forward(self, ids: torch.Tensor, positions: torch.Tensor, step: Any) -> torch.Tensor:
        """Logits ``[T, V]``."""
        out = self.model(input_ids=ids, position_ids=positions, use_cache=False, **{CONTEXT: step})
        found: torch.Tensor = out.logits[0]
        return found

    def graphs(self, make_graph: Callable[[], Graph], note: Callable[[str], None]) -> SpanGraphs:
        """What captures such steps."""
        count = self.spanning + self.whole
        return SpanGraphs(
            self.forward, self.layers, self.world, self.model.dtype, count, make_graph, note
        )

    @torch.inference_mode()
    def run(self, graphs: SpanGraphs | None, whole: int | None = None) -> torch.Tensor:
        """One more token of each request that spans and of the first ``whole`` others (all):
        logits of rank 0's, in the order of the requests."""
        self._step += 1
        spanning = tuple(range(self.spanning))
        others = self.spanning + (self.whole if whole is None else whole)
        alone = tuple(range(self.spanning, others))
        plan = StepPlan(
            self._step, grown=tuple(self._grown((*spanning, *alone))),
            decodes=(Decodes("local", "", alone), Decodes("tree", "kv", spanning)),
        )  # fmt: skip
        work = self.state.apply(plan)
        kind = None if graphs is None else graphs.kind(work)
        if graphs is None or kind is None:
            step = StepContext(work, self.layers)
            logits: torch.Tensor | None = self.forward(step.ids, step.positions, step)
        else:
            step = StepContext(work, self.layers, graphs.padding(kind))
            logits = graphs.run(kind, step)
        assert logits is not None
        return logits[step.logit_rows]

    def _grown(self, requests: Sequence[int]) -> Iterator[tuple[int, tuple[int, int]]]:
        for n in requests:
            table = self.state.sequences[n].table
            if not table.open_slots:
                yield n, self._home(n, len(table.homes))
