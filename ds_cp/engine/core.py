"""The engine of rank 0, without processes: requests in, steps out, tokens in, deltas out."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ds_cp.engine.detokenize import TextStream
from ds_cp.engine.handle import EngineStats
from ds_cp.engine.params import Delta, SamplingParams, TokenLogprob
from ds_cp.engine.plan import Sampled, StepPlan
from ds_cp.engine.request import Request
from ds_cp.engine.scheduler import Scheduler
from ds_cp.errors import RequestError


@dataclass(eq=False)
class _Live:
    request: Request
    text: TextStream | None


class EngineCore:
    """Owns the scheduler and every live request's text. One thread at a time may call it; between
    ``plan`` and ``apply``, while the ranks work, requests may come and go."""

    def __init__(self, scheduler: Scheduler, tokenizer: Any | None) -> None:
        self.scheduler = scheduler
        self._tokenizer = tokenizer
        self._by_id: dict[str, _Live] = {}
        self._by_number: dict[int, _Live] = {}
        self._prompt_tokens = 0
        self._generation_tokens = 0
        self._steps = 0
        self._finished: dict[str, int] = {}
        self._modes: dict[str, int] = {}

    def add(self, request_id: str, prompt: Sequence[int], params: SamplingParams) -> Request:
        """Queue a request; refusals as in ``Scheduler.admit``. A seed is drawn when none is
        given."""
        if request_id in self._by_id:
            raise RequestError(f"a request with id {request_id!r} is already running")
        self.check(prompt, params)
        seed = params.seed if params.seed is not None else secrets.randbits(62)
        request = self.scheduler.admit(request_id, prompt, params, seed)
        text = None
        if self._tokenizer is not None:
            text = TextStream(self._tokenizer, params.stop, params.skip_special_tokens)
        live = _Live(request, text)
        self._by_id[request_id] = self._by_number[request.number] = live
        self._prompt_tokens += len(prompt)
        return request

    def check(self, prompt: Sequence[int], params: SamplingParams) -> None:
        """Raise what ``add`` would, were there room in the queue."""
        if params.stop and self._tokenizer is None:
            raise RequestError("stop strings need a tokenizer; this engine has none", "stop")
        self.scheduler.check(prompt, params)

    def abort(self, request_id: str) -> bool:
        """End a request and free its blocks; False when there is no such request (any more)."""
        live = self._by_id.get(request_id)
        if live is None:
            return False
        self.scheduler.finish(live.request, "abort")
        self._forget(live)
        return True

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def plan(self) -> StepPlan | None:
        """The next step, or None when there is nothing to run."""
        plan = self.scheduler.schedule()
        if plan is not None:
            self._steps += 1
            for item in plan.items:
                self._modes[item.mode] = self._modes.get(item.mode, 0) + 1
        return plan

    def apply(self, sampled: Sequence[Sampled]) -> list[Delta]:
        """What a step's tokens add: one delta per request that is still there."""
        live = [(self._by_number.get(s.request), s) for s in sampled]
        return [self._take(found, s) for found, s in live if found is not None]

    def _take(self, live: _Live, got: Sampled) -> Delta:
        request = live.request
        if got.token < 0:  # logits were not finite: this request ends, the others go on
            self.scheduler.finish(request, "error")
            self._forget(live)
            return Delta(request.request_id, finish_reason="error")
        self._generation_tokens += 1
        reason = self.scheduler.took(request, got.token)
        text = ""
        if live.text is not None:
            # The token that ended the request is not part of the text.
            if reason != "stop":
                text = live.text.push(got.token)
            if reason is not None:
                text += live.text.flush()
            if live.text.stopped_by is not None and reason != "stop":
                if reason is None:
                    self.scheduler.finish(request, "stop", live.text.stopped_by)
                else:
                    request.finish_reason, request.stop_reason = "stop", live.text.stopped_by
                reason = "stop"
        logprobs = None
        if request.params.logprobs is not None:
            logprobs = (TokenLogprob(got.token, got.logprob, got.top),)
        if reason is not None:
            self._forget(live)
        return Delta(request.request_id, (got.token,), text, logprobs, reason, request.stop_reason)

    def _forget(self, live: _Live) -> None:
        reason = live.request.finish_reason or "error"
        self._finished[reason] = self._finished.get(reason, 0) + 1
        del self._by_id[live.request.request_id], self._by_number[live.request.number]

    def stats(self) -> EngineStats:
        """A snapshot. What the worker counts (seconds, bytes) is filled in by whoever talks to
        it."""
        allocator = self.scheduler.allocator
        ranks = range(len(allocator.blocks_per_rank))
        return EngineStats(
            num_requests_running=len(self.scheduler.running),
            num_requests_waiting=len(self.scheduler.waiting),
            kv_blocks_used=tuple(allocator.num_used(r) for r in ranks),
            kv_blocks_total=allocator.blocks_per_rank,
            prompt_tokens=self._prompt_tokens,
            generation_tokens=self._generation_tokens,
            num_preemptions=self.scheduler.num_preemptions,
            steps=self._steps,
            finished=dict(self._finished),
            mode_counts=dict(self._modes),
        )
