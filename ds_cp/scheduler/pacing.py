"""How long a prefill chunk may be: bounded in time, because who arrives or streams waits for it.

Beside streams a step takes ``a + b * streams`` seconds without a prompt, and a chunk adds ``f + r *
work`` to it. *Work* is prompt tokens, each weighted by what it attends to; f is what any chunk
costs, however short (the keys of a deep prompt are read, ranks exchange). Without streams a step
takes ``pace * work``. All of it is learnt from the steps that were run, so the rule is the same on
a laptop and on a GPU; the weight follows from the model's shape.

A chunk that takes what a step may be lengthened by goes into every step. Where f alone would eat
most of that, chunks are longer and fewer than half of the steps have one, so that streams are on
average as fast and the prompt gets on. No torch here.
"""

from __future__ import annotations

import math

from ds_cp.scheduler.regression import UNITS, Regression

FIRST_CHUNK = 16  # work beside streams, before anything was measured
LEAST_CHUNK = 4  # tokens; a long prompt always gets on
FIRST_ALONE = 512  # work without streams, before anything was measured, and at least
STEP_S = 1.0  # what a step without streams should take at most: a new request waits so long
WEIGHT = 0.2  # of the newest measurement of the pace
GROWTH = 2.0  # a chunk is at most so many times the largest work measured so far
MARGIN = 0.75  # of the allowed lengthening, because steps vary
MEMORY = 0.97  # what a chunk's measurement still counts one chunk later
QUIET_MEMORY = 0.85  # the same of quiet steps, which are rarer and change as streams grow
USEFUL = 1 / 3  # of what a chunk in every step adds, the part that is its tokens' own, at least
APART = 2.2  # steps per chunk, at least, where they are not in every step
RARE = 8.0  # steps per chunk at most
SHORTER = 4  # every so many chunks one of half the length is taken, to learn from
PATIENCE = 32  # steps without a chunk at most, whatever a chunk costs
PROBE = 16  # chunks in a row, then a step without one: what quiet is must not be forgotten
UNKNOWN = 2  # chunks in a row, then a step without one, while quiet is not known


class ChunkPacer:
    """Bounds the work on prompts so that streams take at most ``slowdown`` times as long for a
    token as without, and a step at most about a second when nobody streams. ``slowdown`` None:
    nobody waits for the next token of a stream, so streams are no reason for shorter chunks.

    ``attention``: what a prompt token costs for each stored token that it attends to, as a share of
    what it costs otherwise. Of each step ``allowance`` asks first, ``plan`` says what came of it,
    and ``note``, some steps later, how long it took.
    """

    def __init__(self, slowdown: float | None, attention: float = 0.0) -> None:
        if slowdown is not None and slowdown <= 1.0:
            raise ValueError(f"slowdown must be above 1, got {slowdown}")
        self.slowdown = slowdown
        self.attention = attention
        self.pace: float | None = None  # seconds per work without streams
        self._quiet = Regression(2, QUIET_MEMORY)  # of (step, streams)
        self._added = Regression(2, MEMORY)  # of (chunk, work)
        self._largest = float(FIRST_CHUNK)
        self._credit = 0.0  # seconds by which streams may still be held up
        self._chunks = 0
        self._in_a_row = 0  # steps with a chunk since the last quiet one
        self._waited = 0  # quiet steps since the last chunk

    def work(self, share: int, tokens: int, past: int) -> float:
        """Of one rank that computes ``share`` of a chunk of ``tokens`` after ``past`` earlier
        ones."""
        return share * (1.0 + self.attention * (past + tokens / 2))

    def tokens(self, work: float, past: int, ranks: int = 1) -> int:
        """How long a chunk over ``ranks`` ranks may be for each of them to do ``work``: solves
        ``t / ranks * (1 + attention * (past + t / 2)) = work``. 0 where nothing is left."""
        work = max(work, 0.0)
        each = 1.0 + self.attention * past
        root = math.sqrt(each * each + 2.0 * self.attention * work * ranks)
        return int(2.0 * work * ranks / (each + root) + 1e-6)

    def quiet(self, streams: int) -> float:
        """Expected seconds of a step of ``streams`` and nothing else."""
        return max(self._quiet.value((1.0, streams / UNITS[1])), 0.0)

    def added(self, work: float) -> float:
        """Expected seconds that a chunk adds."""
        return max(self._added.value((1.0, work / UNITS[2])), 0.0) if work else 0.0

    def allowance(self, streams: int) -> float:
        """The work that a rank may do on prompts in the next step, beside ``streams``; 0 in some
        steps, to spare the streams or to see what a step takes without."""
        if not streams or self.slowdown is None:
            return (
                FIRST_ALONE
                if self.pace is None
                else max(FIRST_ALONE, STEP_S / max(self.pace, 1e-9))
            )
        if self._in_a_row >= (PROBE if self._quiet.known else UNKNOWN):
            return 0.0
        most = GROWTH * self._largest if self._added.known else FIRST_CHUNK
        each = max(self._added.weights[1] / UNITS[2], 0.0)
        cost, fixed = self._worth(streams), self._fixed
        if self._credit < cost > self._allowed(streams) and self._waited < PATIENCE:
            return 0.0
        work = (cost - fixed) / each if each * most > cost - fixed else most
        if self._chunks % SHORTER == SHORTER - 1:  # chunks of one length would not tell r from f
            work /= 2
        return max(float(LEAST_CHUNK), work)

    @property
    def _fixed(self) -> float:
        return max(self._added.weights[0], 0.0)

    def _allowed(self, streams: int) -> float:
        """Seconds by which a step may be longer, on average."""
        assert self.slowdown is not None
        return MARGIN * (self.slowdown - 1.0) * self.quiet(streams)

    def _worth(self, streams: int) -> float:
        """Seconds that the next chunk should add."""
        allowed, fixed = self._allowed(streams), self._fixed
        if fixed <= (1.0 - USEFUL) * allowed:
            return allowed
        return min(max(APART * allowed, fixed / (1.0 - USEFUL)), max(RARE * allowed, APART * fixed))

    def plan(self, streams: int, work: float) -> None:
        """The step that was just asked for has so many streams, and ``work`` as the largest of one
        rank."""
        if not streams or self.slowdown is None:
            return
        if self._quiet.known:
            most = max(self._worth(streams), self._allowed(streams))
            credit = self._credit - self.added(work) + self._allowed(streams)
            self._credit = min(max(credit, 0.0), most)
        self._chunks += work > 0
        self._in_a_row = self._in_a_row + 1 if work else 0
        self._waited = 0 if work else self._waited + 1

    def note(self, seconds: float, streams: int, work: float) -> None:
        """A step took ``seconds``; ``work`` is the largest of one rank."""
        if not streams:
            if work >= FIRST_ALONE // 4:  # shorter steps say little about long ones
                old = seconds / work if self.pace is None else self.pace
                self.pace = (1 - WEIGHT) * old + WEIGHT * seconds / work
        elif not work:
            self._quiet.note((1.0, streams / UNITS[1]), seconds)
        elif self._quiet.known:
            added = max(seconds - self.quiet(streams), 0.0)
            self._added.note((1.0, work / UNITS[2]), added)
            self._largest = max(self._largest, work)
