"""Rank 0's engine without processes: requests become step plans, step outcomes become deltas."""

from __future__ import annotations

import logging
import secrets
from collections import deque
from collections.abc import Collection, Sequence
from typing import Any

from ds_cp.clock import steady_time
from ds_cp.engine.blame import log_blame
from ds_cp.engine.calls import Answer, Call
from ds_cp.engine.detokenize import Detokenizer, IncrementalDetokenizer, start_text
from ds_cp.engine.host_counts import host_counts
from ds_cp.engine.interface import EngineStats
from ds_cp.engine.picture import MAX_RECENT, EndedPicture
from ds_cp.engine.request_picture import ended_picture
from ds_cp.engine.resumed import read_again, resume
from ds_cp.engine.tally import Tally
from ds_cp.engine.wire_model import WireModel
from ds_cp.errors import CapacityError, GrammarBusyError, IntegrityError, RequestError
from ds_cp.grammar.checker import GrammarChecker
from ds_cp.grammar.constraint import FIELD
from ds_cp.kv.table import SequenceTable
from ds_cp.outputs import Delta, PackedLogprobs, PromptProgress, TokenLogprob, pack_logprob
from ds_cp.plan import NO_GRAMMAR, Chunk, Decodes, Outcome, Sampled, Scored, StepPlan
from ds_cp.sampling_params import RequestOptions, SamplingParams
from ds_cp.scheduler.absence import refusal
from ds_cp.scheduler.request import Request
from ds_cp.scheduler.scheduler import Scheduler

logger = logging.getLogger("ds_cp.engine")

StepItems = tuple[tuple[Chunk, ...], tuple[Decodes, ...]]  # what a step computes


