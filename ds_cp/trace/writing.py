"""Whether a trace is being written, as other processes of the same machine see it: those that would
end its writer in time, and must not while it gets on."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable

# Seconds beyond the deadline of an exchange in which a writer that gets on changes its file.
STALLED_S = 60.0


def part_of(file: str) -> str:
    """The file that is written, and in the end becomes ``file``."""
    return f"{file}.part"


class Writing:
    """Looks at the part of a trace. Made before the job can write one: what lies there then was
    left by another. ``file``: None for no trace; ``stalled_s``: seconds without a change after
    which its writer does not get on; ``clock``: seconds."""

    def __init__(
        self, file: str | None, stalled_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._part = None if file is None else part_of(file)
        self._stalled_s = stalled_s
        self._clock = clock
        self._seen = self._look()
        self._changed = -math.inf  # when a change was seen

    def goes_on(self) -> bool:
        """Whether the trace is being written, and has changed lately."""
        found = self._look()
        if found is None:
            return False
        now = self._clock()
        if found != self._seen:
            self._seen, self._changed = found, now
        return now - self._changed < self._stalled_s

    def _look(self) -> tuple[int, int, int] | None:
        if self._part is None:
            return None
        try:
            found = os.stat(self._part)
        except OSError:
            return None
        return found.st_ino, found.st_size, found.st_mtime_ns
