"""One rank's hands: executes one plan. No policy here."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from ds_cp.attention import Kernel, LayerSpec
from ds_cp.comm.control import Control
from ds_cp.comm.wire import Group, World
from ds_cp.engine.plan import Item, Sampled, StepPlan, decode_plan, encode_plan
from ds_cp.engine.sampling import sample
from ds_cp.engine.step import StepContext
from ds_cp.kv.pool import KVPool
from ds_cp.model.wiring import CONTEXT, Decoder


class Worker:
    """Everything one rank needs to run plans: its seat, its groups, the model, its KV.

    ``tp_rank`` 0 of each cp rank samples; all tensor-parallel ranks compute the same logits.
    """

    def __init__(
        self,
        world: World,
        cp: Group,
        tp: Group,
        model: Decoder,
        layers: Sequence[LayerSpec],
        pool: KVPool,
        kernel: Kernel,
    ) -> None:
        self.world = world
        self.control = Control(world)
        self.cp = cp
        self.tp = tp
        self.model = model
        self.layers = list(layers)
        self.pool = pool
        self.kernel = kernel
        self.model_seconds = 0.0

    def lead(self, plan: StepPlan) -> list[Sampled]:
        """Rank 0: give the plan to everybody, run my part, and return every request's token."""
        self.control.broadcast(encode_plan(plan))
        return self.run(plan)

    def follow(self) -> None:
        """Other ranks: run plans until the one that says stop."""
        while True:
            plan = decode_plan(self.control.broadcast(None))
            if plan.kind == "stop":
                return
            self.run(plan)

    def run(self, plan: StepPlan) -> list[Sampled]:
        """Run my part of a plan. Rank 0 gets all sampled tokens in the plan's order, others
        none."""
        if plan.kind != "run":
            return []
        with torch.inference_mode():
            step = StepContext(plan, self.cp, self.layers, self.pool, self.kernel)
            mine: list[Sampled] = []
            began = time.perf_counter()
            if step.num_rows:
                logits = self._forward(step)
                if self.tp.rank == 0:
                    mine = [
                        sample(item.request, logits[row], item.sampling)
                        for row, item in enumerate(step.sampled)
                        if item.sampling is not None
                    ]
            elif step.spans:
                step.attend_without_tokens(self.model.dtype, self.cp.device)
            self.model_seconds += time.perf_counter() - began
            return self._collect(plan, mine)

    def _forward(self, step: StepContext) -> torch.Tensor:
        """Logits ``[rows wanted, V]`` of the flat batch ``[1, T]``."""
        device = self.cp.device
        ids = torch.tensor([step.token_ids], dtype=torch.int64, device=device)
        positions = torch.tensor([step.positions], dtype=torch.int64, device=device)
        rows = torch.tensor(step.logit_rows, dtype=torch.int64, device=device)
        out = self.model(
            input_ids=ids, position_ids=positions, use_cache=False, logits_to_keep=rows,
            **{CONTEXT: step},
        )  # fmt: skip
        return out.logits[0]

    def _collect(self, plan: StepPlan, mine: list[Sampled]) -> list[Sampled]:
        """Bring the sampled tokens to rank 0, as fp64 rows: token, logprob, top ids, top
        logprobs."""
        wanted = [item for item in plan.items if item.sampling is not None]
        width = max((item.sampling.logprobs for item in wanted if item.sampling), default=0)
        width = max(width, 0)
        tp_size = self.tp.size
        by_owner: dict[int, list[Item]] = {}
        for item in wanted:
            by_owner.setdefault(item.last_owner * tp_size, []).append(item)
        me = self.world.rank
        rows = torch.tensor([_row(s, width) for s in mine], dtype=torch.float64)
        if me != 0:
            self.control.collect(rows, [])
            return []
        buffers = {
            owner: torch.empty(len(items), 2 + 2 * width, dtype=torch.float64)
            for owner, items in sorted(by_owner.items())
            if owner != 0
        }
        self.control.collect(rows, list(buffers.items()))
        found = {s.request: s for s in mine}
        for owner, buffer in buffers.items():
            for item, row in zip(by_owner[owner], buffer.tolist(), strict=True):
                found[item.request] = _unrow(item, row, width)
        return [found[item.request] for item in wanted]


def _row(s: Sampled, width: int) -> list[float]:
    pad = [0.0] * (width - len(s.top))
    ids = [float(token) for token, _ in s.top]
    return [float(s.token), s.logprob, *ids, *pad, *[lp for _, lp in s.top], *pad]


def _unrow(item: Item, row: list[float], width: int) -> Sampled:
    count = max(item.sampling.logprobs, 0) if item.sampling else 0
    ids, values = row[2 : 2 + width], row[2 + width :]
    top = tuple((int(t), lp) for t, lp in zip(ids[:count], values[:count], strict=True))
    return Sampled(item.request, int(row[0]), row[1], top)
