"""Runs plans on one rank. No policy here."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import msgspec
import torch

from ds_cp.attention import LayerSpec, PagedKernel, TreeRoutes
from ds_cp.comm.control import Control
from ds_cp.comm.failure import failing
from ds_cp.comm.pending import Pending
from ds_cp.comm.wire import Group, World
from ds_cp.kv.host_store import HostStore
from ds_cp.kv.pool import KVPool
from ds_cp.log_stream import say
from ds_cp.model.wiring import CONTEXT, Decoder
from ds_cp.plan import (
    ATTENTION_SCHEMES,
    NO_GRAMMAR,
    Outcome,
    Plan,
    Sampled,
    StepPlan,
    Stop,
    decode_plan,
    encode_plan,
)
from ds_cp.worker.decode_graph import Graph
from ds_cp.worker.grammars import MASKS_S, Grammars
from ds_cp.worker.graphs import StepGraphs
from ds_cp.worker.outcome import Times, pack, rows_of, unpack, width_of
from ds_cp.worker.sampler import History, Row, Score, sample_rows
from ds_cp.worker.scored_rows import score_rows
from ds_cp.worker.span_graph import Kind
from ds_cp.worker.state import Draw, Handoff, StepWork, WorkerState
from ds_cp.worker.step_context import Layers, StepContext
from ds_cp.worker.tracing import Tracing
from ds_cp.worker.transfers import BlockMover

SCHEME_TOKEN = "next_token"  # name in the ledger


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
    ``clock``: seconds, from which a step's times are taken.
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
        store: HostStore | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.world = world
        self.clock = clock
        self.control = Control(world)
        self.cp, self.tp = cp, tp
        self.model = model
        self.pool = pool
        self.mover = BlockMover(cp, pool, store)
        self.layers = Layers(list(layers), pool, kernel, cp)
        self.state = WorkerState(cp.rank, pool.block_size)
        self.model_seconds = 0.0  # in the model's forward call, attention included
        self.graphs: StepGraphs | None = None
        self._histories: dict[int, History] = {}  # of requests that looked back here
        self._grammars = Grammars(min(MASKS_S, world.timeout_s / 2))
        self.tracing: Tracing | None = None  # what records the steps, when that is on
        self.fingerprint: tuple[str, ...] = ()  # of the model as it was loaded
        self._capture: tuple[int, int, Callable[[], Graph], bool] | None = None

    def capture_decodes(
        self, max_rows: int, max_blocks: int, make_graph: Callable[[], Graph], spans: bool = False
    ) -> None:
        """From now on, steps that only decode requests which are whole here run as graphs; with
        ``spans``, also those of requests in mode tree, on all ranks of the group. The pool has a
        scratch block; ``max_rows``: requests that run at once; ``max_blocks``: of one."""
        self._capture = max_rows, max_blocks, make_graph, spans
        self.graphs = StepGraphs(
            self.model, self.layers, self.world, max_rows, max_blocks, make_graph, spans
        )

    def enter(self, world: World, cp: Group, tp: Group) -> None:
        """Go on in another world, with the model and the KV as they are. All requests are
        forgotten: the plans to come say what of their KV counts."""
        self.give_up_trace()
        self.world, self.cp, self.tp = world, cp, tp
        self.control = Control(world)
        self.layers = replace(self.layers, group=cp, routes=TreeRoutes())
        self.mover.enter(cp)
        self._forget()
        if self._capture is not None:
            self.capture_decodes(*self._capture)

    def _forget(self) -> None:
        self.state = WorkerState(self.cp.rank, self.pool.block_size)
        self._histories.clear()
        self._grammars.clear()

    def lead(self, plan: Plan) -> Outcome:
        """Rank 0: ``forward`` of a plan that was made in this process."""
        return self.forward(encode_plan(plan)) or Outcome()

    def forward(self, payload: bytes) -> Outcome | None:
        """Rank 0: give an encoded plan to all ranks as it is, run my part, and return the tokens
        that all ranks drew; None after ``Stop``. All ranks run the same decoded plan."""
        with self.failing():
            began = self.clock()
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

    def leave(self, together: bool = True) -> None:
        """Leave the job. ``together``: every rank calls this, after ``Stop``; a trace that was
        taken is written then, unless the job has failed. Raises ``OutputError`` on rank 0 when it
        cannot be."""
        try:
            if not together or self.world.failure is not None:
                self.give_up_trace()
            elif self.tracing is not None and (line := self.tracing.write()):
                say(line)
        finally:
            self.mover.close()
            self.world.leave()

    def give_up_trace(self) -> None:
        """Say that no trace is written, since the job has failed, where one was to be."""
        if self.tracing is not None and (line := self.tracing.lost()):
            say(line)
        self.tracing = None

    def run(self, plan: Plan, began: float | None = None) -> Outcome:
        """Run my part of a plan, which ``began`` at that time of ``clock``, or now.

        Rank 0 waits for all ranks that work in the step. It gets their tokens in the plan's order
        and the times of the slowest one; the other ranks get nothing.
        """
        if isinstance(plan, Stop):
            self._forget()
        if not isinstance(plan, StepPlan):
            return Outcome()
        began = self.clock() if began is None else began
        if self.tracing is None:
            return self._step(plan, began)
        with self.tracing.step(plan.step):
            return self._step(plan, began)

    def _step(self, plan: StepPlan, began: float) -> Outcome:
        before = self._so_far()
        for number in plan.ended:
            self._histories.pop(number, None)
        self._grammars.forget(plan.ended)
        if plan.vocabulary is not None and self.tp.rank == 0:
            self._grammars.learn(plan.vocabulary)
        with torch.inference_mode():
            work = self.state.apply(plan)
            width = width_of(work)
            coming = self._expect(work, width)
            self.mover.move(plan)
            self._hand_over(work.handoffs)
            self._grammars.start([draw for draw in work.draws if draw.rank == self.cp.rank])
            step, kind = self._context(work)
            drawn: list[Sampled] = []
            scores: list[Score | None] = []
            if step.num_rows:
                logits = self._forward(step, kind)
                drawn = self._draw(step, logits)
                scores = score_rows(step, logits)
            elif self.graphs is not None and kind is not None:
                self.graphs.attend(step, kind)
            elif step.spans:
                step.attend_without_tokens(self.model.dtype, self.cp.device)
            self.world.wait_for_device()  # or the time would be that of launching kernels
            times = self._since(began, before)
            outcome = self._collect(plan, work, coming, pack(times, drawn, scores, width))
        # Rank 0's own time ends when all rows are in: the step did not end before.
        seconds = max(outcome.seconds, self.clock() - began)
        return msgspec.structs.replace(outcome, seconds=seconds)

    def _context(self, work: StepWork) -> tuple[StepContext, Kind | None]:
        """The step, and its kind where it spans ranks and may be replayed. None is replayed while
        it is traced: that would show no layer and no exchange."""
        if self.tracing is not None:
            return self.tracing.context(work, self.layers), None
        if self.graphs is not None:
            return self.graphs.context(work, self.layers)
        return StepContext(work, self.layers), None

    def _so_far(self) -> Times:
        """What ``_since`` takes from."""
        ledger = self.world.ledger
        sent = tuple(ledger.bytes_of(ATTENTION_SCHEMES))
        return Times(0.0, self.model_seconds, self.world.waits.seconds, sent)

    def _since(self, began: float, before: Times) -> Times:
        """The times of a step up to now."""
        now = self._so_far()
        sent = tuple(b - a for a, b in zip(before.sent, now.sent, strict=True))
        seconds, model_seconds = self.clock() - began, now.model_seconds - before.model_seconds
        waited = now.waited - before.waited
        return Times(seconds, model_seconds, waited, sent, self.mover.num_failed)

    def _forward(self, step: StepContext, kind: Kind | None) -> torch.Tensor:
        """Logits ``[rows wanted, V]`` of the flat batch ``[1, T]``."""
        self.world.wait_for_device()
        began = self.clock()
        logits = None
        if self.graphs is not None and self.tracing is None:
            logits = self.graphs.replay(step, kind)
        if logits is None:
            out = self.model(
                input_ids=step.ids, position_ids=step.positions, use_cache=False,
                logits_to_keep=step.logit_rows, **{CONTEXT: step},
            )  # fmt: skip
            logits = out.logits[0]
        self.world.wait_for_device()
        self.model_seconds += self.clock() - began
        return logits

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
