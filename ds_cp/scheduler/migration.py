"""Moves blocks between ranks, to empty one that is drained or to even out all. No torch."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from ds_cp.errors import CapacityError, RequestError
from ds_cp.layout import Home
from ds_cp.plan import Transfer
from ds_cp.scheduler.block_manager import BlockManager
from ds_cp.scheduler.reasons import SpanReason
from ds_cp.scheduler.request import Request

MOVES_PER_STEP = 8  # blocks moved in one step, at most, so that decodes go on meanwhile
LOPSIDED = 0.1  # difference of two ranks' shares of used blocks that ``rebalance`` leaves alone


@dataclass
class _Move:
    """``blocks`` of a request that should leave ``sources`` for ``target``; ``whole``: all that it
    has there when the move is made, since it is or becomes local."""

    request: Request
    sources: tuple[int, ...]
    target: int
    blocks: int
    whole: bool


class Migration:
    """Turns a drain or a rebalance into a few transfers per step.

    All blocks of a request that are to move get their new homes in one allocation, so that they are
    adjacent there, and are then moved a few per step (``Request.moving``).
    """

    def __init__(self, blocks: BlockManager) -> None:
        self._blocks = blocks
        self._wishes: deque[_Move] = deque()
        self._moving: deque[Request] = deque()  # requests with new homes reserved, in order
        self.num_moved = 0

    def drain(self, rank: int, live: Sequence[Request]) -> None:
        """Close ``rank``: nothing new is placed there and what is there moves, step by step.

        ``live``: every request that runs or waits. Raises ``RequestError`` when there is no such
        rank, ``CapacityError`` when it is the last open one, or some request could not finish on
        the others.
        """
        blocks = self._blocks
        self._check(rank)
        if rank in blocks.drained:
            return
        blocks.drain(rank)
        largest = blocks.largest_tokens
        if not largest:  # also when nothing runs: every request to come would be refused
            blocks.reopen(rank)
            way_out = "reopen another one first" if blocks.num_ranks > 1 else "stop the job instead"
            raise CapacityError(
                f"rank {rank} cannot be drained: it is the last open one, without it there is room "
                f"for 0 tokens, and every request needs 1 or more; {way_out}",
                need=1, have=0, largest=0, param="rank",
            )  # fmt: skip
        for request in live:
            need = request.max_need
            if need > largest:
                blocks.reopen(rank)
                raise CapacityError(
                    f"rank {rank} cannot be drained now: "
                    f"request {request.request_id} may need KV for {need} tokens "
                    f"and the other ranks hold {largest}; wait until it ends",
                    need=need, have=largest, largest=largest,
                )  # fmt: skip
        blocks.allocator.drop_cached(rank)
        blocks.host.tier.empty_rank(rank)

    def reopen(self, rank: int) -> None:
        """Let ``rank`` hold new blocks again; what has not moved away yet stays."""
        self._check(rank)
        self._blocks.reopen(rank)
        for request in self._moving:
            staying = [i for i, (source, _) in request.moving.items() if source[0] == rank]
            self._blocks.allocator.release([request.moving.pop(i)[1] for i in staying])

    def rebalance(self, running: Sequence[Request]) -> int:
        """Plan moves: decoding requests that span without need become local, then blocks go from
        the fullest rank to the emptiest until they are level. Returns the number of blocks. Local
        requests move whole or not at all."""
        blocks = self._blocks
        capacity = blocks.open_blocks
        used = [blocks.allocator.num_used(r) for r in range(blocks.num_ranks)]
        ranks = [r for r in range(blocks.num_ranks) if capacity[r]]
        self._wishes.clear()
        moving = self._gather(running, used)
        gathered = {id(wish.request) for wish in self._wishes}
        movable = {
            r: [
                q for q in running
                if q.table is not None and q.table.num_blocks(r) and id(q) not in gathered
            ]
            for r in ranks
        }  # fmt: skip
        while len(ranks) > 1:
            source = max(ranks, key=lambda r: used[r] / capacity[r])
            target = min(ranks, key=lambda r: used[r] / capacity[r])
            gap = used[source] / capacity[source] - used[target] / capacity[target]
            if gap <= LOPSIDED:
                break
            level = gap / (1 / capacity[source] + 1 / capacity[target])  # blocks that make it even
            wish = self._best(movable[source], source, target, int(level))
            if wish is None:
                ranks.remove(source)
                continue
            movable[source].remove(wish.request)
            self._wishes.append(wish)
            used[source] -= wish.blocks
            used[target] += wish.blocks
            moving += wish.blocks
        return moving

    def _gather(self, running: Sequence[Request], used: list[int]) -> int:
        """Plan to make requests local that span without need: on a rank that the request is on, if
        that has room for the rest and for one more block. Returns the number of blocks."""
        blocks, moving = self._blocks, 0
        room = blocks.room()
        for request in running:
            if not blocks.gathers(request):
                continue
            table = request.table
            assert table is not None
            for target in sorted(table.span, key=table.num_blocks, reverse=True):
                rest = len(table.homes) - table.num_blocks(target)
                if room[target] > rest:
                    break
            else:
                continue
            room[target] -= rest
            sources = tuple(rank for rank in table.span if rank != target)
            self._wishes.append(_Move(request, sources, target, rest, True))
            for source in sources:
                used[source] -= table.num_blocks(source)
            used[target] += rest
            moving += rest
        return moving

    def _best(self, requests: list[Request], source: int, target: int, level: int) -> _Move | None:
        """The largest move from ``source`` of at most ``level`` blocks."""
        best: _Move | None = None
        for request in requests:
            assert request.table is not None
            count = request.table.num_blocks(source)
            whole = request.table.width == 1
            if whole and request.prefilling:
                continue  # the rest of its prompt goes where the blocks and the work for it are
            if not whole:
                count = min(count, level)
            if 0 < count <= level and (best is None or count > best.blocks):
                best = _Move(request, (source,), target, count, whole)
        return best

    @property
    def is_moving(self) -> bool:
        """Whether there may be something to move."""
        return bool(self._blocks.drained or self._wishes or self._moving)

    def transfers(self, running: Sequence[Request]) -> tuple[list[Transfer], bool]:
        """The next few moves, entered in tables and allocator, and whether one is stuck for want
        of room."""
        moves: list[Transfer] = []
        self._carry(running, moves)
        for rank in self._blocks.drained:
            for request in running:
                if len(moves) >= MOVES_PER_STEP:
                    return moves, False
                fits = self._empty(request, rank)
                self._carry(running, moves)
                if not fits:
                    return moves, True
        while self._wishes and len(moves) < MOVES_PER_STEP:
            self._grant(self._wishes[0], running)
            self._carry(running, moves)
        return moves, False

    def _carry(self, running: Sequence[Request], moves: list[Transfer]) -> None:
        """Move blocks whose new homes are reserved, as many as this step may."""
        blocks = self._blocks
        while self._moving:
            request = self._moving[0]
            table = request.table
            assert table is not None
            for index in sorted(request.moving):
                if len(moves) >= MOVES_PER_STEP and not blocks.only_local:
                    return
                source, target = request.moving.pop(index)
                if table.homes[index] == source and target[0] not in blocks.closed:
                    moves += self._move(request, index, target, running)
                else:  # it was copied on write, or moved with another request that shares it
                    blocks.allocator.release([target])
            self._moving.popleft()

    def _empty(self, request: Request, rank: int) -> bool:
        """Reserve new homes for all that a request has on a closed rank; False for no room."""
        table, blocks = request.table, self._blocks
        assert table is not None
        if not (table.num_blocks(rank) or rank in request.reserved or rank in request.workers):
            return True
        ranks = self._ranks(request)
        if not ranks:
            return False
        indexes = [
            i for i, home in enumerate(table.homes) if home[0] == rank and i not in request.moving
        ]
        rest = len(request.reserved.get(rank, ()))
        room = blocks.room()
        if sum(room[r] for r in ranks) < rest:
            return False
        held = request.reserved.pop(rank, [])
        blocks.allocator.release([(rank, block) for block in held])
        together = len(indexes) + rest <= room[ranks[0]]
        if not together:
            self._reserve(request, (), ranks, rest)
        if rank in request.workers:
            left = {r for r in request.workers if r != rank} | set(request.reserved)
            request.workers = tuple(sorted(left - blocks.closed)) or (ranks[0],)
        return self._reserve(request, indexes, ranks, rest if together else 0)

    def _ranks(self, request: Request) -> list[int]:
        """The ranks to which a request's blocks should go, best first: one that can hold all of
        them, then those that it is on."""
        blocks, table = self._blocks, request.table
        assert table is not None
        room = blocks.room()
        there = [
            table.num_blocks(rank) + len(request.reserved.get(rank, ()))
            for rank in range(blocks.num_ranks)
        ]
        for _, target in request.moving.values():
            there[target[0]] += 1
        all_blocks = len(table.homes) + sum(map(len, request.reserved.values()))
        fits = [
            rank for rank in range(blocks.num_ranks)
            if rank not in blocks.closed and room[rank] >= all_blocks - there[rank]
        ]  # fmt: skip
        best = max(fits, key=lambda rank: (there[rank], room[rank]), default=None)
        if blocks.only_local:  # whole or not at all, and in one step
            return [] if best is None else [best]
        ranked = sorted(range(blocks.num_ranks), key=lambda r: (not table.num_blocks(r), -room[r]))
        return ranked if best is None else [best, *(r for r in ranked if r != best)]

    def _reserve(
        self, request: Request, indexes: Sequence[int], ranks: Sequence[int], rest: int
    ) -> bool:
        """Allocate new homes for the blocks ``indexes`` and for ``rest`` more of its prompt, on the
        first of ``ranks`` as far as that has room, then on the next. False when not all fit."""
        room = self._blocks.room()
        left = list(indexes)
        for rank in ranks:
            here, left = left[: room[rank]], left[room[rank] :]
            more = min(rest, room[rank] - len(here)) if not left else 0
            rest -= more
            if here or more:
                self._reserve_on(request, rank, here, more)
        return not left and not rest

    def _reserve_on(self, request: Request, rank: int, indexes: Sequence[int], rest: int) -> None:
        """New homes on ``rank``: one run for blocks between which the request has none there."""
        table = request.table
        assert table is not None
        moving, end = set(indexes), len(table.homes)
        runs: list[tuple[Home | None, list[int]]] = []  # the block before it there, its indexes
        before: Home | None = None
        follows = False  # whether the last block on ``rank`` so far is a new one
        places: list[Home | None] = [*table.homes, *[None] * rest]
        for index, home in enumerate(places):
            if index in moving or home is None:
                if not follows:
                    runs.append((before, []))
                runs[-1][1].append(index)
                follows = True
            elif home[0] == rank:
                before, follows = home, False
        for beside, run in sorted(runs, key=lambda found: -len(found[1])):
            taken = self._blocks.run_on(rank, len(run), beside, grows=run[-1] == end + rest - 1)
            for index, block in zip(run, taken, strict=True):
                if index < end:
                    request.moving[index] = table.homes[index], (rank, block)
                else:
                    request.reserved.setdefault(rank, []).append(block)
        if indexes and request not in self._moving:
            self._moving.append(request)

    def _grant(self, wish: _Move, running: Sequence[Request]) -> None:
        """Reserve new homes for the first wish; drop it when it is done or has become
        impossible."""
        request, table, target = wish.request, wish.request.table, wish.target
        count = 0
        if request in running and table is not None:
            here = [i for i, home in enumerate(table.homes) if home[0] in wish.sources]
            room = self._blocks.room()[target]  # 0 when it was closed meanwhile
            if not wish.whole:
                count = min(wish.blocks, len(here), room)
            elif not request.prefilling and len(here) <= room:
                count = len(here)
            self._reserve(request, here[:count], [target], 0)
            wish.blocks -= count
        if not count or (wish.blocks <= 0 and not wish.whole):
            self._wishes.popleft()

    def _move(
        self, request: Request, index: int, target: Home, running: Sequence[Request]
    ) -> list[Transfer]:
        """Block ``index`` of a request, and of all that share it, is at ``target`` from now on.
        Where all must be local, the others keep theirs: the rest of them is there."""
        assert request.table is not None
        allocator = self._blocks.allocator
        source = request.table.homes[index]
        holders = [request]
        if allocator.references(source) > 1 and not self._blocks.only_local:
            holders = [
                r for r in running
                if r.table and index < len(r.table.homes) and r.table.homes[index] == source
            ]  # fmt: skip
        for _ in holders[1:]:
            allocator.share(target)
        allocator.move_key(source, target)
        allocator.release([source] * len(holders))
        for holder in holders:
            assert holder.table is not None
            holder.table.replace(index, target)
            holder.decode_key, holder.why_span = None, SpanReason.MOVED
        self.num_moved += 1
        return self._blocks.host.copies(tuple(r.number for r in holders), index, source, target)

    def forget(self, request: Request) -> None:
        """The request has left its blocks."""
        if request in self._moving:
            self._moving.remove(request)

    def _check(self, rank: int) -> None:
        if not 0 <= rank < self._blocks.num_ranks:
            raise RequestError(
                f"there is no context-parallel rank {rank}; there are {self._blocks.num_ranks}",
                "rank",
            )
