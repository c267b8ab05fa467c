"""Which positions of a sequence a rank holds: pure integer arithmetic over runs of positions.

A *run* is ``(start, length)``: the positions ``start .. start + length - 1``. *Runs* are listed in
storage order, the order in which a rank keeps those tokens. An *assignment* is one ``Runs`` per
rank. A *home* is ``(rank, rank-local block number)``: where one KV block is stored. Extents, runs
of slots instead of positions, are ``Runs`` too.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

Run = tuple[int, int]
Runs = tuple[Run, ...]
Home = tuple[int, int]

LAYOUTS = ("zigzag", "contiguous")


def host_place(rank: int, slot: int) -> Home:
    """Where a block lies that is kept in ``slot`` (0 and up) of the rank's host memory."""
    return rank, -1 - slot


def on_host(home: Home) -> bool:
    """Whether ``home`` is a place in host memory, not a block of the pool."""
    return home[1] < 0


def host_slot(number: int) -> int:
    """The slot that the (negative) number of a host place means."""
    return -1 - number


class Block(NamedTuple):
    """One block of keys: its number in a rank's pages, the position of its first key, and how many
    keys it holds. Key j is at position ``first + j``."""

    number: int
    first: int
    keys: int


class Blocks:
    """Blocks of one request on one rank, ascending by position, kept as three vectors of integers
    so that a step copies them at once. ``num_keys``: the sum of ``keys``."""

    __slots__ = ("firsts", "keys", "num_keys", "numbers")

    def __init__(self, blocks: Iterable[Block] = ()) -> None:
        self.numbers, self.firsts, self.keys = array("q"), array("q"), array("q")
        self.num_keys = 0
        for block in blocks:
            self.append(*block)

    def append(self, number: int, first: int, keys: int) -> None:
        """Add a block behind the others."""
        self.numbers.append(number)
        self.firsts.append(first)
        self.keys.append(keys)
        self.num_keys += keys

    def fill(self, keys: int) -> None:
        """Put ``keys`` more keys into the last block."""
        self.keys[-1] += keys
        self.num_keys += keys

    def where(self, low: int, high: int) -> tuple[int, int]:
        """Indices, begin and end, of the blocks with some position in ``low .. high - 1``; both the
        same when there is none, as when ``high <= low``."""
        end = bisect_left(self.firsts, high)
        begin = min(bisect_right(self.firsts, low), end)
        if low < high and begin and self.firsts[begin - 1] + self.keys[begin - 1] > low:
            begin -= 1
        return begin, end if low < high else begin

    def within(self, low: int, high: int) -> Blocks:
        """The blocks with some position in ``low .. high - 1``, as a new object."""
        begin, end = self.where(low, high)
        return self[begin:end]

    def runs(self) -> Runs:
        """The positions of all keys."""
        return join(zip(self.firsts, self.keys, strict=True))

    def extents(self, block_size: int) -> Runs:
        """The slots of all keys: place j of block b is slot ``b * block_size + j``."""
        return join((b * block_size, n) for b, n in zip(self.numbers, self.keys, strict=True))

    def __len__(self) -> int:
        return len(self.numbers)

    def __iter__(self) -> Iterator[Block]:
        return map(Block, self.numbers, self.firsts, self.keys)

    def __getitem__(self, where: slice) -> Blocks:
        cut = Blocks()
        cut.numbers, cut.firsts = self.numbers[where], self.firsts[where]
        cut.keys = self.keys[where]
        cut.num_keys = sum(cut.keys)
        return cut

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Blocks) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]


def total(runs: Iterable[Run]) -> int:
    """Number of tokens in ``runs``."""
    return sum(length for _, length in runs)


def positions(runs: Iterable[Run]) -> list[int]:
    """Every position of ``runs``, in storage order."""
    return [p for start, length in runs for p in range(start, start + length)]


def join(runs: Iterable[Run]) -> Runs:
    """The same positions in as few runs as possible: empty ones dropped, neighbours fused."""
    joined: list[Run] = []
    for start, length in runs:
        if length == 0:
            continue
        if joined and sum(joined[-1]) == start:
            joined[-1] = (joined[-1][0], joined[-1][1] + length)
        else:
            joined.append((start, length))
    return tuple(joined)


def head(runs: Sequence[Run], n: int) -> Runs:
    """The first ``n`` tokens in storage order. Raises ValueError when ``runs`` hold fewer."""
    kept: list[Run] = []
    left = n
    for start, length in runs:
        if left <= 0:
            break
        kept.append((start, min(length, left)))
        left -= length
    if n < 0 or left > 0:
        raise ValueError(f"cannot cut {n} tokens from runs that hold {total(runs)}")
    return join(kept)


def tail(runs: Sequence[Run], n: int) -> Runs:
    """The last ``n`` tokens in storage order. Raises ValueError when ``runs`` hold fewer."""
    kept: list[Run] = []
    left = n
    for start, length in reversed(runs):
        if left <= 0:
            break
        taken = min(length, left)
        kept.append((start + length - taken, taken))
        left -= taken
    if n < 0 or left > 0:
        raise ValueError(f"cannot cut {n} tokens from runs that hold {total(runs)}")
    return join(reversed(kept))


def overlap(a: Runs, b: Runs) -> Runs:
    """Positions in both, ascending."""
    pieces = [
        (max(s, t), min(s + n, t + m) - max(s, t))
        for s, n in a
        for t, m in b
        if max(s, t) < min(s + n, t + m)
    ]
    return join(sorted(pieces))


