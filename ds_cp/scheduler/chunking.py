"""The next chunk of a prompt: its length, the rank that computes each token, the block that stores
it. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ds_cp.cost import LayerWindows
from ds_cp.kv.table import SequenceTable
from ds_cp.layout import Home, Run, Runs, assign, join, split_capped, split_even
from ds_cp.plan import Chunk
from ds_cp.scheduler.mode_policy import ModePolicy
from ds_cp.scheduler.request import Request

LEVEL = 1.1  # ratio of the largest share to the mean; up to it each home computes its own tokens
MIN_SHARE = 4  # new tokens per rank, below which spreading the work is not worth moving KV
MOST_TURNS = 8  # orders of the ranks that are tried for one chunk


@dataclass(frozen=True)
class Cut:
    """A chunk, how many of its tokens each rank computes, and how many (query, key) pairs each
    attends in a layer, on the mean of the layers."""

    chunk: Chunk
    owned: tuple[int, ...]
    pairs: tuple[float, ...]


def cut_chunk(
    request: Request,
    left: Sequence[int],
    layout: str,
    policy: ModePolicy,
    most: int | None = None,
    pairs: Sequence[float] = (),
) -> Cut | None:
    """Cut the next chunk and enter it in the request's table; None when no budget is left.

    ``left[r]``: tokens that rank r may compute in this step; ``most``: a limit to all together;
    ``pairs[r]``: queries times keys that rank r attends already in this step.
    """
    table, workers = request.table, request.workers
    assert table is not None
    least = min(left[rank] for rank in workers)
    new = min(request.num_tokens - table.num_tokens, least * len(workers))
    new = _whole_blocks(table, new if most is None else min(new, most), request, len(workers))
    if new <= 0:
        return None
    start, num_ranks = table.num_tokens, len(left)
    homes = _take_homes(request, table.blocks_for(new), layout, policy.windows, pairs)
    home_runs = _runs_by_rank(table, homes, start, new, num_ranks)
    held = [sum(length for _, length in runs) for runs in home_runs]
    q_runs = home_runs
    if not _home_computes(held, new, workers, left):
        shares = iter(split_even(new, len(workers)))
        owned = [next(shares) if rank in workers else 0 for rank in range(num_ranks)]
        q_runs = assign(layout, start, owned, 1)
    table.append(homes, new)
    ranks = {rank for rank, runs in enumerate(q_runs) if runs} | set(table.span)
    share = max(map(table.num_blocks, table.span)) / len(table.homes)
    choice = policy.decide(len(ranks), new, start, share)
    request.why_mode = choice.why
    chunk = Chunk(
        request.number, choice.mode, choice.ring_pass,
        tuple((rank, runs) for rank, runs in enumerate(q_runs) if runs),
        tuple(homes), table.num_tokens == request.num_tokens,
    )  # fmt: skip
    owned = [sum(length for _, length in runs) for runs in q_runs]
    return Cut(chunk, tuple(owned), tuple(map(policy.windows.pairs, q_runs)))


def _whole_blocks(table: SequenceTable, new: int, request: Request, workers: int) -> int:
    """A chunk that is not the last ends with a block where that costs little, so that the next one
    can again be dealt out in blocks."""
    end, size = table.num_tokens + new, table.block_size
    if workers > 1 and end < request.num_tokens and new >= 2 * size * workers:
        return end // size * size - table.num_tokens
    return new


def _take_homes(
    request: Request, count: int, layout: str, windows: LayerWindows, pairs: Sequence[float]
) -> list[Home]:
    """The next ``count`` of the reserved blocks, from each rank in proportion, laid out so that
    causal work is level. Short prompts cannot be level by themselves, so who attends least in this
    step gets the places that cost most. Among equals the order turns with the request, because the
    rank of the last block decodes, and that should not be the same for all."""
    ranks = sorted(request.reserved)
    turn = request.number % len(ranks) if ranks else 0
    ranks = [*ranks[turn:], *ranks[:turn]]
    if len({pairs[rank] for rank in ranks if pairs}) > 1:
        ranks = _levelled(count, request, ranks, layout, windows, pairs)
    have = [len(request.reserved[rank]) for rank in ranks]
    counts = split_capped(count, have, have)
    at: dict[int, Home] = {}
    for rank, n, runs in zip(ranks, counts, assign(layout, 0, counts, 1), strict=True):
        blocks, request.reserved[rank] = request.reserved[rank][:n], request.reserved[rank][n:]
        if not request.reserved[rank]:
            del request.reserved[rank]
        indexes = (i for start, length in runs for i in range(start, start + length))
        for index, block in zip(indexes, blocks, strict=True):
            at[index] = (rank, block)
    return [at[index] for index in range(count)]


def _levelled(
    count: int, request: Request, ranks: Sequence[int], layout: str, windows: LayerWindows,
    pairs: Sequence[float],
) -> list[int]:  # fmt: skip
    """``ranks`` in the order, of a few, that leaves the busiest one with the least to attend: who
    has the fewest ``pairs`` at the dearest place, and so on, or one turned like this."""
    assert request.table is not None
    size, past = request.table.block_size, len(request.table.homes)

    def work(runs: Runs) -> float:
        return windows.pairs([(start * size, n * size) for start, n in runs])

    cost = [work(runs) for runs in assign(layout, past, split_even(count, len(ranks)), 1)]
    places = sorted(range(len(ranks)), key=lambda place: -cost[place])
    order = dict(zip(places, sorted(ranks, key=lambda rank: pairs[rank]), strict=True))
    first = [order[place] for place in range(len(ranks))]

    def busiest(order: Sequence[int]) -> float:
        have = [len(request.reserved[rank]) for rank in order]
        runs = assign(layout, past, split_capped(count, have, have), 1)
        return max(pairs[rank] + work(mine) for rank, mine in zip(order, runs, strict=True))

    turns = range(min(len(first), MOST_TURNS))
    return min(([*first[turn:], *first[:turn]] for turn in turns), key=busiest)


def _runs_by_rank(
    table: SequenceTable, homes: Sequence[Home], start: int, new: int, num_ranks: int
) -> tuple[Runs, ...]:
    """The new positions by the rank that stores them: the open block first, then ``homes``."""
    runs: list[list[Run]] = [[] for _ in range(num_ranks)]
    at, end, size = start, start + new, table.block_size
    in_open = min(table.open_slots, new)
    if in_open:
        runs[table.last_rank].append((at, in_open))
        at += in_open
    for rank, _ in homes:
        runs[rank].append((at, min(size, end - at)))
        at += size
    return tuple(join(found) for found in runs)


def _home_computes(
    held: Sequence[int], new: int, workers: Sequence[int], left: Sequence[int]
) -> bool:
    """Whether each token is computed where it is stored: always on one rank; else if that is level,
    or there is too little to share, and the budgets allow it. Otherwise equal shares are computed
    and KV travels to its home once."""
    if any(n > left[rank] for rank, n in enumerate(held)):
        return False
    if any(n and rank not in workers for rank, n in enumerate(held)):
        return False
    fair = new / len(workers)
    return len(workers) == 1 or max(held) <= LEVEL * fair or fair < MIN_SHARE
