"""Takes requests back to what is certain after ranks have lost their KV. No torch.

What a step in flight writes is *unsure*: nobody has said that it was done. What lay on a lost rank
is gone. A request keeps the blocks before the first of these, and the tokens in them; from there
on it is a prompt again, of all tokens that are known. The blocks that it had for the rest, those
on a lost rank among them, it gets again: the rank has as many, empty, once its worker is back.
For those on a rank that is away it gets others, elsewhere.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import NamedTuple

from ds_cp.kv.table import SequenceTable
from ds_cp.layout import Home, on_host
from ds_cp.scheduler.block_manager import BlockManager
from ds_cp.scheduler.draft import Draft
from ds_cp.scheduler.migration import Migration
from ds_cp.scheduler.request import Request


class Flight(NamedTuple):
    """A step that was planned and is not known to have ended: its decodes, the most work of a rank
    on prompts, the blocks that it writes, each with the first place that it writes there, and the
    requests that it computes, each with the number of its tokens that are computed then. What it
    writes on the host ``HostMoves`` knows."""

    decodes: int = 0
    work: float = 0.0
    written: tuple[tuple[Home, int], ...] = ()
    reached: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of(cls, draft: Draft) -> Flight:
        """The step that was drafted."""
        copies = [(t.target, 0) for t in draft.transfers if not on_host(t.target)]
        written, reached = (*draft.written, *copies), tuple(draft.reached.items())
        if draft.restores:  # the pacer learns nothing of a step that also copies from the host
            return cls(written=written, reached=reached)
        return cls(draft.num_decodes, draft.largest_work, written, reached)


class Recovery:
    """Rewinds requests. ``lost``: ranks whose blocks are empty, beside those that are away, as
    ``blocks`` says; ``flights``: steps that were planned and not reported."""

    def __init__(
        self,
        blocks: BlockManager,
        migration: Migration,
        lost: Collection[int],
        flights: Iterable[Flight],
    ) -> None:
        self._blocks = blocks
        self._allocator = blocks.allocator
        self._migration = migration
        self._lost = {*lost, *blocks.away}
        self._unsure: dict[Home, int] = {}  # first place whose content is not certain
        self._claimed: set[Home] = set()  # shared blocks that one holder has kept for itself
        for flight in flights:
            for home, place in flight.written:
                self._unsure[home] = min(place, self._unsure.get(home, place))

    def forget_prefixes(self) -> None:
        """Nobody finds a block any more whose content is gone or unsure."""
        for rank in self._lost:
            self._allocator.forget_rank(rank)
        for home in self._unsure:
            self._allocator.forget(home)

    def rewind(self, request: Request) -> bool:
        """Make a running request a prompt from its first token on that is not certain. False when
        it is to be preempted: for want of room for the rest, or since others have kept blocks that
        it shared with them."""
        table, size = request.table, self._allocator.block_size
        assert table is not None
        span, valid = table.span, self._valid(table)
        kept = -(-valid // size)
        if valid % size and self._allocator.references(table.homes[kept - 1]) > 1:
            kept -= 1  # another request's next token goes there too
            valid = kept * size
        self._migration.forget(request)
        self._allocator.release([target for _, target in request.moving.values()])
        request.moving = {}
        for rank in self._blocks.away & request.reserved.keys():
            self._allocator.release([(rank, block) for block in request.reserved.pop(rank)])
        near = self._reserve_own(request, table.homes[kept:])
        table = request.table = SequenceTable(size, table.homes[:kept], valid)
        request.in_flight, request.prefilling, request.decode_key = 0, True, None
        request.shares_tail = False
        request.num_keyed = min(request.num_keyed, valid // size)
        if len(near) > 1 and request.keys is not None:
            return False  # it shares them again once their first holder computes them
        if not self._fit(request, -(-request.num_tokens // size) - kept, near):
            return False
        homes = {*request.reserved, *((table.last_rank,) if valid % size else ())}
        if len(span) > 1 or len(homes) > 1:
            homes.update(rank for rank in span if rank not in self._blocks.closed)
        request.workers = tuple(sorted(homes))
        return True

    def _valid(self, table: SequenceTable) -> int:
        """The tokens from the first on that are certain to be stored."""
        size = table.block_size
        for index, home in enumerate(table.homes):
            if home[0] in self._lost:
                return index * size
            if (place := self._unsure.get(home)) is not None:
                return min(index * size + place, table.num_tokens)
        return table.num_tokens

    def _reserve_own(self, request: Request, homes: Iterable[Home]) -> list[int]:
        """Keep for the same request, and other tokens, the blocks that nobody shares, and of those
        whose content is gone the ones that no other holder has kept before. Returns the ranks of
        the rest, which is given up."""
        given_up = []
        for home in homes:
            rank, block = home
            if rank in self._blocks.away:
                self._allocator.release([home])
                continue
            shared = self._allocator.references(home) > 1
            if shared and (home in self._claimed or not self._is_gone(home)):
                self._allocator.release([home])
                given_up.append(rank)
                continue
            if shared:
                self._claimed.add(home)
            self._allocator.forget(home)
            request.reserved.setdefault(rank, []).append(block)
        return given_up

    def _is_gone(self, home: Home) -> bool:
        """Whether all holders of a block have to give it up: none can use what it holds."""
        return home[0] in self._lost or home in self._unsure

    def _fit(self, request: Request, need: int, near: list[int]) -> bool:
        """Have exactly ``need`` blocks reserved; further ones preferably on the ranks ``near``."""
        assert request.table is not None
        reserved = request.reserved
        surplus = sum(map(len, reserved.values())) - need
        while surplus > 0:
            rank = max(reserved, key=lambda rank: len(reserved[rank]))
            self._allocator.release([(rank, reserved[rank].pop())])
            if not reserved[rank]:
                del reserved[rank]
            surplus -= 1
        ranks = list(dict.fromkeys([*near, *request.table.span, *self._blocks.order]))
        room = self._blocks.room()
        if self._blocks.only_local:
            whole = [rank for rank in ranks if room[rank] >= need]  # where it was is away
            ranks = [*reserved, *request.table.span, *near, *whole][:1]
        for rank in ranks:
            if more := min(room[rank], -surplus):
                beside = request.table.newest_on(rank)
                reserved.setdefault(rank, []).extend(
                    self._blocks.run_on(rank, more, beside, grows=True)
                )
                surplus += more
        return not surplus