def owner_of(assignment: Sequence[Runs], position: int) -> int:
    """The rank whose runs hold ``position``. Raises ValueError when none does."""
    for rank, runs in enumerate(assignment):
        if any(start <= position < start + length for start, length in runs):
            return rank
    raise ValueError(f"position {position} is in none of the {len(assignment)} ranks' runs")


def split_even(n: int, parts: int) -> list[int]:
    """``n`` tokens in ``parts`` shares that differ by one at most, the larger ones first. Raises
    ValueError for ``n`` below 0 or ``parts`` below 1."""
    if n < 0 or parts < 1:
        raise ValueError(f"cannot split {n} tokens into {parts} parts")
    small, larger = divmod(n, parts)
    return [small + (i < larger) for i in range(parts)]


def split_weighted(n: int, weights: Sequence[int]) -> list[int]:
    """``n`` tokens in proportion to whole-number ``weights``: the shares sum to ``n`` exactly.

    Largest-remainder rounding, equal remainders in index order; a weight of zero gets nothing.
    Raises ValueError when a number is negative, or when all weights are zero and there is something
    to split.
    """
    if n < 0 or any(w < 0 for w in weights):
        raise ValueError(f"cannot split {n} tokens by weights {list(weights)}: negative number")
    if n == 0:
        return [0] * len(weights)
    whole = sum(weights)
    if whole == 0:
        raise ValueError(f"cannot split {n} tokens by weights {list(weights)}: all are zero")
    shares = [n * w // whole for w in weights]
    by_remainder = sorted(range(len(weights)), key=lambda i: -(n * weights[i] % whole))
    for i in by_remainder[: n - sum(shares)]:
        shares[i] += 1
    return shares


def split_capped(n: int, weights: Sequence[int], caps: Sequence[int]) -> list[int]:
    """Like :func:`split_weighted`, with share ``i`` at most ``caps[i]``.

    What a cap cuts off goes to the others in proportion to their weights. Raises ValueError when
    the caps of the parts with a weight above zero sum to less than ``n``.
    """
    if len(weights) != len(caps):
        raise ValueError(f"{len(weights)} weights but {len(caps)} caps")
    if n < 0 or any(w < 0 for w in weights) or any(c < 0 for c in caps):
        raise ValueError(f"cannot split {n} by {list(weights)} under {list(caps)}: negative number")
    have = sum(cap for cap, w in zip(caps, weights, strict=True) if w > 0)
    if n > have:
        raise ValueError(f"cannot split {n} tokens: the caps of the weighted parts sum to {have}")
    shares = [0] * len(weights)
    open_parts = [i for i, w in enumerate(weights) if w > 0]
    while n > 0:
        whole = sum(weights[i] for i in open_parts)
        full = [i for i in open_parts if n * weights[i] >= caps[i] * whole]
        if not full:
            # every exact share is below its (whole) cap here, so rounding up cannot pass the cap
            rest = split_weighted(n, [weights[i] for i in open_parts])
            for i, share in zip(open_parts, rest, strict=True):
                shares[i] = share
            break
        for i in full:
            shares[i] = caps[i]
            n -= caps[i]
        open_parts = [i for i in open_parts if i not in full]
    return shares


def zigzag(start: int, counts: Sequence[int], unit: int = 1) -> tuple[Runs, ...]:
    """Lay positions from ``start`` on so that causal work is equal; rank r gets ``counts[r]``.

    Every rank holds a front chunk and a back chunk: the fronts lie in rank order 0 .. N-1, then the
    backs in order N-1 .. 0, so a rank with early (cheap) queries also has late (dear) ones. With
    equal counts these are the usual 2N chunks. The front is half the count rounded to a multiple of
    ``unit`` (half up), so that the blocks of ``unit`` tokens in which a rank stores it hold
    consecutive positions; a rank with less than ``unit`` tokens has a back chunk only. Raises
    ValueError for a count below 0 or ``unit`` below 1.
    """
    if unit < 1 or any(c < 0 for c in counts):
        raise ValueError(f"zigzag needs unit >= 1 and counts >= 0, got {unit} and {list(counts)}")
    fronts = [(c + unit) // (2 * unit) * unit for c in counts]
    front_runs = _lay(start, fronts)
    backs = [c - f for c, f in zip(counts, fronts, strict=True)]
    back_runs = _lay(start + sum(fronts), backs[::-1])[::-1]
    return tuple(join(both) for both in zip(front_runs, back_runs, strict=True))


def contiguous(start: int, counts: Sequence[int]) -> tuple[Runs, ...]:
    """Lay positions from ``start`` on in rank order, ``counts[r]`` in one run on rank r. Raises
    ValueError for a count below 0."""
    if any(c < 0 for c in counts):
        raise ValueError(f"contiguous needs counts >= 0, got {list(counts)}")
    return tuple(join([run]) for run in _lay(start, counts))


def _lay(start: int, lengths: Sequence[int]) -> list[Run]:
    runs: list[Run] = []
    for length in lengths:
        runs.append((start, length))
        start += length
    return runs


def assign(layout: str, start: int, counts: Sequence[int], unit: int) -> tuple[Runs, ...]:
    """The assignment of ``sum(counts)`` positions from ``start`` on under the named layout.

    ``unit`` (tokens, usually the block size) matters to zigzag only: a contiguous share is one run
    in any case. Raises ValueError for a name that is not in ``LAYOUTS``.
    """
    if layout == "zigzag":
        return zigzag(start, counts, unit)
    if layout == "contiguous":
        return contiguous(start, counts)
    raise ValueError(f"unknown layout {layout!r}; known: {', '.join(LAYOUTS)}")
