"""How long a prefill chunk may be: bounded in time, because who arrives or streams waits for it.

A step takes about ``a + b * streams + c * prompt tokens`` seconds beside streams, and ``pace``
seconds a prompt token without them. Both are learnt from the steps that were run, so the rule is
the same on a laptop and on a GPU. No torch here.
"""

from __future__ import annotations

FIRST_CHUNK = 16  # tokens beside streams, before anything was measured
LEAST_CHUNK = 4  # tokens; a long prompt always gets on
FIRST_ALONE = 512  # tokens without streams, before anything was measured, and at least
STEP_S = 1.0  # what a step without streams should take at most: a new request waits so long
WEIGHT = 0.2  # of the newest measurement
GROWTH = 2.0  # a chunk is at most so many times the largest one measured so far
MARGIN = 0.55  # of the allowed lengthening, because steps vary
MEMORY = 0.97  # what a measurement still counts one step later
OUTLIER = 3.0  # a step that took more times what was expected is taken for so many
SHORTER = 4  # every so many chunks one of half the length is taken, to learn from
LEARNT = 4  # measurements before they are believed
UNITS = (1.0, 16.0, 64.0)  # of the step, its streams and its prompt tokens: all of one size
SMALL = 1e-4  # weight of "nothing", against which measurements count


class ChunkPacer:
    """Bounds the chunk so that a step with it takes at most ``slowdown`` times one without, and at
    most about a second when nobody streams. ``slowdown`` None: nobody waits for the next token of a
    stream, so streams are no reason for shorter chunks."""

    def __init__(self, slowdown: float | None) -> None:
        if slowdown is not None and slowdown <= 1.0:
            raise ValueError(f"slowdown must be above 1, got {slowdown}")
        self.slowdown = slowdown
        self.pace: float | None = None  # seconds per prompt token without streams
        self._line = LearntLine(len(UNITS))
        self._largest = FIRST_CHUNK
        self._mixed = 0  # steps of streams and prompt tokens

    def note(self, seconds: float, streams: int, prompt_tokens: int) -> None:
        """A step took ``seconds``; ``prompt_tokens`` is the largest share of one rank."""
        if streams:
            self._line.note(_scaled(streams, prompt_tokens), seconds)
            self._largest = max(self._largest, prompt_tokens)
            self._mixed += prompt_tokens > 0
        elif prompt_tokens >= FIRST_ALONE // 4:  # shorter steps say little about long ones
            old = seconds / prompt_tokens if self.pace is None else self.pace
            self.pace = (1 - WEIGHT) * old + WEIGHT * seconds / prompt_tokens

    def quiet(self, streams: int) -> float:
        """Expected seconds of a step of ``streams`` and nothing else."""
        return max(self._line.value(_scaled(streams, 0)), 0.0)

    def chunk(self, streams: int) -> int:
        """Prompt tokens that a rank may compute in the next step, beside ``streams``."""
        if not streams or self.slowdown is None:
            return FIRST_ALONE if self.pace is None else max(FIRST_ALONE, int(STEP_S / self.pace))
        if self._line.count < LEARNT or not self._mixed:
            return FIRST_CHUNK
        quiet, each = self.quiet(streams), self._line.weights[2] / UNITS[2]
        most = int(GROWTH * self._largest)
        allowed = MARGIN * (self.slowdown - 1.0) * quiet
        chunk = int(allowed / each) if each * most > allowed else most
        if self._mixed % SHORTER == 0:  # steps of one length would not tell its cost from the rest
            chunk //= 2
        return max(LEAST_CHUNK, chunk)


class LearntLine:
    """Least squares with forgetting: ``value(x) = weights . x``. What the measurements say nothing
    about (all of one number of streams, say) is kept small."""

    def __init__(self, size: int) -> None:
        self.count = 0
        self.weights = [0.0] * size
        self._xx = [[SMALL * (i == j) for j in range(size)] for i in range(size)]
        self._xy = [0.0] * size

    def value(self, x: tuple[float, ...]) -> float:
        """What is expected at ``x``."""
        return sum(w * each for w, each in zip(self.weights, x, strict=True))

    def note(self, x: tuple[float, ...], y: float) -> None:
        """``y`` was found at ``x``."""
        expected = self.value(x)
        if self.count >= LEARNT and expected > 0.0:
            y = min(y, OUTLIER * expected)
        self.count += 1
        for i, row in enumerate(self._xx):
            self._xy[i] = MEMORY * self._xy[i] + x[i] * y
            self._xx[i] = [MEMORY * s + x[i] * each for s, each in zip(row, x, strict=True)]
            self._xx[i][i] += (1 - MEMORY) * SMALL
        self.weights = _solved(self._xx, self._xy)


def _solved(matrix: list[list[float]], right: list[float]) -> list[float]:
    """``x`` of ``matrix . x = right`` for a positive definite matrix: Gauss, without pivots."""
    rows = [[*row, y] for row, y in zip(matrix, right, strict=True)]
    for i, row in enumerate(rows):
        for other in rows[i + 1 :]:
            share = other[i] / row[i]
            other[i:] = [o - share * r for o, r in zip(other[i:], row[i:], strict=True)]
    for i in reversed(range(len(rows))):
        rest = sum(rows[i][j] * rows[j][-1] for j in range(i + 1, len(rows)))
        rows[i][-1] = (rows[i][-1] - rest) / rows[i][i]
    return [row[-1] for row in rows]


def _scaled(streams: int, prompt_tokens: int) -> tuple[float, ...]:
    return 1.0, streams / UNITS[1], prompt_tokens / UNITS[2]
