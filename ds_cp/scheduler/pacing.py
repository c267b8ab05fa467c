"""How long a prefill chunk may be: bounded in time, because requests that arrive or decode wait
for it.

Beside decodes a step takes ``a + b * decodes`` seconds without a prompt, and a chunk adds ``f + r *
work`` to it. *Work* is prompt tokens, each weighted by what it attends to; f is what any chunk
costs, however short (the keys of a deep prompt are read, ranks exchange). Without decodes a step
takes ``pace * work``. All of it is learnt from the steps that were run, so the rule is the same on
a laptop and on a GPU; the weight follows from the model's shape. A *quiet* step has decodes and no
chunk.

Prefill is throttled while other requests decode. A chunk that takes what a step may be lengthened
by goes into every step. Where f alone would eat most of that, chunks are longer and fewer than half
of the steps have one, so that decodes are on average as fast and the prompt gets on. No torch here.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass

from ds_cp.cost import LayerWindows
from ds_cp.scheduler.regression import Regression


@dataclass(frozen=True)
class Tuning:
    """Constants of the pacer. Units: *work* as in this module's head; *share*, a plain ratio;
    steps; chunks; seconds.

    Before anything was measured:
    ``first_chunk_work``: a chunk beside decodes. ``first_alone_work``: a chunk without decodes;
    also the least such chunk.

    Bounds:
    ``least_chunk_tokens``: prompt tokens of a chunk, so that a long prompt always gets on.
    ``alone_step_s``: seconds of a step without decodes at most: a new request waits no longer.
    ``growth_share``: a chunk's work beside decodes over the largest work measured so far, at most;
    also the time of a chunk over its allowance above which it was *late*: the next one then has its
    work divided by this. ``alone_growth_share``: the same bound of work without decodes.
    ``margin_share``: the part of the allowed lengthening that is used, because steps vary.
    ``useful_share``: the part of what a chunk in every step adds that is its tokens' own, at least;
    below, chunks are made rare. ``apart_steps``, ``rare_steps``: steps per chunk at least and at
    most while they are rare. ``patience_steps``: steps without a chunk at most, whatever one costs.

    Learning:
    ``pace_weight``: share of the newest measurement in the pace. ``chunk_memory``,
    ``quiet_memory``: share that a measurement of a chunk, or of a quiet step, still counts when the
    next one comes (quiet steps are rarer, and change as sequences grow). ``half_every_chunks``: of
    these, one chunk has half the length, to tell r from f. ``probe_chunks``: chunks in a row, then
    a quiet step, so that what quiet is stays known; ``unknown_chunks``: the same until it is known.
    ``decodes_unit``, ``work_unit``: the regressions divide by them, so that all terms are of one
    size.
    """

    first_chunk_work: float = 16.0
    first_alone_work: float = 512.0
    least_chunk_tokens: int = 4
    alone_step_s: float = 1.0
    growth_share: float = 2.0
    alone_growth_share: float = 4.0
    margin_share: float = 0.75
    useful_share: float = 1 / 3
    apart_steps: float = 2.2
    rare_steps: float = 8.0
    patience_steps: int = 32
    pace_weight: float = 0.2
    chunk_memory: float = 0.97
    quiet_memory: float = 0.85
    half_every_chunks: int = 4
    probe_chunks: int = 16
    unknown_chunks: int = 2
    decodes_unit: float = 16.0
    work_unit: float = 64.0


class ChunkPacer:
    """Bounds the work on prompts so that a token of a decoding request takes at most ``slowdown``
    times as long as without, and a step at most ``alone_step_s`` when nothing decodes. ``slowdown``
    None: no client waits for the next token, so decodes are no reason for shorter chunks.

    ``attention``: what a prompt token costs for each stored token that it attends to, as a share of
    what it costs otherwise; ``layers``: how many of these each layer sees. The caller asks
    ``allowance`` for each step, reports what it planned to ``plan`` and, some steps later, the
    step's seconds to ``observe``. Raises ``ValueError`` for a ``slowdown`` of 1 or less.
    """

    def __init__(
        self,
        slowdown: float | None,
        attention: float = 0.0,
        tuning: Tuning | None = None,
        layers: LayerWindows | None = None,
    ) -> None:
        if slowdown is not None and slowdown <= 1.0:
            raise ValueError(f"slowdown must be above 1, got {slowdown}")
        self.slowdown = slowdown
        self.attention = attention
        self.layers = layers or LayerWindows()
        self.tuning = tuning or Tuning()
        self.pace: float | None = None  # seconds per work without decodes
        self._quiet = Regression(2, self.tuning.quiet_memory)  # of (step, decodes)
        self._added = Regression(2, self.tuning.chunk_memory)  # of (chunk, work)
        # What measured chunks allow, beside decodes and without, whatever the predictions say.
        self._most = self.tuning.growth_share * self.tuning.first_chunk_work
        self._most_alone = self.tuning.first_alone_work
        self._credit = 0.0  # seconds by which decodes may still be held up
        self._chunks = 0
        self._in_a_row = 0  # steps with a chunk since the last quiet one
        self._waited = 0  # quiet steps since the last chunk

    def work(self, share: int, tokens: int, past: int) -> float:
        """Of one rank that computes ``share`` of a chunk of ``tokens`` after ``past`` earlier
        ones."""
        if self.layers.windows and tokens:
            seen = self.layers.pairs(((past, tokens),)) / tokens
            return share * (1.0 + self.attention * seen)
        return share * (1.0 + self.attention * (past + tokens / 2))

    def tokens(self, work: float, past: int, ranks: int = 1) -> int:
        """How long a chunk over ``ranks`` ranks may be for each of them to do ``work``: solves
        ``t / ranks * (1 + attention * (past + t / 2)) = work``. 0 where nothing is left."""
        work = max(work, 0.0)
        if self.layers.windows:
            every = range(1, int(work * ranks + 1e-6) + 1)
            return bisect_right(every, work * ranks + 1e-6, key=lambda t: self.work(t, t, past))
        each = 1.0 + self.attention * past
        root = math.sqrt(each * each + 2.0 * self.attention * work * ranks)
        return int(2.0 * work * ranks / (each + root) + 1e-6)

    def quiet(self, decodes: int) -> float:
        """Predicted seconds of a step of ``decodes`` and nothing else."""
        return max(self._quiet.value((1.0, decodes / self.tuning.decodes_unit)), 0.0)

    @property
    def knows_quiet(self) -> bool:
        """Whether quiet steps were measured."""
        return self._quiet.known

    def pace_beside(self, decodes: int) -> float | None:
        """Seconds per work of prompts beside ``decodes``, as their chunks are bounded; None before
        any was measured."""
        pace = self.pace
        if decodes and self.slowdown is not None and self._added.known:
            each = max(self._added.weights[1] / self.tuning.work_unit, 0.0)
            pace = max(each, 1e-9)
            if self._quiet.known:  # of a chunk as long as is allowed, with the step that it is in
                worth = max(self._worth(decodes), 1e-9)
                chunk = max((worth - self._fixed) / pace, self.tuning.least_chunk_tokens)
                steps = max(worth / max(self._allowed(decodes), 1e-9), 1.0)
                pace = (worth + steps * self.quiet(decodes)) / chunk
        return pace

    def added(self, work: float) -> float:
        """Predicted seconds that a chunk adds."""
        return max(self._added.value((1.0, work / self.tuning.work_unit)), 0.0) if work else 0.0

    def allowance(self, decodes: int) -> float:
        """The work that a rank may do on prompts in the next step, beside ``decodes``; 0 in some
        steps, to spare the decodes or to see what a step takes without."""
        tuning = self.tuning
        if not decodes or self.slowdown is None:
            if self.pace is None:
                return tuning.first_alone_work
            work = max(tuning.first_alone_work, tuning.alone_step_s / max(self.pace, 1e-9))
            return min(work, self._most_alone)
        if self._in_a_row >= (tuning.probe_chunks if self._quiet.known else tuning.unknown_chunks):
            return 0.0
        most = self._most if self._added.known else tuning.first_chunk_work
        each = max(self._added.weights[1] / tuning.work_unit, 0.0)
        cost, fixed = self._worth(decodes), self._fixed
        if self._credit < cost > self._allowed(decodes) and self._waited < tuning.patience_steps:
            return 0.0
        work = (cost - fixed) / each if each * most > cost - fixed else most
        if self._chunks % tuning.half_every_chunks == tuning.half_every_chunks - 1:
            work /= 2
        return max(float(tuning.least_chunk_tokens), work)

    @property
    def _fixed(self) -> float:
        return max(self._added.weights[0], 0.0)

    def _allowed(self, decodes: int) -> float:
        """Seconds by which a step may be longer, on average."""
        assert self.slowdown is not None
        return self.tuning.margin_share * (self.slowdown - 1.0) * self.quiet(decodes)

    def _worth(self, decodes: int) -> float:
        """Seconds that the next chunk should add."""
        allowed, fixed, tuning = self._allowed(decodes), self._fixed, self.tuning
        overhead = 1.0 - tuning.useful_share
        if fixed <= overhead * allowed:
            return allowed
        least = max(tuning.apart_steps * allowed, fixed / overhead)
        return min(least, max(tuning.rare_steps * allowed, tuning.apart_steps * fixed))

    def plan(self, decodes: int, work: float) -> None:
        """The step that ``allowance`` was asked for has ``decodes``, and ``work`` as the largest of
        one rank."""
        if not decodes or self.slowdown is None:
            return
        if self._quiet.known:
            most = max(self._worth(decodes), self._allowed(decodes))
            credit = self._credit - self.added(work) + self._allowed(decodes)
            self._credit = min(max(credit, 0.0), most)
        self._chunks += work > 0
        self._in_a_row = self._in_a_row + 1 if work else 0
        self._waited = 0 if work else self._waited + 1

    def observe(self, seconds: float, decodes: int, work: float) -> None:
        """Learn from a step that was planned with ``decodes`` and ``work``. ``seconds``: its time,
        the maximum over ranks."""
        tuning = self.tuning
        if not decodes or self.slowdown is None:
            self._observe_alone(seconds, decodes, work)
        elif not work:
            self._quiet.observe((1.0, decodes / tuning.decodes_unit), seconds)
        elif self._quiet.known:
            added = max(seconds - self.quiet(decodes), 0.0)
            if not self._added.known or added <= tuning.growth_share * self._worth(decodes):
                self._most = max(self._most, tuning.growth_share * work)
            else:  # late: the prediction, which learns slowly, is not waited for
                self._most = min(self._most, work / tuning.growth_share)
            self._added.observe((1.0, work / tuning.work_unit), added)

    def _observe_alone(self, seconds: float, decodes: int, work: float) -> None:
        """Learn from a step without decodes, or with decodes that no client waits for."""
        if not work:  # decodes or moves alone say nothing of chunks
            return
        tuning = self.tuning
        if seconds <= tuning.growth_share * tuning.alone_step_s:
            self._most_alone = max(self._most_alone, tuning.alone_growth_share * work)
        else:
            most = min(self._most_alone, work / tuning.growth_share)
            self._most_alone = max(most, tuning.first_alone_work)
        # Decodes are not prompt work, and shorter steps say little about long ones.
        if not decodes and work >= tuning.first_alone_work // 4:
            old = seconds / work if self.pace is None else self.pace
            self.pace = (1 - tuning.pace_weight) * old + tuning.pace_weight * seconds / work
