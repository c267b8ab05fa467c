"""Decides which requests run in the next step, and where every token goes. No torch.

First come first served within a priority and a client; clients of one priority have equal shares
(``fairness``). Each step carries a token of every decoding request and, in what the budget of each
rank leaves, the next chunks of prompts. It never waits for a token's value: a draw that is under
way counts as a token, so the next step can be planned while one runs. When no rank has a block
left, the youngest request of the lowest priority is preempted, to be computed again later.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence

from ds_cp.clock import steady_time
from ds_cp.grammar.vocabulary import Vocabulary
from ds_cp.plan import StepPlan
from ds_cp.sampling_params import RequestOptions, SamplingParams
from ds_cp.scheduler.absence import fit_again
from ds_cp.scheduler.admission import Limits, check_request, fit_max_tokens
from ds_cp.scheduler.block_manager import BlockManager
from ds_cp.scheduler.decode import DecodePlanner
from ds_cp.scheduler.door import Door
from ds_cp.scheduler.draft import Draft
from ds_cp.scheduler.draining import Draining
from ds_cp.scheduler.fairness import ANSWER, Turns
from ds_cp.scheduler.forecast import Forecast, Rates
from ds_cp.scheduler.forgotten import Forgotten, unreported
from ds_cp.scheduler.host_moves import HostRules
from ds_cp.scheduler.inquest import Inquest
from ds_cp.scheduler.migration import Migration
from ds_cp.scheduler.mode_policy import ModePolicy, Seats
from ds_cp.scheduler.pacing import ChunkPacer
from ds_cp.scheduler.prefill import PrefillPlanner
from ds_cp.scheduler.queue import WaitingQueue
from ds_cp.scheduler.recovery import Flight, Recovery
from ds_cp.scheduler.request import Request
from ds_cp.scheduler.seclusion import Seclusion


class Scheduler:
    """Requests in, plans out, tokens in."""

    def __init__(
        self,
        limits: Limits,
        blocks_per_rank: Sequence[int],
        block_size: int,
        placement: str,
        layout: str,
        policy: ModePolicy,
        ring_order: Sequence[int],
        *,
        prefix_caching: bool = True,
        pacer: ChunkPacer | None = None,
        seats: Seats | None = None,
        rates: Rates = Rates(),  # noqa: B008 (frozen)
        host: HostRules | None = None,
    ) -> None:
        self.limits = limits
        self.running: list[Request] = []  # in the order of service
        forecast = Forecast(limits.max_num_seqs, len(blocks_per_rank), self.running, pacer, rates)
        self.waiting = WaitingQueue(forecast.load_of)
        self.num_preemptions = 0
        self.num_interruptions = 0
        self.block_manager = BlockManager(
            blocks_per_rank, block_size, placement, ring_order, policy, prefix_caching, seats, host
        )
        self.allocator = self.block_manager.allocator
        self.migration = Migration(self.block_manager)
        self._decode = DecodePlanner(
            limits, self.block_manager, policy, self.running, self.waiting, self._preempt_for
        )
        self._turns = Turns()
        self.door = Door(limits, self.waiting, self._turns, forecast)
        self._inquest = Inquest()
        suspects = self._inquest.suspects
        self._prefill = PrefillPlanner(
            limits, self.block_manager, policy, layout, self.running, self.waiting, self._turns,
            suspects,
        )  # fmt: skip
        self._seclusion = Seclusion(
            suspects, self.running, self.waiting, self._decode, self._prefill
        )
        self._pacer = pacer
        self._numbers = 0
        self._steps = 0
        self._ended: list[int] = []  # requests that the ranks should forget
        self._looking_back: dict[int, Request] = {}  # whose draws depend on earlier tokens
        self._in_flight: dict[int, Flight] = {}  # by step
        self._forgotten = Forgotten(limits, block_size, self._prefill.sampling)
        self._vocabulary: Vocabulary | None = None  # that the ranks are to have
        self._vocabulary_sent = False
        self._draining = Draining(self.block_manager)

    # --- requests come and go

    @property
    def largest_tokens(self) -> int:
        """The most KV one request can have here: all ranks, or the largest one if mode is local."""
        return self.block_manager.largest_tokens

    def admit(
        self,
        request_id: str,
        prompt: Sequence[int],
        params: SamplingParams,
        seed: int,
        options: RequestOptions | None = None,
        grammar: str = "",
    ) -> Request:
        """Queue a request that ``check`` has accepted, or refuse it at once: as ``fit_max_tokens``
        does, or with ``QueueFullError``. ``grammar``: as ranks compile it; ``tell_vocabulary`` was
        called.

        With ``params.n`` above 1 its ``siblings`` answer the same prompt with the seeds that
        follow.
        """
        max_tokens = self.fit_max_tokens(len(prompt), params)
        options = options or RequestOptions()
        expected_s = self.door.enter(options, params.n)
        known, answers = tuple(prompt), []
        cost = len(prompt) + params.n * min(max_tokens, ANSWER)
        turn = self._turns.take(options.client, cost, not self.has_work)
        for index in range(params.n):
            self._numbers += 1
            answers.append(Request(
                self._numbers, request_id, known, params, max_tokens,
                (seed + index + 2**63) % 2**64 - 2**63, options.priority, options.cache_salt, index,
                grammar, options.client, turn,
            ))  # fmt: skip
        first, first.siblings = answers[0], answers[1:]
        first.expected_wait_s = expected_s
        self.waiting.push(first)
        return first

    def tell_vocabulary(self, vocabulary: Vocabulary) -> None:
        """Have the next step tell the ranks what tokens spell, unless they know."""
        if self._vocabulary is None:
            self._vocabulary = vocabulary

    def check(self, prompt: Sequence[int], params: SamplingParams) -> None:
        """Raise ``RequestError`` for a request that is not acceptable; see ``check_request``."""
        check_request(self.limits, prompt, params)

    def fit_max_tokens(self, length: int, params: SamplingParams) -> int:
        """The request's ``max_tokens``, resolved; ``CapacityError`` if it can never fit here."""
        return fit_max_tokens(self.limits, self.block_manager, length, params)

    def finish(self, request: Request, reason: str, stop_reason: int | str | None = None) -> None:
        """End a request in whatever state and free its blocks."""
        if request.finish_reason is not None:
            return
        if request.table is not None:
            self._stop(request, keep=reason != "error")
            for sibling in request.siblings:  # they go on without it, as requests of their own
                if sibling.finish_reason is None:
                    self.waiting.push(sibling)
        elif request in self.waiting:
            self.waiting.remove(request)
            heirs = [r for r in request.siblings if r.finish_reason is None]
            if heirs:
                heirs[0].siblings = heirs[1:]
                self.waiting.push(heirs[0])
        request.siblings = []
        self._looking_back.pop(request.number, None)
        self._inquest.forget(request.number)
        request.finish_reason, request.stop_reason = reason, stop_reason
        request.finished_time = steady_time()

    @property
    def has_work(self) -> bool:
        """Whether a request runs or waits."""
        return bool(self.running or len(self.waiting))

    @property
    def num_in_flight(self) -> int:
        """Steps that were planned and are not known to have ended."""
        return len(self._in_flight)

    def drain(self, rank: int) -> None:
        """Empty ``rank`` while requests go on, and place nothing there; see ``Migration.drain``."""
        self.migration.drain(rank, [*self.running, *self.waiting])
        self._draining.begin(rank, self._steps)

    def is_drained(self, rank: int) -> bool:
        """Whether ``rank`` is closed and holds nothing, by the ledger: its last move may run."""
        return rank in self.block_manager.closed and self._draining.is_empty(rank)

    @property
    def ranks_draining(self) -> tuple[int, ...]:
        """Closed ranks that hold a block, or that a step in flight may still read."""
        return self._draining.ranks(self._in_flight)

    def reopen(self, rank: int) -> None:
        """Let a drained rank take KV again."""
        self.migration.reopen(rank)

    def rebalance(self) -> int:
        """Move blocks from full ranks to empty ones in the next steps; returns how many."""
        return self.migration.rebalance(self.running)

    def reset_prefix_cache(self) -> int:
        """Forget every prefix; returns how many unused blocks became free. What runs keeps its
        blocks, and enters those that it has not entered yet."""
        self.block_manager.host.tier.clear()
        return self.allocator.forget_all()

    # --- one step

    def schedule(self) -> StepPlan | None:
        """The next step, or None when nothing can run (before the steps in flight are known)."""
        budget = [self.limits.max_num_batched_tokens] * self.block_manager.num_ranks
        vocabulary = None if self._vocabulary_sent else self._vocabulary
        draft = Draft(self._steps + 1, budget, self._pacer, vocabulary)
        before = self.num_preemptions
        self.block_manager.prefix.begin_step()
        self.block_manager.host.begin(draft)
        self._draining.plan(draft.step)
        if self.migration.is_moving:
            self._move(draft)
        if self._forgotten.begin(draft) and not self._seclusion.plan(draft, bool(self._in_flight)):
            self._decode.add(draft)
            draft.allow_prompts()
            # A preempted request must not get back, in the same step, the blocks that it freed.
            self._prefill.add(draft, may_start=self.num_preemptions == before)
        self.block_manager.host.end(draft)
        if draft.is_empty:
            return None
        self._steps = draft.step
        self.door.forecast.look_again()
        self._in_flight[draft.step] = Flight.of(draft)
        if self._pacer is not None:
            self._pacer.plan(draft.num_decodes, draft.largest_work)
        self._looking_back.update((r.number, r) for r in draft.looking_back)
        plan = draft.plan(self._ended, unreported(self._looking_back.values()))
        self._ended = []
        self._vocabulary_sent = self._vocabulary is not None
        return plan

    def observe_step(self, step: int, seconds: float) -> None:
        """Report ``seconds``, the time of step ``step`` on its slowest rank. The pacer sizes the
        next chunks by it."""
        flight = self._in_flight.pop(step, Flight())
        self._inquest.done(flight)
        if self._pacer is not None:
            self._pacer.observe(seconds, flight.decodes, flight.work)

    def record_token(self, request: Request, token: int) -> str | None:
        """Append a drawn token; returns the reason when it ends the request (stop strings
        apart)."""
        request.in_flight -= 1
        request.output.append(token)
        length = len(request.output)
        request.last_token_time = steady_time()
        if length == 1:
            request.first_token_time = request.last_token_time
            self.door.began(request)
        if request.table is not None and request.num_tokens % self.allocator.block_size <= 1:
            self.block_manager.prefix.enter(request)
        reason, stop = request.end_by(token, self.limits.eos_token_ids)
        if reason is not None:
            self.finish(request, reason, stop)
            self.door.forecast.ended(length)
        return request.finish_reason

    # --- ranks that were lost

    def recover(
        self, lost: Collection[int], away: Collection[int] = ()
    ) -> tuple[list[Request], list[Request]]:
        """All ranks have forgotten their requests, and ``lost`` what they stored; no step is under
        way. What was planned and not reported counts as not done: running requests are computed
        again from there on, on ranks that are not ``away``. Returns those that are ended instead:
        whose steps end workers, and which do not fit on the ranks that are here."""
        alive = {request.number for request in (*self.running, *self.waiting)}
        guilty: list[Request] = []
        beyond: list[Request] = []
        if self.block_manager.away == frozenset(away):
            found = self._inquest.interrupted(self._in_flight.values(), alive)
            guilty = [r for r in (*self.running, *self.waiting) if r.number == found]
        else:  # ranks have come or gone, which is no request's fault
            self.block_manager.set_away(away)
            beyond = fit_again(self.block_manager, [*self.running, *self.waiting])
        for request in (*guilty, *beyond):
            self.finish(request, "error")
        reported = min(self._in_flight, default=self._steps + 1) - 1
        again = self.block_manager.host.recover((*lost, *away), reported, self.running)
        recovery = Recovery(self.block_manager, self.migration, lost, self._in_flight.values())
        self.num_interruptions += 1
        self._in_flight.clear()
        recovery.forget_prefixes()
        for request in self.waiting:  # those that were preempted with a draw under way
            request.in_flight, request.expected_wait_s = 0, None
        for request in list(self.running):
            if request in again or not recovery.rewind(request):
                self._preempt(request)
        self._forgotten.requests = deque(self.running)
        self._ended = []
        self._vocabulary_sent = False
        return guilty, beyond

    # --- preemption, moving

    def _preempt_for(self, request: Request) -> Request:
        """Preempt the last in the order of service (under mode local, on the rank of ``request``),
        and return it."""
        victim = self.running[-1]
        if self.block_manager.only_local:
            assert request.table is not None
            rank = request.table.last_rank
            here = [r for r in self.running if r.table and r.table.num_blocks(rank)]
            victim = request if rank in self.block_manager.closed or not here else here[-1]
        self._preempt(victim)
        return victim

    def _preempt(self, request: Request) -> None:
        self._stop(request, keep=True)
        self.waiting.push(request)
        request.num_preemptions += 1
        self.num_preemptions += 1

    def _stop(self, request: Request, keep: bool) -> None:
        self.running.remove(request)
        if request.table is not None:
            request.ranks_used.update(request.table.span, request.workers)
        self.block_manager.release(request, keep)
        self.migration.forget(request)
        request.prefilling, request.decode_key = True, None
        self._ended.append(request.number)

    def _move(self, draft: Draft) -> None:
        """Do a few of the moves that drain or rebalance want; make room when one is stuck."""
        moves, stuck = self.migration.transfers(self.running)
        draft.transfers += moves
        if stuck and len(self.running) > 0:
            self._preempt(self.running[-1])

    def check_integrity(self) -> None:
        """Assert that every reference has a holder, and every block one state."""
        self.block_manager.check_integrity(self.running)
        assert all(request.table is None for request in self.waiting)
        assert self.running == sorted(self.running, key=lambda r: r.order)
        assert len(set(map(id, self.running))) == len(self.running)
