"""Blocks that change their home on purpose: a rank is drained, or the ranks are made level."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from ds_cp.errors import CapacityError, RequestError
from ds_cp.layout import Home
from ds_cp.plan import Transfer
from ds_cp.scheduler.block_manager import BlockManager
from ds_cp.scheduler.request import Request

MOVES_PER_STEP = 8  # blocks, so that streams go on while a rank is emptied
LOPSIDED = 0.1  # difference in the share of used blocks that is left alone


@dataclass
class _Move:
    """``blocks`` of a request that should leave ``source`` for ``target``; ``whole``: all that it
    has there by then, as it is or becomes local."""

    request: Request
    source: int
    target: int
    blocks: int
    whole: bool


class Migration:
    """Turns the wish to empty or level ranks into a few transfers per step."""

    def __init__(self, blocks: BlockManager) -> None:
        self._blocks = blocks
        self._wishes: deque[_Move] = deque()
        self._targets: dict[int, int] = {}  # request -> where all its blocks go, to stay local
        self.num_moved = 0

    def drain(self, rank: int, live: Sequence[Request]) -> None:
        """Close ``rank``: nothing new is placed there and what is there moves, step by step.

        ``live``: every request that runs or waits. Raises ``RequestError`` when there is no such
        rank, ``CapacityError`` when some request could not finish on the others.
        """
        blocks = self._blocks
        self._check(rank)
        if rank in blocks.closed:
            return
        blocks.closed.add(rank)
        largest = blocks.largest_tokens
        for request in live:
            need = len(request.prompt) + request.max_tokens - 1
            if need > largest:
                blocks.closed.discard(rank)
                raise CapacityError(
                    f"rank {rank} cannot be drained now: request {request.request_id} may need KV "
                    f"for {need} tokens and the other ranks hold {largest}; wait until it ends",
                    need=need, have=largest, largest=largest,
                )  # fmt: skip
        blocks.allocator.drop_cached(rank)

    def reopen(self, rank: int) -> None:
        """Let ``rank`` take blocks again."""
        self._check(rank)
        self._blocks.closed.discard(rank)

    def rebalance(self, running: Sequence[Request]) -> int:
        """Wish for moves: streams that span without need become local, then from the fullest rank
        to the emptiest until they are level. Returns how many blocks. Local requests move whole or
        not at all."""
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
        """Wish for spans that are no longer needed to end: on a rank that the request is on, if
        that has room for the rest and for one more block. Returns how many blocks."""
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
            for source in table.span:
                if source != target:
                    count = table.num_blocks(source)
                    self._wishes.append(_Move(request, source, target, count, True))
                    used[source] -= count
                    used[target] += count
                    moving += count
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
                best = _Move(request, source, target, count, whole)
        return best

    @property
    def is_moving(self) -> bool:
        """Whether there may be something to move."""
        return bool(self._blocks.closed or self._wishes)

    def transfers(self, running: Sequence[Request]) -> tuple[list[Transfer], bool]:
        """The next few moves, done in the books, and whether one is stuck for want of room."""
        moves: list[Transfer] = []
        for rank in self._blocks.closed:
            for request in running:
                if not self._empty(request, rank, running, moves):
                    return moves, True
                if len(moves) >= MOVES_PER_STEP:
                    return moves, False
        while self._wishes and len(moves) < MOVES_PER_STEP:
            self._grant(self._wishes[0], running, moves)
        return moves, False

    def _empty(
        self, request: Request, rank: int, running: Sequence[Request], moves: list[Transfer]
    ) -> bool:
        """Move what a request has on a closed rank, as far as this step may; False for no room."""
        table, blocks = request.table, self._blocks
        assert table is not None
        here = table.num_blocks(rank) or rank in request.reserved or rank in request.workers
        if here and not self._ranks(request):
            return False
        if rank in request.reserved and not self._reserve_elsewhere(request, rank):
            return False
        if rank in request.workers:
            left = {r for r in request.workers if r != rank} | set(request.reserved)
            request.workers = tuple(sorted(left - blocks.closed)) or (self._ranks(request)[0],)
        if not table.num_blocks(rank):
            return True
        for index in [i for i, home in enumerate(table.homes) if home[0] == rank]:
            if len(moves) >= MOVES_PER_STEP and not blocks.only_local:
                return True
            beside = table.homes[index - 1] if index else None
            target = blocks.block_on(self._ranks(request), beside)
            if target is None:
                return False
            moves.append(self._move(request, index, target, running))
        return True

    def _reserve_elsewhere(self, request: Request, rank: int) -> bool:
        blocks = request.reserved[rank]
        wanted: list[Home] = []
        ranks = self._ranks(request)  # once: what is taken below counts as room no more
        for _ in blocks:
            home = self._blocks.block_on(ranks)
            if home is None:
                self._blocks.allocator.release(wanted)
                return False
            wanted.append(home)
        self._blocks.allocator.release([(rank, block) for block in blocks])
        del request.reserved[rank]
        for target, block in wanted:
            request.reserved.setdefault(target, []).append(block)
        return True

    def _ranks(self, request: Request) -> list[int]:
        """Where a request's blocks should go: all to one rank if that can hold them, else first to
        ranks that it is on."""
        blocks, table = self._blocks, request.table
        assert table is not None
        room = blocks.room()
        all_blocks = len(table.homes) + sum(map(len, request.reserved.values()))

        def holds(rank: int) -> bool:
            there = table.num_blocks(rank) + len(request.reserved.get(rank, ()))
            return rank not in blocks.closed and room[rank] >= all_blocks - there

        target = self._targets.pop(request.number, None)
        if target is None or not holds(target):
            fits = [rank for rank in range(blocks.num_ranks) if holds(rank)]
            target = max(fits, key=room.__getitem__, default=None)
        if target is not None:
            self._targets[request.number] = target
        if blocks.only_local:  # whole or not at all, and in one step
            return [] if target is None else [target]
        ranked = sorted(range(blocks.num_ranks), key=lambda r: (not table.num_blocks(r), -room[r]))
        return ranked if target is None else [target, *(r for r in ranked if r != target)]

    def _grant(self, wish: _Move, running: Sequence[Request], moves: list[Transfer]) -> None:
        """Do a part of the first wish; drop it when it is done or has become impossible."""
        request, table, blocks = wish.request, wish.request.table, self._blocks
        gone = request not in running or table is None or wish.target in blocks.closed
        if not gone and table is not None:
            here = [i for i, home in enumerate(table.homes) if home[0] == wish.source]
            wish.blocks = len(here) if wish.whole else min(wish.blocks, len(here))
            at_once = MOVES_PER_STEP - len(moves)
            if blocks.only_local:  # whole or not at all, and in one step
                fits = not request.prefilling and wish.blocks <= blocks.room()[wish.target]
                at_once = wish.blocks if fits else 0
                gone = not fits
            for index in here[: min(at_once, wish.blocks)]:
                target = blocks.block_on([wish.target])
                if target is None:
                    gone = True
                    break
                moves.append(self._move(request, index, target, running))
                wish.blocks -= 1
        if gone or not wish.blocks:
            self._wishes.popleft()

    def _move(
        self, request: Request, index: int, target: Home, running: Sequence[Request]
    ) -> Transfer:
        """Block ``index`` of a request, and of all who share it, is at ``target`` from now on.
        Where all must be local, those who share it keep theirs: the rest of them is there."""
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
            holder.decode_key = None
        self.num_moved += 1
        return Transfer(tuple(r.number for r in holders), index, source, target)

    def forget(self, request: Request) -> None:
        """The request is gone."""
        self._targets.pop(request.number, None)

    def _check(self, rank: int) -> None:
        if not 0 <= rank < self._blocks.num_ranks:
            raise RequestError(
                f"there is no context-parallel rank {rank}; there are {self._blocks.num_ranks}",
                "rank",
            )
