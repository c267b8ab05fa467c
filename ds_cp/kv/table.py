"""Where one request's KV lives: block by block of the sequence, each with one home. Integers only.

Block i holds the positions ``i * block_size`` to ``(i + 1) * block_size - 1``, on whichever rank,
so that a block means the same for every request that begins with the same tokens. A *slot* is one
token's place in a rank's pool: ``block * block_size + place in the block``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice

from ds_cp.layout import Blocks, Home, Run, Runs, join

NEAR = 64  # blocks at the end of a sequence that ``newest_on`` looks at


class SequenceTable:
    """The homes of one sequence's blocks, and how many of its tokens are stored in them.

    Kept alike by the scheduler and by every rank. ``homes`` cover ``num_tokens`` exactly: there is
    no block without a token. Raises ``ValueError`` when they do not.
    """

    __slots__ = ("_blocks", "_newest", "_on", "block_size", "homes", "num_tokens")

    def __init__(self, block_size: int, homes: Iterable[Home] = (), num_tokens: int = 0) -> None:
        self.block_size = block_size
        self.homes: list[Home] = list(homes)
        self.num_tokens = num_tokens
        self._on: dict[int, int] = {}  # rank -> blocks there
        for rank, _ in self.homes:
            self._on[rank] = self._on.get(rank, 0) + 1
        self._blocks: dict[int, Blocks] | None = None
        self._newest: dict[int, int] | None = None  # rank -> index of its newest block
        if not 0 <= num_tokens <= len(self.homes) * block_size:
            raise ValueError(
                f"{len(self.homes)} blocks of {block_size} do not hold {num_tokens} tokens"
            )

    @property
    def open_slots(self) -> int:
        """Unused slots in the last block."""
        return len(self.homes) * self.block_size - self.num_tokens

    @property
    def span(self) -> tuple[int, ...]:
        """The ranks that hold blocks, ascending."""
        return tuple(sorted(self._on))

    @property
    def width(self) -> int:
        """How many ranks hold blocks."""
        return len(self._on)

    @property
    def last_rank(self) -> int:
        """The rank of the newest block, -1 while there is none."""
        return self.homes[-1][0] if self.homes else -1

    def newest_on(self, rank: int) -> Home | None:
        """The newest block on ``rank``; None when none of the last ``NEAR`` blocks is there."""
        if rank in self._on:
            for home in islice(reversed(self.homes), NEAR):
                if home[0] == rank:
                    return home
        return None

    def ranks_from(self, index: int) -> int:
        """How many ranks hold some of the blocks from ``index`` on."""
        if self._newest is None:
            self._newest = {rank: at for at, (rank, _) in enumerate(self.homes)}
        count = 0
        for newest in self._newest.values():
            count += newest >= index
        return count

    def num_blocks(self, rank: int) -> int:
        """Blocks held on ``rank``."""
        return self._on.get(rank, 0)

    def append(self, homes: Sequence[Home], tokens: int) -> None:
        """Store ``tokens`` more: in the open slots first, then in the blocks ``homes``, in order.

        Raises ValueError, with nothing changed, unless these are exactly as many as needed.
        """
        needed = self.blocks_for(tokens)
        if len(homes) != needed:
            raise ValueError(
                f"{tokens} tokens with {self.open_slots} open slots "
                f"need {needed} new blocks of {self.block_size}, got {len(homes)}"
            )
        for rank, _ in homes:
            self._on[rank] = self._on.get(rank, 0) + 1
        if self._newest is not None:
            for at, (rank, _) in enumerate(homes, len(self.homes)):
                self._newest[rank] = at
        self.homes.extend(homes)
        begin = self.num_tokens
        self.num_tokens += tokens
        if self._blocks is not None:
            self._enter(begin, self.num_tokens, self._blocks)

    def append_one(self) -> None:
        """Store one more token in an open slot, which the caller knows to be there: the fast path
        of a decode."""
        self.num_tokens += 1
        if self._blocks is not None:
            self._enter(self.num_tokens - 1, self.num_tokens, self._blocks)

    def blocks_for(self, tokens: int) -> int:
        """How many new blocks ``tokens`` more tokens need."""
        return max(0, -(-(tokens - self.open_slots) // self.block_size))

    def replace(self, index: int, home: Home) -> None:
        """Block ``index`` has another home from now on."""
        old = self.homes[index][0]
        self.homes[index] = home
        self._on[home[0]] = self._on.get(home[0], 0) + 1
        self._on[old] -= 1
        if not self._on[old]:
            del self._on[old]
        self._blocks = self._newest = None

    def blocks_on(self, rank: int) -> Blocks:
        """The blocks that ``rank`` holds, by position. The same object, updated, from call to call:
        the caller copies what it keeps."""
        if self._blocks is None:
            self._blocks = {}
            self._enter(0, self.num_tokens, self._blocks)
        return self._blocks.get(rank) or Blocks()

    def runs_on(self, rank: int, start: int = 0) -> Runs:
        """The positions from ``start`` on that ``rank`` holds."""
        runs: list[Run] = []
        index, size = start // self.block_size, self.block_size
        for at, (home, _) in enumerate(self.homes[index:], index):
            if home == rank:
                low, high = max(at * size, start), min((at + 1) * size, self.num_tokens)
                runs.append((low, high - low))
        return join(runs)

    def slot(self, position: int) -> tuple[int, int]:
        """``(rank, slot)`` of the token at ``position``."""
        rank, block = self.homes[position // self.block_size]
        return rank, block * self.block_size + position % self.block_size

    def _enter(self, begin: int, end: int, blocks: dict[int, Blocks]) -> None:
        """Add the positions from ``begin`` to ``end`` to what each rank holds."""
        size = self.block_size
        while begin < end:
            index, place = divmod(begin, size)
            count = min(size - place, end - begin)
            rank, block = self.homes[index]
            if place:
                blocks[rank].fill(count)
            else:
                blocks.setdefault(rank, Blocks()).append(block, begin, count)
            begin += count
