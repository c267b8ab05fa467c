"""How long a prefill chunk may be: bounded in time, because whoever arrives or streams waits for
it.

Beside streams, a step takes about ``quiet`` seconds for their tokens and ``slope`` more for every
prompt token; alone, ``pace`` seconds a token. All are learnt from the steps that were run, so the
rule is the same on a laptop and on a GPU. No torch here.
"""

from __future__ import annotations

FIRST_CHUNK = 16  # tokens beside streams, before anything was measured
LEAST_CHUNK = 4  # tokens; a long prompt always gets on
FIRST_ALONE = 512  # tokens without streams, before anything was measured, and at least
STEP_S = 1.0  # what a step without streams should take at most: a new request waits so long
WEIGHT = 0.2  # of the newest measurement
GROWTH = 2.0  # a chunk is at most so many times the largest one measured so far
MARGIN = 0.75  # of the allowed lengthening, because steps vary


class ChunkPacer:
    """Bounds the chunk so that a step with it takes at most ``slowdown`` times one without, and at
    most about a second when nobody streams."""

    def __init__(self, slowdown: float) -> None:
        if slowdown <= 1.0:
            raise ValueError(f"slowdown must be above 1, got {slowdown}")
        self.slowdown = slowdown
        self.quiet: float | None = None  # seconds of a step of decode tokens alone
        self.slope: float | None = None  # seconds per prompt token beside them
        self.pace: float | None = None  # seconds per prompt token without them
        self._largest = FIRST_CHUNK

    def note(self, seconds: float, decodes: int, prompt_tokens: int) -> None:
        """A step took ``seconds``; ``prompt_tokens`` is the largest share of one rank."""
        if decodes and not prompt_tokens:
            self.quiet = _blend(self.quiet, seconds)
        elif decodes and self.quiet is not None:
            each = max(seconds - self.quiet, 0.02 * self.quiet) / prompt_tokens
            self.slope = _blend(self.slope, each)
            self._largest = max(self._largest, prompt_tokens)
        elif prompt_tokens >= FIRST_ALONE // 4:  # shorter steps say little about long ones
            self.pace = _blend(self.pace, seconds / prompt_tokens)

    def chunk(self, streams: bool) -> int:
        """Prompt tokens that a rank may compute in the next step."""
        if not streams:
            return FIRST_ALONE if self.pace is None else max(FIRST_ALONE, int(STEP_S / self.pace))
        if self.quiet is None or self.slope is None:
            return FIRST_CHUNK
        allowed = MARGIN * (self.slowdown - 1.0) * self.quiet / self.slope
        return max(LEAST_CHUNK, min(int(allowed), int(GROWTH * self._largest)))


def _blend(old: float | None, new: float) -> float:
    return new if old is None else (1 - WEIGHT) * old + WEIGHT * new
