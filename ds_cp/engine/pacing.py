"""How long a prefill chunk may be while other requests stream.

A step takes about ``quiet`` seconds for its decode tokens and ``slope`` more for every prompt token
beside them. Both are learnt from the steps that were run, so the rule is the same on a laptop and
on a GPU. No torch here.
"""

from __future__ import annotations

FIRST_CHUNK = 16  # tokens, before anything was measured
LEAST_CHUNK = 4  # tokens; a long prompt always gets on
WEIGHT = 0.2  # of the newest measurement
GROWTH = 2.0  # a chunk is at most so many times the largest one measured so far
MARGIN = 0.75  # of the allowed lengthening, because steps vary


class ChunkPacer:
    """Bounds the chunk so that a step with it takes at most ``slowdown`` times one without."""

    def __init__(self, slowdown: float) -> None:
        if slowdown <= 1.0:
            raise ValueError(f"slowdown must be above 1, got {slowdown}")
        self.slowdown = slowdown
        self.quiet: float | None = None  # seconds of a step of decode tokens alone
        self.slope: float | None = None  # seconds per prompt token beside them
        self._largest = FIRST_CHUNK

    def note(self, seconds: float, decodes: int, prompt_tokens: int) -> None:
        """A step took ``seconds``; ``prompt_tokens`` is the largest share of one rank."""
        if not decodes:
            return
        if not prompt_tokens:
            self.quiet = _blend(self.quiet, seconds)
        elif self.quiet is not None:
            each = max(seconds - self.quiet, 0.02 * self.quiet) / prompt_tokens
            self.slope = _blend(self.slope, each)
            self._largest = max(self._largest, prompt_tokens)

    def chunk(self) -> int:
        """Prompt tokens that a rank may compute beside decode tokens in the next step."""
        if self.quiet is None or self.slope is None:
            return FIRST_CHUNK
        allowed = MARGIN * (self.slowdown - 1.0) * self.quiet / self.slope
        return max(LEAST_CHUNK, min(int(allowed), int(GROWTH * self._largest)))


def _blend(old: float | None, new: float) -> float:
    return new if old is None else (1 - WEIGHT) * old + WEIGHT * new
