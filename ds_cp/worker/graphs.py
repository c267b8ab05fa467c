"""Steps of a worker that are replayed as CUDA graphs: of requests that are whole on a rank, and of
those that span ranks."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch

from ds_cp.comm.wire import World
from ds_cp.model.wiring import CONTEXT, Decoder
from ds_cp.worker.decode_graph import DecodeGraphs, Graph
from ds_cp.worker.span_graph import Kind, SpanGraphs
from ds_cp.worker.state import StepWork
from ds_cp.worker.step_context import Layers, StepContext


class StepGraphs:
    """``max_rows``: requests that run at once; ``max_blocks``: of one; ``spans``: steps with
    requests in mode tree too, on all ranks of the group. The pool has a scratch block."""

    def __init__(
        self,
        model: Decoder,
        layers: Layers,
        world: World,
        max_rows: int,
        max_blocks: int,
        make_graph: Callable[[], Graph],
        spans: bool,
    ) -> None:
        pool = layers.pool
        assert pool.scratch is not None, "padded rows need a block to write to"

        def forward(ids: torch.Tensor, positions: torch.Tensor, step: Any) -> torch.Tensor:
            out = model(input_ids=ids, position_ids=positions, use_cache=False, **{CONTEXT: step})
            logits: torch.Tensor = out.logits[0]
            return logits

        def note(line: str) -> None:
            print(f"ds_cp: {line}", file=sys.stderr)

        self.decodes = DecodeGraphs(
            forward, layers.specs, pool, layers.kernel, pool.scratch, max_rows, max_blocks,
            layers.group.device, make_graph, note,
        )  # fmt: skip
        self.spans = (
            SpanGraphs(forward, layers, world, model.dtype, max_rows, make_graph, note)
            if spans
            else None
        )

    def context(self, work: StepWork, layers: Layers) -> tuple[StepContext, Kind | None]:
        """The step, and its kind where it is one that spans ranks and may be replayed."""
        kind = self.spans.kind(work) if self.spans is not None else None
        padding = self.spans.padding(kind) if self.spans is not None and kind else None
        return StepContext(work, layers, padding), kind

    def replay(self, step: StepContext, kind: Kind | None) -> torch.Tensor | None:
        """Logits ``[rows wanted, V]`` of a step with rows, where it can be replayed."""
        if self.spans is not None and kind is not None:
            logits = self.spans.run(kind, step)
            assert logits is not None, "the step has rows"
            return logits[step.logit_rows]
        inputs = step.decode_inputs()
        logits = None if inputs is None else self.decodes.run(inputs)
        return None if logits is None else logits[step.logit_rows]

    def attend(self, step: StepContext, kind: Kind) -> None:
        """This rank's part of a step in which it has no rows."""
        assert self.spans is not None
        self.spans.run(kind, step)
