"""Runs plans on one rank. No policy here."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import msgspec
import torch

from ds_cp.attention import LayerSpec, PagedKernel
from ds_cp.comm.control import Control
from ds_cp.comm.failure import failing
from ds_cp.comm.pending import Pending
from ds_cp.comm.wire import Group, World
from ds_cp.kv.pool import KVPool
from ds_cp.model.wiring import CONTEXT, Decoder
from ds_cp.plan import (
    NO_GRAMMAR,
    Outcome,
    Plan,
    Sampled,
    StepPlan,
    Stop,
    Transfer,
    decode_plan,
    encode_plan,
)
from ds_cp.worker.decode_graph import DecodeGraphs, Graph
from ds_cp.worker.grammars import MASKS_S, Grammars
from ds_cp.worker.outcome import Times, pack, rows_of, unpack, width_of
from ds_cp.worker.sampler import History, Row, Score, sample_rows, score_prompt
from ds_cp.worker.state import Draw, Handoff, StepWork, WorkerState
from ds_cp.worker.step_context import Layers, StepContext

# Names in the ledger.
SCHEME_TOKEN = "next_token"
SCHEME_MOVE = "move_kv"


@dataclass(frozen=True)
class _Coming:
    """Rows of the other ranks on their way to rank 0: per cp rank, fp64 ``[rows, 2 + 2 width]``."""

    pending: Pending
    rows: dict[int, torch.Tensor]
    width: int


class Worker:
    """Everything one rank needs to run plans: its place, its groups, the model, its KV and the
    state of its requests.

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
        kernel: PagedKernel,
    ) -> None:
        self.world = world
        self.control = Control(world)
        self.cp = cp
        self.tp = tp
        self.model = model
        self.pool = pool
        self.layers = Layers(list(layers), pool, kernel, cp)
        self.state = WorkerState(cp.rank, pool.block_size)
        self.model_seconds = 0.0  # in the model's forward call, attention included
        self._graphs: DecodeGraphs | None = None
        self._histories: dict[int, History] = {}  # of requests that were penalized here
        self._grammars = Grammars(min(MASKS_S, world.timeout_s / 2))

    def capture_decodes(
        self, max_rows: int, max_blocks: int, make_graph: Callable[[], Graph]
    ) -> None:
        """From now on, steps that only decode requests which are whole here run as graphs. The pool
        has a scratch block; ``max_rows``: requests that run at once; ``max_blocks``: of one."""
        model, layers, scratch = self.model, self.layers, self.pool.scratch
        assert scratch is not None, "padded rows need a block to write to"

        def forward(ids: torch.Tensor, positions: torch.Tensor, step: Any) -> torch.Tensor:
            out = model(input_ids=ids, position_ids=positions, use_cache=False, **{CONTEXT: step})
            logits: torch.Tensor = out.logits[0]
            return logits

        self._graphs = DecodeGraphs(
            forward, layers.specs, self.pool, layers.kernel, scratch, max_rows, max_blocks,
            self.cp.device, make_graph, lambda line: print(f"ds_cp: {line}", file=sys.stderr),
        )  # fmt: skip

    def lead(self, plan: Plan) -> Outcome:
        """Rank 0: ``forward`` of a plan that was made in this process."""
        return self.forward(encode_plan(plan)) or Outcome()

    def forward(self, payload: bytes) -> Outcome | None:
        """Rank 0: give an encoded plan to all ranks as it is, run my part, and return the tokens
        that all ranks drew; None after ``Stop``. All ranks run the same decoded plan."""
        with self.failing():
            began = time.perf_counter()
            self.control.broadcast(payload)
            plan = decode_plan(payload)
            outcome = self.run(plan, began)
            return None if isinstance(plan, Stop) else outcome

    def follow(self) -> None:
        """Other ranks: run plans up to ``Stop``."""
        with self.failing():
            while True:
                plan = decode_plan(self.control.broadcast(None))
                self.run(plan)
                if isinstance(plan, Stop):
                    return

    def failing(self) -> AbstractContextManager[None]:
        """Around code whose failure, or another rank's meanwhile, ends the job; see ``failure``."""
        return failing(self.world)

    def run(self, plan: Plan, began: float | None = None) -> Outcome:
        """Run my part of a plan, which ``began`` at that ``time.perf_counter()``, or now.

        Rank 0 waits for all ranks that work in the step. It gets their tokens in the plan's order
        and the times of the slowest one; the other ranks get nothing.
        """
        if isinstance(plan, Stop):
            self.state = WorkerState(self.cp.rank, self.state.block_size)
            self._histories.clear()
            self._grammars.clear()
        if not isinstance(plan, StepPlan):
            return Outcome()
        began = time.perf_counter() if began is None else began
        before = self.model_seconds
        for number in plan.ended:
            self._histories.pop(number, None)
        self._grammars.forget(plan.ended)
        if plan.vocabulary is not None and self.tp.rank == 0:
            self._grammars.learn(plan.vocabulary)
        with torch.inference_mode():
            work = self.state.apply(plan)
            width = width_of(work)
            coming = self._expect(work, width)
            self._transfer(plan.transfers)
            self._hand_over(work.handoffs)
            self._grammars.start([draw for draw in work.draws if draw.rank == self.cp.rank])
            step = StepContext(work, self.layers)
            drawn: list[Sampled] = []
            scores: list[Score | None] = []
            if step.num_rows:
                logits = self._forward(step)
                drawn = self._draw(step, logits)
                scores = _score(step, logits)
            elif step.spans:
                step.attend_without_tokens(self.model.dtype, self.cp.device)
            self.world.wait_for_device()  # or the time would be that of launching kernels
            times = Times(time.perf_counter() - began, self.model_seconds - before)
            outcome = self._collect(plan, work, coming, pack(times, drawn, scores, width))
        # Rank 0's own time ends when all rows are in: the step did not end before.
        seconds = max(outcome.seconds, time.perf_counter() - began)
        return msgspec.structs.replace(outcome, seconds=seconds)

    def _forward(self, step: StepContext) -> torch.Tensor:
        """Logits ``[rows wanted, V]`` of the flat batch ``[1, T]``."""
        self.world.wait_for_device()
        began = time.perf_counter()
        logits = self._replay(step)
        if logits is None:
            out = self.model(
                input_ids=step.ids, position_ids=step.positions, use_cache=False,
                logits_to_keep=step.logit_rows, **{CONTEXT: step},
            )  # fmt: skip
            logits = out.logits[0]
        self.world.wait_for_device()
        self.model_seconds += time.perf_counter() - began
        return logits

    def _replay(self, step: StepContext) -> torch.Tensor | None:
        """The same from a graph, where the step can be one."""
        inputs = step.decode_inputs() if self._graphs else None
        if self._graphs is None or inputs is None:
            return None
        logits = self._graphs.run(inputs)
        return None if logits is None else logits[step.logit_rows]

    def _draw(self, step: StepContext, logits_RV: torch.Tensor) -> list[Sampled]:
        """Draw my requests' next tokens; the same on every tensor-parallel rank."""
        if not step.draws:
            return []
        drawn: list[Sampled] = []
        if self.tp.rank == 0:
            drawn = self._sample(step.draws, logits_RV[: len(step.draws)])
        tokens = [s.token for s in drawn]
        if self.tp.size > 1:
            shared = torch.tensor(tokens or [0] * len(step.draws), device=self.tp.device)
            self.tp.broadcast(shared, SCHEME_TOKEN)
            self.world.wait_for_device()
            tokens = shared.tolist()
        for draw, token in zip(step.draws, tokens, strict=True):
            draw.sequence.last = token
        return drawn

    def _sample(self, draws: Sequence[Draw], logits_RV: torch.Tensor) -> list[Sampled]:
        masks = self._grammars.masks()
        rows, lost = [], set()
        for draw in draws:
            number, how = draw.sequence.number, draw.sequence.sampling
            allowed = masks.get(number)
            if how.grammar and allowed is None:
                lost.add(number)
            rows.append(Row(number, draw.index, how, self._history(draw), allowed))
        return [
            Sampled(drawn.request, NO_GRAMMAR, 0.0) if drawn.request in lost else drawn
            for drawn in sample_rows(logits_RV, rows)
        ]

    def _history(self, draw: Draw) -> History | None:
        """The tokens before ``draw``, where its sampling penalizes them."""
        sequence = draw.sequence
        if not sequence.sampling.penalizes:
            return None
        history = self._histories.get(sequence.number)
        if history is None:
            history = self._histories[sequence.number] = History(sequence.prompt)
        history.append(sequence.outputs[history.num_output : draw.index])
        if history.num_output < draw.index:  # drawn in the step before, and not announced yet
            history.append((sequence.last,))
        return history

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
        if recvs:
            self.world.wait_for_device()
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
        me, pool = self.cp.rank, self.pool
        pairs: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for transfer in batch:
            (source, from_block), (target, to_block) = transfer.source, transfer.target
            if me in (source, target):
                pairs.setdefault((source, target), []).append((from_block, to_block))
        content = {
            pair: pool.get_blocks([b for b, _ in blocks])
            for pair, blocks in sorted(pairs.items())
            if pair[0] == me
        }
        sends = [(target, data) for (_, target), data in content.items() if target != me]
        elements = pool.block_elements
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
                pool.put_blocks([b for _, b in pairs[source, target]], data)

    def _expect(self, work: StepWork, width: int) -> _Coming | None:
        """Rank 0: start to receive the rows of the other ranks, before my own part, so that none of
        them waits for me."""
        if self.world.rank != 0:
            return None
        counts = {rank: rows_of(work, rank) for rank in work.ranks if rank != 0}
        rows = {
            rank: torch.empty(count, 2 + 2 * width, dtype=torch.float64)
            for rank, count in sorted(counts.items())
        }
        pending = self.control.expect([(r * self.tp.size, b) for r, b in rows.items()])
        return _Coming(pending, rows, width)

    def _collect(
        self, plan: StepPlan, work: StepWork, coming: _Coming | None, mine: torch.Tensor
    ) -> Outcome:
        """Bring times, drawn tokens and scores to world rank 0. Tensor-parallel ranks work in step,
        so that the first of them speaks for all."""
        if coming is None:
            if self.tp.rank == 0 and self.cp.rank in work.ranks:
                self.control.report(mine)
            return Outcome(plan.step)
        coming.pending.wait()
        rows = {0: mine.tolist(), **{rank: rows.tolist() for rank, rows in coming.rows.items()}}
        return unpack(plan.step, work, coming.width, rows)


def _score(step: StepContext, logits_RV: torch.Tensor) -> list[Score | None]:
    """Log-probabilities of my prompt tokens that are to be scored, in order; None for those of a
    request whose scoring raises (the traceback goes to stderr): it must not end the others."""
    scores: list[Score | None] = []
    at = len(step.draws)
    for sequence, first, count, _ in step.scored:
        following = sequence.tokens[first + 1 : first + 1 + count]
        try:
            scores += score_prompt(
                logits_RV[at : at + count], following, sequence.sampling.prompt_logprobs
            )
        except Exception:
            print(f"ds_cp: error: request {sequence.number} cannot be scored", file=sys.stderr)
            traceback.print_exc()
            scores += [None] * count
        at += count
    return scores
