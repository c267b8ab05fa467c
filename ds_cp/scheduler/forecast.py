"""When a request would begin, from what runs and what waits before it. No torch.

Two things hold a request up. The seats, where all are taken: each is free again when an answer
ends, so the steps until then follow from the tokens that answers still have, and a step's seconds
from the pacer. And the prompts before it, at the pace that they are computed in beside decodes. The
longer of both counts, as they go on in the same steps. Before a step was measured, both rates are
the cost model's. What this leaves out, such as room for KV, is learnt as one factor from how long
requests did wait.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from ds_cp.cost import CostModel
from ds_cp.sampling_params import RequestOptions
from ds_cp.scheduler.backlog import Load
from ds_cp.scheduler.fairness import ANSWER
from ds_cp.scheduler.pacing import ChunkPacer
from ds_cp.scheduler.request import Request

LEARN = 0.1  # share of the newest answer in the mean, and of the newest wait in the correction
CLIP = 4.0  # times that one wait may be its prediction, or the other way round, to be learnt from
FACTOR = 16.0  # the correction, or its inverse, at most
SHORT_S = 0.05  # seconds: waits are compared as if they were that much longer
PROMPT = 512  # tokens of the prompt by which the cost model is asked for its pace


@dataclass(frozen=True)
class Rates:
    """Seconds of one prompt token on one rank, and of a step that decodes, before any was
    measured; 0 where nothing is known."""

    token_s: float = 0.0
    step_s: float = 0.0

    @classmethod
    def of(cls, cost: CostModel | None) -> Rates:
        """As the model has them for one rank."""
        if cost is None:
            return cls()
        prompt = cost.forward_s("local", 1, PROMPT, 0)
        return cls(prompt / PROMPT, cost.forward_s("local", 1, 1, 0))


class Forecast:
    """``seats``: answers that run at once; ``ranks``: over which prompts are spread. ``running``
    is the scheduler's own."""

    def __init__(
        self,
        seats: int,
        ranks: int,
        running: Sequence[Request],
        pacer: ChunkPacer | None = None,
        rates: Rates = Rates(),  # noqa: B008 (frozen)
    ) -> None:
        self._seats = seats
        self._ranks = ranks
        self._running = running
        self._pacer = pacer
        self._rates = rates
        self._answer: float | None = None  # tokens of an answer, the mean
        self._factor = 0.0  # the logarithm of the correction
        self._known = False  # these, of what runs:
        self._left: list[float] = []  # tokens that answers which run still have, sorted
        self._decodes = 0
        # Prompts that run: their clients and the work that is left, by priority.
        self._prompts: dict[int, dict[str, float]] = {}

    @property
    def correction(self) -> float:
        """Seconds that requests wait over those that were predicted."""
        return math.exp(self._factor)

    def load_of(self, request: Request) -> Load:
        """What a request that waits wants of the engine."""
        answers = 1 + sum(one.finish_reason is None for one in request.siblings)
        tokens = max(self._answer_tokens(request.max_tokens) - len(request.output), 1.0)
        work = float(request.num_tokens)
        if self._pacer is not None:
            work = self._pacer.work(request.num_tokens, request.num_tokens, 0)
        return Load(answers, math.ceil(work), math.ceil(answers * tokens))

    def wait_s(
        self, options: RequestOptions, ahead: Load, answers: int, has_room: bool = True
    ) -> float:
        """Predicted seconds until a request of so many ``answers`` begins, with ``ahead`` of it.
        ``has_room``: whether the next one in the queue waits for no blocks, but a seat."""
        return self.correction * self.raw_s(options, ahead, answers, has_room)

    def raw_s(
        self, options: RequestOptions, ahead: Load, answers: int, has_room: bool = True
    ) -> float:
        """The same without the correction."""
        self._look()
        taken = len(self._left)
        seats = self._seats if has_room or not taken else min(self._seats, taken)
        decodes = min(seats, max(self._decodes, taken + ahead.seats))
        need = taken + ahead.seats + answers - seats  # answers that end before it begins
        steps = self._steps_until(need, ahead, seats - taken) if need > 0 else 0.0
        prompts = (self._prompts_before(options) + ahead.work) / self._ranks
        return max(
            steps * self._step_s(decodes) + prompts * self._prompt_s(0),
            prompts * self._prompt_s(decodes),
        )

    def _prompts_before(self, options: RequestOptions) -> float:
        """Work on prompts that run which is done before a new request begins: of its client, whose
        requests go one after the other, and what others do meanwhile, as clients have equal parts
        of a step."""
        own = others = 0.0
        clients = {options.client}
        for priority, works in self._prompts.items():
            if priority <= options.priority:
                clients.update(works)
                own += works.get(options.client, 0.0)
                others += sum(works.values()) - works.get(options.client, 0.0)
        return own + min(others, own * (len(clients) - 1))

    def _steps_until(self, ends: int, ahead: Load, free: int) -> float:
        """Steps until so many answers have ended, of those that run and of those that wait, which
        take the ``free`` seats at once, and each other one as it becomes free."""
        mean = ahead.tokens / ahead.seats if ahead.seats else self._answer_tokens(ANSWER)
        fresh = max(0, min(free, ahead.seats))  # answers that begin now, of the mean length
        at_once = len(self._left) + fresh
        if not at_once:
            return 0.0
        rounds, place = divmod(ends - 1, at_once)
        earlier = bisect_right(self._left, mean)
        steps = mean
        if not earlier <= place < earlier + fresh:
            steps = self._left[place if place < earlier else place - fresh]
        return steps + rounds * mean

    def interval_s(self, waiting: Load, count: int) -> float:
        """Predicted seconds from one start to the next, when ``count`` requests wait that want
        ``waiting``."""
        self._look()
        seats = max(1, min(self._seats, len(self._left) or self._seats))
        mean = waiting.tokens / count if count else self._answer_tokens(ANSWER)
        work = waiting.work / count if count else 0.0
        seconds = max(
            mean / seats * self._step_s(seats) + work / self._ranks * self._prompt_s(0),
            work / self._ranks * self._prompt_s(seats),
        )
        return self.correction * seconds

    def began(self, predicted_s: float, waited_s: float) -> None:
        """A request has begun, for which ``raw_s`` had said ``predicted_s``."""
        if max(predicted_s, waited_s) <= SHORT_S:
            return
        ratio = math.log((waited_s + SHORT_S) / (predicted_s + SHORT_S))
        # Clipped about what is believed, so that one odd wait moves it by a little.
        most = math.log(CLIP)
        move = LEARN * max(-most, min(ratio - self._factor, most))
        bound = math.log(FACTOR)
        self._factor = max(-bound, min(self._factor + move, bound))

    def ended(self, tokens: int) -> None:
        """An answer of so many tokens has ended by itself."""
        old = float(tokens) if self._answer is None else self._answer
        self._answer = (1 - LEARN) * old + LEARN * tokens

    def _answer_tokens(self, most: int) -> float:
        return float(min(most, ANSWER if self._answer is None else max(self._answer, 1.0)))

    def look_again(self) -> None:
        """What runs has changed."""
        self._known = False

    def _look(self) -> None:
        if self._known:
            return
        self._known = True
        self._left, self._decodes, self._prompts = [], 0, {}
        for request in self._running:
            mean = self._answer_tokens(request.max_tokens)
            done = len(request.output)
            # One that has passed the mean goes on for as long again, for all that is known.
            rest = mean - done if done < mean else mean
            rest = min(rest, float(request.max_tokens - done))
            self._left += [max(rest, 1.0)] * self.load_of(request).seats
            if request.prefilling:
                past, new = request.num_computed, request.num_tokens - request.num_computed
                work = float(new) if self._pacer is None else self._pacer.work(new, new, past)
                works = self._prompts.setdefault(request.priority, {})
                works[request.client] = works.get(request.client, 0.0) + work
            else:
                self._decodes += 1
        self._left.sort()

    def _step_s(self, decodes: int) -> float:
        if self._pacer is not None and self._pacer.knows_quiet:
            return self._pacer.quiet(decodes)
        return self._rates.step_s

    def _prompt_s(self, decodes: int) -> float:
        """Seconds per work on prompts."""
        pace = None if self._pacer is None else self._pacer.pace_beside(decodes)
        return self._rates.token_s if pace is None else pace
