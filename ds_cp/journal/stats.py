"""What a journal counts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class JournalStats:
    """Counters, which only grow, and gauges, of now. ``lost``: changes that were not written;
    ``resumed``: requests that went on after a restart."""

    records: int = 0
    bytes: int = 0
    syncs: int = 0
    sync_seconds: float = 0.0
    lost: int = 0
    resumed: int = 0
    size: int = 0
    working: bool = True
