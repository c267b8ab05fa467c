"""A clock that does not jump."""

from __future__ import annotations

import time

_AHEAD = time.time() - time.monotonic()


def steady_time() -> float:
    """Seconds since the epoch, as the system's clock had it when this process began: whatever is
    set or jumps since then, what is between two of these has passed."""
    return time.monotonic() + _AHEAD
