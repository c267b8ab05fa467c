"""What llama.cpp's clients read of an answer's speed: ``prompt_progress`` and ``timings``."""

from __future__ import annotations

from time import monotonic
from typing import Any

from ds_cp.outputs import Delta, PromptProgress


def prompt_progress(progress: PromptProgress) -> dict[str, Any]:
    """llama.cpp's object of a prompt on its way: tokens, and milliseconds since it began."""
    return {
        "total": progress.total,
        "cache": progress.cached,
        "processed": progress.processed,
        "time_ms": round(progress.seconds * 1000),
    }


class Timings:
    """The times of one request of one prompt. ``arrival``: in seconds of ``time.monotonic()``; the
    prompt's time ends with the first token of any answer, so it has the queue in it."""

    def __init__(self, arrival: float) -> None:
        self._arrival = arrival
        self._first: float | None = None
        self._last = arrival

    def take(self, delta: Delta) -> None:
        """A delta has come."""
        if delta.token_ids:
            self._last = monotonic()
            self._first = self._last if self._first is None else self._first

    def shown(self, prompt_tokens: int, cached_tokens: int, new_tokens: int) -> dict[str, Any]:
        """llama.cpp's object: milliseconds, and tokens a second; 0 where there is nothing yet."""
        first = self._last if self._first is None else self._first
        prompt_ms = 1000 * (first - self._arrival)
        new_ms = 1000 * (self._last - first)
        computed, later = prompt_tokens - cached_tokens, max(0, new_tokens - 1)
        return {
            "cache_n": cached_tokens,
            "prompt_n": computed,
            "prompt_ms": round(prompt_ms, 3),
            "prompt_per_token_ms": _ratio(prompt_ms, computed),
            "prompt_per_second": _ratio(1000 * computed, prompt_ms),
            "predicted_n": new_tokens,
            "predicted_ms": round(new_ms, 3),
            "predicted_per_token_ms": _ratio(new_ms, later),
            "predicted_per_second": _ratio(1000 * later, new_ms),
        }


def _ratio(a: float, b: float) -> float:
    return round(a / b, 3) if b > 0 else 0.0
