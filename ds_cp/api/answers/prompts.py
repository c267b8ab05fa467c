"""The events of a stream that say how far its prompts have come."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from time import monotonic
from typing import Any

from ds_cp.api.answers.generation import Generation
from ds_cp.outputs import Delta, PromptProgress


class PromptEvents:
    """The events of prompts that are being read, one after the other; ``make`` makes them, None:
    the client wants none. The last one of a prompt says that all of it is read, right before what
    its first token gives, even where no other one came: all of it was cached, or a look was not in
    time. Of a prompt that is read while an earlier one is not, there is none."""

    def __init__(
        self, generation: Generation, make: Callable[[PromptProgress], Any] | None
    ) -> None:
        self._generation = generation
        self._make = make
        self._read = set[int]()  # jobs whose first token has come
        self._first = 0  # the first job of which none has
        self._last: tuple[int, PromptProgress, float] | None = None  # told of a job, and when

    @property
    def asks(self) -> bool:
        """Whether there may be more of them without a token."""
        return self._make is not None and self._generation.reads_prompts

    def now(self) -> Iterator[Any]:
        """The event of what is new."""
        found = self._generation.progress() if self.asks else None
        if found is not None and found[0] == self._first:
            yield from self._tell(*found)

    def before(self, job: int, delta: Delta) -> Iterator[Any]:
        """The event before those of a delta."""
        begins = delta.token_ids or delta.finish_reason in ("stop", "length")
        if self._make is None or job in self._read or not begins:
            return
        self._read.add(job)
        if job != self._first:
            return
        whole = self._generation.read_prompt(job, delta)
        if self._last is not None and self._last[0] == job:
            known, at = self._last[1:]
            seconds = known.seconds
            if known.processed < known.total:  # it went on since
                seconds += monotonic() - at
            whole = replace(known, processed=known.total, seconds=seconds)
        yield from self._tell(job, whole)
        while self._first in self._read:
            self._first += 1

    def _tell(self, job: int, known: PromptProgress) -> Iterator[Any]:
        last = self._last
        if last is None or (last[0], last[1].processed) != (job, known.processed):
            self._last = (job, known, monotonic())
            assert self._make is not None
            yield self._make(known)
