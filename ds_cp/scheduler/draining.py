"""Whether ranks that are being drained are empty. No torch."""

from __future__ import annotations

from collections.abc import Collection

from ds_cp.scheduler.block_manager import BlockManager


class Draining:
    """Remembers the last step that may use the blocks of each closed rank."""

    def __init__(self, blocks: BlockManager) -> None:
        self._blocks = blocks
        self._last_use: dict[int, int] = {}  # rank -> step

    def begin(self, rank: int, step: int) -> None:
        """``rank`` is closed; ``step`` was planned before."""
        self._last_use[rank] = step

    def plan(self, step: int) -> None:
        """``step`` is about to be planned."""
        for rank in self._blocks.closed:
            if not self.is_empty(rank):
                self._last_use[rank] = step

    def is_empty(self, rank: int) -> bool:
        """Whether no request holds a block of ``rank``, or waits for what its host memory has."""
        leased = self._blocks.host.tier.num_leased(rank)
        return not self._blocks.allocator.num_used(rank) and not leased

    def ranks(self, in_flight: Collection[int]) -> tuple[int, ...]:
        """Closed ranks that hold a block, or that a step ``in_flight`` may still read."""
        return tuple(
            rank
            for rank in sorted(self._blocks.closed)
            if not self.is_empty(rank)
            or any(step <= self._last_use.get(rank, 0) for step in in_flight)
        )
