"""Token ids to text, a piece at a time, with stop strings that may cross token borders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

REPLACEMENT = "\ufffd"  # what a tokenizer shows for bytes that are not a character yet


class IncrementalDetokenizer:
    """Text of one request as its tokens arrive.

    A piece is given out once it can no longer change: not while its last character lacks bytes, and
    not while its end could be the beginning of a stop string.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str], skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._skip = skip_special_tokens
        self._ids: list[int] = []
        self._context = 0  # decode from here: earlier tokens cannot change what follows
        self._decoded = 0  # tokens whose text is in _held or given out
        self._held = ""  # decoded, not given out
        self._early = 0  # characters of _held that came too early to end a stop string
        self.stopped_by: str | None = None

    def push(self, token: int, may_stop: bool = True) -> str:
        """Add a token; returns the text that is now certain. Sets ``stopped_by`` on a stop string,
        unless it is too early to stop."""
        self._ids.append(token)
        before = self._decode(self._ids[self._context : self._decoded])
        now = self._decode(self._ids[self._context :])
        if len(now) > len(before) and not now.endswith(REPLACEMENT):
            self._context, self._decoded = self._decoded, len(self._ids)
            return self._give(now[len(before) :], may_stop)
        return ""

    def flush(self, may_stop: bool = True) -> str:
        """What is left when no token follows."""
        before = self._decode(self._ids[self._context : self._decoded])
        now = self._decode(self._ids[self._context :])
        self._decoded = len(self._ids)
        text = self._give(now[len(before) :], may_stop)
        if self.stopped_by is None:
            text, self._held = text + self._held, ""
        return text

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip) if ids else ""

    def _give(self, text: str, may_stop: bool) -> str:
        if self.stopped_by is not None:
            return ""
        self._held += text
        found = [
            (at, s)
            for s in self._stop
            if (at := self._held.find(s, max(0, self._early + 1 - len(s)))) >= 0
        ]
        if found and may_stop:
            at, self.stopped_by = min(found)
            out, self._held = self._held[:at], ""
            return out
        if not may_stop:
            self._early = len(self._held)
        keep = max((self._overlap(s) for s in self._stop), default=0)
        out, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        self._early = max(0, self._early - len(out))
        return out

    def _overlap(self, stop: str) -> int:
        """Length of the longest end of the held text that begins ``stop``."""
        longest = min(len(stop) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._held.endswith(stop[:n])), 0)
