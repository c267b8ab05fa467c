"""What an engine core counts of its steps and of the requests that ended, for metrics and logs."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from ds_cp.engine.wire_model import WireModel
from ds_cp.kv.table import SequenceTable
from ds_cp.layout import total
from ds_cp.outputs import EndedRequest
from ds_cp.plan import ATTENTION_SCHEMES, NO_GRAMMAR, Outcome, StepPlan
from ds_cp.scheduler.request import Request

MAX_ENDED = 4096  # ended requests that wait to be taken; of more, the oldest are dropped


@dataclass
class RankTotals:
    """One rank: steps in which it had work, its seconds of them, and of these waiting for other
    ranks."""

    steps: int = 0
    seconds: float = 0.0
    waited: float = 0.0


class Tally:
    """Counts since the engine began. ``wire``: what predicts bytes; None: nothing is predicted."""

    def __init__(self, num_ranks: int, wire: WireModel | None) -> None:
        self._wire = wire
        self.ranks = [RankTotals() for _ in range(num_ranks)]
        self.skew_seconds = 0.0  # busiest rank's own work beyond the mean of those with work
        self.skew = 1.0  # busiest rank over the mean, in the newest step of several ranks
        self.modes: dict[str, int] = {}
        self.prefill_tokens = 0
        self.sent = dict.fromkeys(ATTENTION_SCHEMES, 0)
        self.predicted = dict.fromkeys(ATTENTION_SCHEMES, 0)
        self.grammar_requests = 0
        self.grammar_failures = 0
        self._ended: deque[EndedRequest] = deque(maxlen=MAX_ENDED)

    def plan(self, plan: StepPlan, table_of: Callable[[int], SequenceTable | None]) -> None:
        """A step was planned; ``table_of``: a request's table, which has the step's tokens."""
        for chunk in plan.chunks:
            self._count_mode(chunk.mode, 1)
            self.prefill_tokens += sum(total(runs) for _, runs in chunk.owners)
            table = table_of(chunk.request)
            if self._wire is not None and table is not None:
                self._predict(self._wire.of_chunk(chunk, table))
        for decodes in plan.decodes:
            self._count_mode(decodes.mode, len(decodes.requests))
            if decodes.mode == "local" or self._wire is None:
                continue
            for number in decodes.requests:
                table = table_of(number)
                if table is not None:
                    self._predict(self._wire.of_decode(decodes.mode, decodes.ring_pass, table))

    def _count_mode(self, mode: str, count: int) -> None:
        self.modes[mode] = self.modes.get(mode, 0) + count

    def _predict(self, sent: dict[str, int]) -> None:
        for scheme, count in sent.items():
            self.predicted[scheme] += count

    def step(self, outcome: Outcome) -> None:
        """A step has ended."""
        busy = []
        for one in outcome.ranks:
            rank = self.ranks[one.rank]
            rank.steps += 1
            rank.seconds += one.seconds
            rank.waited += one.waited
            busy.append(max(0.0, one.seconds - one.waited))
            for scheme, count in zip(ATTENTION_SCHEMES, one.sent, strict=True):
                self.sent[scheme] += count
        self.grammar_failures += sum(one.token == NO_GRAMMAR for one in outcome.sampled)
        if len(busy) > 1 and (mean := sum(busy) / len(busy)) > 0:
            self.skew_seconds += max(busy) - mean
            self.skew = max(busy) / mean

    def end(self, request: Request, http_id: str) -> None:
        """A request has ended, by whatever."""
        self._ended.append(ended_request(request, http_id))

    def take_ended(self) -> list[EndedRequest]:
        """Those that ended since the last call."""
        found = list(self._ended)
        self._ended.clear()
        return found


def ended_request(request: Request, http_id: str) -> EndedRequest:
    """What is told of a request that has ended."""
    arrival, start = request.arrival_time, request.first_scheduled_time
    first, last = request.first_token_time, request.last_token_time
    new = len(request.output)

    def since(begin: float | None, end: float | None) -> float | None:
        return None if begin is None or end is None else max(0.0, end - begin)

    decode = since(first, last)
    return EndedRequest(
        request_id=request.request_id,
        index=request.index,
        http_id=http_id,
        finish_reason=request.finish_reason or "error",
        prompt_tokens=len(request.prompt),
        cached_tokens=request.cached_tokens or 0,
        new_tokens=new,
        preemptions=request.num_preemptions,
        modes=tuple(request.modes),
        ranks=tuple(sorted(request.ranks_used)),
        queue_s=since(arrival, start),
        ttft_s=since(arrival, first),
        prefill_s=since(start, first),
        decode_s=decode,
        tpot_s=None if decode is None or new < 2 else decode / (new - 1),
        e2e_s=since(arrival, request.finished_time) or 0.0,
    )
