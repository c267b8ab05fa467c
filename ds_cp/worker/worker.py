"""One rank's hands: executes plans. No policy here."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from ds_cp.attention import Kernel, LayerSpec
from ds_cp.comm.control import Control
from ds_cp.comm.wire import Group, World
from ds_cp.kv.pool import KVPool
from ds_cp.model.wiring import CONTEXT, Decoder
from ds_cp.plan import (
    Outcome,
    Plan,
    Sampled,
    StepPlan,
    Stop,
    Transfer,
    decode_plan,
    encode_plan,
)
from ds_cp.worker.outcome import Top, pack, rows_of, unpack, width_of
from ds_cp.worker.sampler import Row, sample_rows, score_prompt
from ds_cp.worker.state import Handoff, StepWork, WorkerState
from ds_cp.worker.step_context import StepContext

SCHEME_TOKEN = "next_token"
SCHEME_MOVE = "move_kv"


class Worker:
    """Everything one rank needs to run plans: its seat, its groups, the model, its KV and the state
    of its requests.

    ``tp_rank`` 0 of each cp rank draws; all tensor-parallel ranks compute the same logits.
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
        block_size: int,
    ) -> None:
        self.world = world
        self.control = Control(world)
        self.cp = cp
        self.tp = tp
        self.model = model
        self.layers = list(layers)
        self.pool = pool
        self.kernel = kernel
        self.state = WorkerState(cp.rank, block_size)
        self.model_seconds = 0.0  # in the model's forward call, attention included

    def lead(self, plan: Plan) -> Outcome:
        """Rank 0: ``forward`` of a plan that was made in this process."""
        return self.forward(encode_plan(plan)) or Outcome()

    def forward(self, payload: bytes) -> Outcome | None:
        """Rank 0: give an encoded plan to all ranks as it is, run my part, and return the tokens
        that all ranks drew; None after ``Stop``. All ranks run the same decoded plan."""
        began, before = time.perf_counter(), self.model_seconds
        self.control.broadcast(payload)
        plan = decode_plan(payload)
        outcome = self.run(plan)
        if isinstance(plan, Stop):
            return None
        return Outcome(
            outcome.step, outcome.sampled, outcome.scored, time.perf_counter() - began,
            self.model_seconds - before,
        )  # fmt: skip

    def follow(self) -> None:
        """Other ranks: run plans up to ``Stop``."""
        while True:
            plan = decode_plan(self.control.broadcast(None))
            self.run(plan)
            if isinstance(plan, Stop):
                return

    def run(self, plan: Plan) -> Outcome:
        """Run my part of a plan. Rank 0 gets all drawn tokens in the plan's order, others none."""
        if isinstance(plan, Stop):
            self.state = WorkerState(self.cp.rank, self.state.block_size)
        if not isinstance(plan, StepPlan):
            return Outcome()
        with torch.inference_mode():
            work = self.state.apply(plan)
            self._transfer(plan.transfers)
            self._hand_over(work.handoffs)
            step = StepContext(work, self.cp, self.layers, self.pool, self.kernel)
            drawn: list[Sampled] = []
            scores: list[tuple[float, Top]] = []
            if step.num_rows:
                began = time.perf_counter()
                logits = self._forward(step)
                self.model_seconds += time.perf_counter() - began
                drawn = self._draw(step, logits)
                scores = _score(step, logits)
            elif step.spans:
                step.attend_without_tokens(self.model.dtype, self.cp.device)
            return self._collect(plan, work, drawn, scores)

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

    def _draw(self, step: StepContext, logits_RV: torch.Tensor) -> list[Sampled]:
        """Draw my requests' next tokens; the same on every tensor-parallel rank."""
        if not step.draws:
            return []
        drawn: list[Sampled] = []
        if self.tp.rank == 0:
            rows = []
            for draw in step.draws:
                sequence, how = draw.sequence, draw.sequence.sampling
                prompt: Sequence[int] = ()
                output: Sequence[int] = ()
                if how.looks_back:
                    known = sequence.outputs[: draw.index]
                    output = known if len(known) == draw.index else [*known, sequence.last]
                    prompt = sequence.prompt
                rows.append(Row(sequence.number, draw.index, how, prompt, output))
            drawn = sample_rows(logits_RV[: len(rows)], rows)
        tokens = [s.token for s in drawn]
        if self.tp.size > 1:
            shared = torch.tensor(tokens or [0] * len(step.draws), device=self.tp.device)
            self.tp.broadcast(shared, SCHEME_TOKEN)
            tokens = shared.tolist()
        for draw, token in zip(step.draws, tokens, strict=True):
            draw.sequence.last = token
        return drawn

    def _hand_over(self, handoffs: Sequence[Handoff]) -> None:
        """Tokens drawn on one rank that this step computes on another, one message per pair."""
        me, device = self.cp.rank, self.cp.device
        going: dict[int, list[Handoff]] = {}
        coming: dict[int, list[Handoff]] = {}
        for handoff in handoffs:
            if handoff.source == me:
                going.setdefault(handoff.target, []).append(handoff)
            elif handoff.target == me:
                coming.setdefault(handoff.source, []).append(handoff)
        sends = [
            (peer, torch.tensor([h.sequence.last for h in some], device=device))
            for peer, some in sorted(going.items())
        ]
        recvs = [
            (peer, torch.empty(len(some), dtype=torch.int64, device=device))
            for peer, some in sorted(coming.items())
        ]
        if sends or recvs:
            self.cp.exchange(sends, recvs, SCHEME_TOKEN).wait()
        for peer, tokens in recvs:
            for handoff, token in zip(coming[peer], tokens.tolist(), strict=True):
                handoff.sequence.last = token

    def _transfer(self, transfers: Sequence[Transfer]) -> None:
        """Copy blocks, here or between ranks. All sources of a batch are read before any target is
        written; a block that was written is read, or written again, in a later batch."""
        batch: list[Transfer] = []
        written: set[tuple[int, int]] = set()
        for transfer in transfers:
            if transfer.source in written or transfer.target in written:
                self._transfer_batch(batch)
                batch, written = [], set()
            batch.append(transfer)
            written.add(transfer.target)
        if batch:
            self._transfer_batch(batch)

    def _transfer_batch(self, batch: Sequence[Transfer]) -> None:
        me, size, pool = self.cp.rank, self.state.block_size, self.pool
        pairs: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for transfer in batch:
            (source, from_block), (target, to_block) = transfer.source, transfer.target
            if me in (source, target):
                pairs.setdefault((source, target), []).append((from_block, to_block))
        content = {
            pair: pool.get_blocks([b for b, _ in blocks], size)
            for pair, blocks in sorted(pairs.items())
            if pair[0] == me
        }
        sends = [(target, data) for (_, target), data in content.items() if target != me]
        elements = pool.block_elements(size)
        recvs = [
            (source, torch.empty(len(blocks), elements, dtype=pool.dtype, device=self.cp.device))
            for (source, target), blocks in sorted(pairs.items())
            if target == me and source != me
        ]
        if sends or recvs:
            self.cp.exchange(sends, recvs, SCHEME_MOVE).wait()
        content.update({(source, me): data for source, data in recvs})
        for (source, target), data in content.items():
            if target == me:
                pool.put_blocks([b for _, b in pairs[source, target]], size, data)

    def _collect(
        self,
        plan: StepPlan,
        work: StepWork,
        drawn: Sequence[Sampled],
        scores: Sequence[tuple[float, Top]],
    ) -> Outcome:
        """Bring the drawn tokens and the scores to world rank 0."""
        if not work.draws and not work.scored:
            return Outcome(plan.step)
        width = width_of(work)
        mine = pack(drawn, scores, width) if self.tp.rank == 0 else torch.empty(0)
        if self.world.rank != 0:
            self.control.collect(mine, [])
            return Outcome(plan.step)
        counts = {rank: rows_of(work, rank) for rank in range(self.cp.size)}
        buffers = {
            rank: torch.empty(count, 2 + 2 * width, dtype=torch.float64)
            for rank, count in counts.items()
            if rank != 0 and count
        }
        self.control.collect(mine, [(r * self.tp.size, b) for r, b in buffers.items()])
        rows = {0: mine.tolist(), **{rank: buffer.tolist() for rank, buffer in buffers.items()}}
        return Outcome(plan.step, *unpack(work, width, rows))


def _score(step: StepContext, logits_RV: torch.Tensor) -> list[tuple[float, Top]]:
    """Log-probabilities of the prompt tokens that are wanted, of my rows, in order."""
    scores: list[tuple[float, Top]] = []
    at = len(step.draws)
    for sequence, first, count, _ in step.scored:
        following = sequence.tokens[first + 1 : first + 1 + count]
        scores += score_prompt(
            logits_RV[at : at + count], following, sequence.sampling.prompt_logprobs
        )
        at += count
    return scores