class EngineCore:
    """Owns the scheduler and every live request's text.

    One thread at a time may call it. Between ``plan`` and ``apply``, while the ranks work, the
    caller may add and abort requests and plan the next step.
    """

    def __init__(
        self, scheduler: Scheduler, tokenizer: Any | None, wire: WireModel | None = None
    ) -> None:
        """``wire``: predicts the bytes of exchanges, for metrics."""
        self.scheduler = scheduler
        self.grammars = GrammarChecker(tokenizer)
        self._detokenizer = None if tokenizer is None else Detokenizer(tokenizer)
        self._calls: dict[str, Call] = {}
        self._answers: dict[int, Answer] = {}
        self._prompt_tokens = 0
        self._generation_tokens = 0
        self._steps = 0
        self._empty_plans = 0  # consecutive empty plans while requests were pending
        self._finished: dict[str, int] = {}
        self.tally = Tally(len(scheduler.allocator.blocks_per_rank), wire)
        self.last_items: StepItems = ((), ())  # of the newest step
        self.recent: deque[EndedPicture] = deque(maxlen=MAX_RECENT)

    def add(
        self,
        request_id: str,
        prompt: Sequence[int],
        params: SamplingParams,
        options: RequestOptions | None = None,
        grammar: str = "",
    ) -> list[Request]:
        """Queue a request that ``check`` has accepted. Draws a seed when none is given. Returns its
        ``params.n`` answers. ``grammar``: of ``grammars.check`` under ``structured_outputs``.

        Raises ``CapacityError``, ``QueueFullError``, or ``RequestError`` for an id in use and for a
        prompt that the tokenizer cannot decode.
        """
        if request_id in self._calls:
            raise RequestError(f"a request with id {request_id!r} is already running")
        texts = [start_text(self._detokenizer, prompt, params) for _ in range(params.n)]
        known = options.known if options else ()
        read_again(texts, params, known)
        assert bool(grammar) == (params.structured_outputs is not None), "check the grammar first"
        if grammar:
            self.scheduler.tell_vocabulary(self.grammars.vocabulary)
        seed = params.seed if params.seed is not None else secrets.randbits(62)
        first = self.scheduler.admit(request_id, prompt, params, seed, options, grammar)
        call = self._calls[request_id] = Call(request_id, options.http_id if options else "")
        self.tally.grammar_requests += params.n if grammar else 0
        for request, text in zip((first, *first.siblings), texts, strict=True):
            answer = self._answers[request.number] = Answer(call, request, text)
            call.answers.append(answer)
        self._prompt_tokens += len(prompt)
        requests = [answer.request for answer in call.answers]
        for answer in resume(self.scheduler, call, known):
            self._forget(answer)
        return requests

    def check(self, prompt: Sequence[int], params: SamplingParams) -> None:
        """Raise ``RequestError``, with its field, for a request that is not acceptable. Linear in
        the prompt; reads nothing that changes, so it needs no lock."""
        if params.stop and self._detokenizer is None:
            raise RequestError("stop strings need a tokenizer; this engine has none", "stop")
        self.scheduler.check(prompt, params)

    def close(self) -> None:
        """End the process that compiles grammars, if there is one."""
        self.grammars.close()

    def grammar_of(self, params: SamplingParams) -> str:
        """The grammar for ``add``, "" where none is asked for. Compiles it, which may take seconds;
        needs no lock. Raises ``RequestError``."""
        if params.structured_outputs is None:
            return ""
        try:
            return self.grammars.check(params.structured_outputs)
        except GrammarBusyError as err:
            raise RequestError(str(err), FIELD) from err

    def abort(self, request_id: str) -> bool:
        """End a request, all its answers, and free its blocks; False when there is no such request
        (any more)."""
        call = self._calls.get(request_id)
        if call is None:
            return False
        for answer in reversed(list(call.answers)):
            self.scheduler.finish(answer.request, "abort")
            self._forget(answer)
        return True

    def progress(self, request_id: str) -> PromptProgress | None:
        """How far the prompt has come; None before it starts, after its first token, and for a
        request that is not here (any more)."""
        call = self._calls.get(request_id)
        request = call.answers[0].request if call is not None else None
        if request is None or request.first_scheduled_time is None or request.output:
            return None
        total = len(request.prompt)
        seconds = max(0.0, steady_time() - request.first_scheduled_time)
        processed = min(request.num_computed, total)
        return PromptProgress(total, request.cached_tokens or 0, processed, seconds)

    @property
    def has_work(self) -> bool:
        """Whether a request runs or waits."""
        return self.scheduler.has_work

    def plan(self) -> StepPlan | None:
        """The next step, or None when nothing can run before the steps in flight have ended.

        Raises ``IntegrityError`` when requests are pending, nothing is in flight and the scheduler
        plans nothing several times in a row: the caller would ask for ever.
        """
        plan = self.scheduler.schedule()
        # One empty plan proves nothing: a step may only have preempted a request.
        stuck = plan is None and self.has_work and not self.scheduler.num_in_flight
        self._empty_plans = self._empty_plans + 1 if stuck else 0
        if self._empty_plans > self.scheduler.limits.max_num_seqs:
            raise IntegrityError(
                f"{len(self.scheduler.running)} requests run "
                f"and {len(self.scheduler.waiting)} wait, but no step comes of it, "
                f"asked {self._empty_plans} times in a row (this is a fault of ds_cp)"
            )
        if plan is not None:
            self._steps += 1
            self.last_items = plan.chunks, plan.decodes
            self.tally.plan(plan, self._table_of)
        return plan

    def _table_of(self, number: int) -> SequenceTable | None:
        answer = self._answers.get(number)
        return None if answer is None else answer.request.table

    def apply(self, outcome: Outcome) -> list[Delta]:
        """What a step's tokens add: one delta for each answer that is still live."""
        self.scheduler.observe_step(outcome.step, outcome.seconds)
        self.tally.step(outcome)
        self.scheduler.block_manager.host.observe(outcome.ranks)
        for scored in outcome.scored:
            self._record_scores(scored)
        deltas = []
        for number in outcome.failed:
            answer = self._answers.get(number)
            if answer is not None:
                deltas.append(self._fail(answer))
        for sampled in outcome.sampled:
            answer = self._answers.get(sampled.request)
            if answer is not None:
                deltas.append(self._extend(answer, sampled))
        return deltas

    def _record_scores(self, scored: Scored) -> None:
        answer = self._answers.get(scored.request)
        if answer is not None and not answer.call.sent_prompt:
            prompt = answer.request.prompt
            for position, (logprob, top) in enumerate(scored.rows, scored.start):
                item = TokenLogprob(prompt[position], logprob, top)
                answer.call.scores[position] = pack_logprob(item)

    def _extend(self, answer: Answer, got: Sampled) -> Delta:
        """Add one token to an answer."""
        request, call = answer.request, answer.call
        if got.token < 0:  # nothing could be drawn: this request ends, the others go on
            return self._fail(answer, FIELD if got.token == NO_GRAMMAR else None)
        self._generation_tokens += 1
        offset = answer.text.length if answer.text is not None else 0
        reason = self.scheduler.record_token(request, got.token)
        text, stop_reason = "", request.stop_reason
        if answer.text is not None:
            try:
                text = self._decode(answer, answer.text, got.token, reason)
            except Exception as err:  # whatever a tokenizer raises ends this request alone
                logger.error(
                    "request %s: the tokenizer cannot decode token %d (%s: %s)",
                    request.request_id, got.token, type(err).__name__, err,
                )  # fmt: skip
                return self._fail(answer)
            if answer.text.stopped_by is not None and reason != "stop":
                stop_reason = answer.text.stopped_by
                if reason is None:
                    self.scheduler.finish(request, "stop", stop_reason)
                else:
                    request.finish_reason, request.stop_reason = "stop", stop_reason
                reason = "stop"
        logprobs = None
        if request.params.logprobs is not None:
            logprobs = (TokenLogprob(got.token, got.logprob, got.top, offset),)
        cached, scores = None, None
        if not call.sent_prompt and request.index == 0:
            call.sent_prompt = True
            cached, scores = request.cached_tokens or 0, self._scores(request, call)
            call.scores = {}  # the caller has them now: many megabytes for a long prompt
        if reason is not None:
            self._forget(answer)
        return Delta(
            request.request_id, (got.token,), text, logprobs, reason, stop_reason,
            request.index, cached, scores,
        )  # fmt: skip

    @staticmethod
    def _decode(
        answer: Answer, text: IncrementalDetokenizer, token: int, reason: str | None
    ) -> str:
        """What a token adds to the text; all that is left when ``reason`` says that it is the last.
        The token that ended the request is no part of the text."""
        params = answer.request.params
        # As vLLM has it: a stop string counts once min_tokens tokens came before its last one.
        may_stop = len(answer.request.output) > params.min_tokens
        added = text.push(token, may_stop) if reason != "stop" else ""
        return added + text.flush(may_stop) if reason is not None else added

    def _fail(self, answer: Answer, field: str | None = None) -> Delta:
        """End one answer with ``error``. ``field``: of the request, or what is at fault."""
        request = answer.request
        self.scheduler.finish(request, "error")
        request.finish_reason, request.stop_reason = "error", field  # also where it had ended
        self._forget(answer)
        return Delta(
            request.request_id, finish_reason="error", stop_reason=field, index=request.index
        )

    @staticmethod
    def _scores(request: Request, call: Call) -> PackedLogprobs | None:
        if request.params.prompt_logprobs is None:
            return None
        return PackedLogprobs([None, *(call.scores[p] for p in range(1, len(request.prompt)))])

    def _forget(self, answer: Answer) -> None:
        reason = answer.request.finish_reason or "error"
        self._finished[reason] = self._finished.get(reason, 0) + 1
        del self._answers[answer.request.number]
        self.recent.append(ended_picture(answer.request))
        self.tally.end(answer.request, answer.call.http_id)
        answer.call.answers.remove(answer)
        if not answer.call.answers:
            del self._calls[answer.call.request_id]

    def recover(
        self, lost: Collection[int], away: Collection[int] = (), cause: str = ""
    ) -> tuple[list[Delta], list[tuple[str, CapacityError]]]:
        """Go on after all ranks have met again but those of ``away``: those of ``lost``, cp ranks,
        hold nothing, no rank knows a request, and no step is under way. Returns the ends of those
        at fault, by ``cause`` the last time, and who can never end here now, with why."""
        self._empty_plans = 0
        ends, refused = list[Delta](), dict[str, CapacityError]()
        guilty, beyond = self.scheduler.recover(lost, away)
        for request in beyond:
            if request.request_id not in refused:
                refused[request.request_id] = refusal(self.scheduler.block_manager, request)
                self.abort(request.request_id)
        for request in guilty:
            if (answer := self._answers.get(request.number)) is not None:
                ends.append(self._fail(answer, log_blame(request, cause)))
        return ends, list(refused.items())

    def check_integrity(self) -> None:
        """Raise ``IntegrityError`` unless free + cached + used blocks are all there are, and every
        reference has a holder. Linear in blocks (0.1 s for 100,000), so for idle moments."""
        try:
            self.scheduler.check_integrity()
        except AssertionError as err:
            raise IntegrityError(
                f"the KV ledger does not balance ({err}); restart the engine"
            ) from err

    def stats(self) -> EngineStats:
        """A snapshot. The caller adds the seconds and bytes that the workers count."""
        scheduler, tally = self.scheduler, self.tally
        allocator = scheduler.allocator
        ranks = range(len(allocator.blocks_per_rank))
        return EngineStats(
            num_requests_running=len(scheduler.running),
            num_requests_waiting=len(scheduler.waiting),
            num_interruptions=scheduler.num_interruptions,
            kv_blocks_used=tuple(allocator.num_used(r) for r in ranks),
            kv_blocks_cached=tuple(allocator.num_cached(r) for r in ranks),
            kv_blocks_total=scheduler.block_manager.blocks_here,
            **host_counts(scheduler.block_manager.host, scheduler.block_manager.away),
            ranks_drained=tuple(sorted(scheduler.block_manager.closed)),
            ranks_away=tuple(sorted(scheduler.block_manager.away)),
            ranks_draining=scheduler.ranks_draining,
            prefix_cache_queries=scheduler.block_manager.queries,
            prefix_cache_hits=scheduler.block_manager.hits,
            blocks_moved=scheduler.migration.num_moved,
            prompt_tokens=self._prompt_tokens,
            generation_tokens=self._generation_tokens,
            prefill_tokens=tally.prefill_tokens,
            num_preemptions=scheduler.num_preemptions,
            num_refused=scheduler.door.num_refused,
            queue_wait_seconds=scheduler.door.wait_s(RequestOptions()),
            steps=self._steps,
            finished=dict(self._finished),
            mode_counts=dict(tally.modes),
            rank_steps=tuple(rank.steps for rank in tally.ranks),
            rank_seconds=tuple(rank.seconds for rank in tally.ranks),
            rank_waits=tuple(rank.waited for rank in tally.ranks),
            skew_seconds=tally.skew_seconds,
            skew=tally.skew,
            attention_bytes=dict(tally.sent),
            predicted_bytes=dict(tally.predicted),
            grammar_requests=tally.grammar_requests,
            grammar_failures=tally.grammar_failures,
        )
