"""Where one request's KV lives: blocks, slots and positions per rank. Integers only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ds_cp.layout import Run, Runs, join, total

Extents = tuple[tuple[int, int], ...]


@dataclass
class _RankPart:
    """What one rank holds, kept up to date by every append."""

    blocks: list[int] = field(default_factory=list)
    held: set[int] = field(default_factory=set)
    stored: int = 0
    runs: list[Run] = field(default_factory=list)
    extents: list[Run] = field(default_factory=list)


class SequenceTable:
    """One request's KV: which blocks on which rank hold which positions, in storage order.

    A *slot* is one token's place in a rank's pool: ``block * block_size + offset``. An *extent* is
    ``(first slot, length)``, a run of adjacent slots that a dense kernel can read at once. Blocks
    are filled in the order in which they were appended; only the last block of a rank has open
    slots.
    """

    def __init__(self, block_size: int, num_ranks: int) -> None:
        if block_size < 1 or num_ranks < 1:
            raise ValueError(
                f"need block_size and num_ranks >= 1, got {block_size} and {num_ranks}"
            )
        self.block_size = block_size
        self.num_ranks = num_ranks
        self._parts = [_RankPart() for _ in range(num_ranks)]
        self._num_tokens = 0
        self._end = 0  # one past the highest position
        self._last_rank = -1

    def append(self, rank: int, runs: Runs, new_blocks: Sequence[int]) -> Extents:
        """Store the positions ``runs`` on ``rank``: open slots first, then ``new_blocks``.

        Returns the extents that the new tokens take, in the order of ``runs``. Raises ValueError,
        with nothing changed, unless ``new_blocks`` are exactly as many as needed and not held
        already.
        """
        part = self._part(rank)
        if any(start < 0 or length < 0 for start, length in runs):
            raise ValueError(f"runs {runs} for rank {rank} have a negative number")
        runs = join(runs)
        tokens = total(runs)
        needed = new_blocks_needed(self, rank, tokens)
        if len(new_blocks) != needed:
            raise ValueError(
                f"{tokens} tokens on rank {rank} with {self.open_slots(rank)} open slots need "
                f"{needed} new blocks of {self.block_size}, got {len(new_blocks)}"
            )
        fresh = set(new_blocks)
        if len(fresh) != needed or not fresh.isdisjoint(part.held):
            raise ValueError(
                f"new blocks {list(new_blocks)} of rank {rank} repeat or are held already"
            )
        written = self._slots(rank, tokens, new_blocks)
        part.blocks.extend(new_blocks)
        part.held |= fresh
        part.stored += tokens
        _extend_fused(part.runs, runs)
        _extend_fused(part.extents, written)
        self._num_tokens += tokens
        end = max((start + length for start, length in runs), default=0)
        if end > self._end:
            self._end, self._last_rank = end, rank
        return written

    def _slots(self, rank: int, tokens: int, new_blocks: Sequence[int]) -> Extents:
        """The next ``tokens`` slots of ``rank`` as extents."""
        in_open = min(tokens, self.open_slots(rank))
        pieces: list[Run] = []
        if in_open:
            pieces.append((sum(self._parts[rank].extents[-1]), in_open))
        left = tokens - in_open
        for block in new_blocks:
            pieces.append((block * self.block_size, min(left, self.block_size)))
            left -= pieces[-1][1]
        return join(pieces)

    @property
    def num_tokens(self) -> int:
        return self._num_tokens

    @property
    def span(self) -> tuple[int, ...]:
        """The ranks that hold tokens, ascending."""
        return tuple(rank for rank, part in enumerate(self._parts) if part.stored)

    @property
    def last_rank(self) -> int:
        """The rank that holds the highest position, -1 while the table is empty."""
        return self._last_rank

    def stored(self, rank: int) -> int:
        """Tokens stored on ``rank``."""
        return self._part(rank).stored

    def open_slots(self, rank: int) -> int:
        """Unused slots in the blocks held on ``rank``."""
        part = self._part(rank)
        return len(part.blocks) * self.block_size - part.stored

    def blocks(self, rank: int) -> tuple[int, ...]:
        """The block table of ``rank``: its blocks in storage order."""
        return tuple(self._part(rank).blocks)

    def all_blocks(self) -> dict[int, tuple[int, ...]]:
        """Every block held, by rank (ranks with any): what to free when the request ends."""
        return {rank: tuple(part.blocks) for rank, part in enumerate(self._parts) if part.blocks}

    def runs(self, rank: int) -> Runs:
        """The positions stored on ``rank``, in storage order."""
        return tuple(self._part(rank).runs)

    def extents(self, rank: int) -> Extents:
        """The slots of the tokens stored on ``rank``, in storage order."""
        return tuple(self._part(rank).extents)

    def _part(self, rank: int) -> _RankPart:
        if not 0 <= rank < self.num_ranks:
            raise ValueError(f"no rank {rank} among {self.num_ranks}")
        return self._parts[rank]


def new_blocks_needed(table: SequenceTable, rank: int, n: int) -> int:
    """How many new blocks ``rank`` needs to store ``n`` more tokens of this request."""
    if n < 0:
        raise ValueError(f"cannot store {n} tokens on rank {rank}")
    return max(0, -(-(n - table.open_slots(rank)) // table.block_size))


def _extend_fused(runs: list[Run], more: Runs) -> None:
    """Append runs that are fused among themselves; only the border with what is there can fuse."""
    if runs and more:
        more = (*join((runs.pop(), more[0])), *more[1:])
    runs.extend(more)
