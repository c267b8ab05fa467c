"""Which blocks a request gets: found ones, placed ones, one more when it grows. No torch."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace

from ds_cp.kv.blocks import BlockAllocator
from ds_cp.kv.placement import place, place_block
from ds_cp.kv.prefix import PrefixKeys
from ds_cp.kv.table import SequenceTable
from ds_cp.layout import Home, split_capped
from ds_cp.plan import Transfer
from ds_cp.scheduler.mode_policy import ModePolicy, Seats
from ds_cp.scheduler.prefix_index import PrefixIndex
from ds_cp.scheduler.reasons import SpanReason
from ds_cp.scheduler.request import Refusal, Request


@dataclass(frozen=True)
class Offer:
    """One way to start a request now. ``found``: cached blocks that hold its first tokens; ``new``:
    blocks to allocate per rank; ``workers``: the ranks that compute; ``copy_to``: the rank to which
    found blocks of other ranks are copied, -1 to share them where they are; ``why``: on them."""

    found: list[Home]
    new: Sequence[int]
    workers: tuple[int, ...]
    copy_to: int = -1
    why: SpanReason = SpanReason.NO_ROOM


class BlockManager:
    """The blocks of all ranks, and the rules by which requests get them.

    ``closed``: ranks where nothing new is placed, since they are ``drained`` by an operator or
    ``away``. ``order``: ranks, nearest next.
    """

    def __init__(
        self,
        blocks_per_rank: Sequence[int],
        block_size: int,
        placement: str,
        order: Sequence[int],
        policy: ModePolicy,
        prefix_caching: bool,
        seats: Seats | None = None,
    ) -> None:
        self.allocator = BlockAllocator(blocks_per_rank, block_size)
        self.prefix = PrefixIndex(self.allocator)
        self.closed: set[int] = set()
        self.drained: set[int] = set()
        self.away: frozenset[int] = frozenset()
        self.queries = self.hits = 0  # prompt tokens looked up in the prefix index, and found
        self._placement = placement
        self.order = tuple(order)
        self._policy = policy
        self._seats = seats
        self._caching = prefix_caching
        self.num_ranks = len(blocks_per_rank)

    def drain(self, rank: int) -> None:
        """Place nothing new on ``rank``."""
        self.drained.add(rank)
        self.closed.add(rank)

    def reopen(self, rank: int) -> None:
        """Place blocks on ``rank`` again, as soon as it is here."""
        self.drained.discard(rank)
        if rank not in self.away:
            self.closed.discard(rank)

    def set_away(self, away: Collection[int]) -> None:
        """These ranks, and no others, are away."""
        self.away = frozenset(away)
        self.closed = self.drained | self.away

    @property
    def blocks_here(self) -> tuple[int, ...]:
        """Capacity of each rank in blocks, 0 for those that are away."""
        every = enumerate(self.allocator.blocks_per_rank)
        return tuple(0 if rank in self.away else blocks for rank, blocks in every)

    @property
    def open_blocks(self) -> list[int]:
        """Capacity of each rank in blocks, 0 for closed ones."""
        return [
            0 if rank in self.closed else blocks
            for rank, blocks in enumerate(self.allocator.blocks_per_rank)
        ]

    @property
    def largest_tokens(self) -> int:
        """The most KV one request can have: all open ranks, or the largest if mode is local."""
        most = max if self.only_local else sum
        return most(self.open_blocks) * self.allocator.block_size

    @property
    def only_local(self) -> bool:
        """Whether every request has to be on one rank."""
        return self._policy.mode == "local"

    def gathers(self, request: Request) -> bool:
        """Whether a spanning request that decodes should be on one rank, and shares no block."""
        table = request.table
        if table is None or request.prefilling:
            return False
        return self._policy.gathers(table.width, table.num_tokens) and all(
            self.allocator.references(home) == 1 for home in table.homes
        )

    def room(self) -> list[int]:
        """Blocks that each rank can allocate now; 0 for closed ones."""
        room = self.allocator.available()
        for rank in self.closed:
            room[rank] = 0
        return room

    # --- a request starts

    def start(self, request: Request, load: Sequence[int], busy: bool) -> list[Transfer] | None:
        """Give the request blocks for every token that it has; None when there is no room now.

        Cached blocks of its prefix are shared, or copied to the rank where it will be local; the
        rest is reserved. Returns the copies. ``load``: prompt tokens that wait on each rank;
        ``busy``: whether other requests want ranks too.
        """
        size = self.allocator.block_size
        if request.keys is None and self._caching:
            request.keys = PrefixKeys(size, request.salt)
        room = tuple(self.room())
        now = Refusal(
            room, None, self.prefix.copies, self.allocator.reuses, request.num_tokens,
            len(self.closed), busy,
        )  # fmt: skip
        old = request.refusal
        if any(load) and old is not None and now.follows_from(old):
            if old.next_key is None or self.allocator.find(old.next_key) is None:
                return None
        self.prefix.skipped_fresh = False
        offer = next(self._offers(request, load, busy), None)
        request.refusal = None
        if offer is not None:
            return self._take(request, offer)
        if not self.prefix.skipped_fresh:
            request.refusal = replace(now, next_key=self.prefix.next_key(request))
        return None

    def _take(self, request: Request, offer: Offer) -> list[Transfer]:
        size, found, target = self.allocator.block_size, offer.found, offer.copy_to
        for home in found:
            if target < 0 or home[0] == target:
                self.allocator.share(home)
        far = [i for i, home in enumerate(found) if target >= 0 and home[0] != target]
        request.reserved = {
            rank: list(self.allocator.allocate(rank, n + (len(far) if rank == target else 0)))
            for rank, n in enumerate(offer.new)
            if n
        }
        homes, copies = list(found), []
        for index in far:  # the first blocks of the run, so that the request's are adjacent
            homes[index] = (target, request.reserved[target].pop(0))
            copies.append(Transfer((), index, found[index], homes[index]))
        request.table = SequenceTable(size, homes, len(homes) * size)
        request.workers = offer.workers
        request.why_span = offer.why
        request.num_keyed = 0 if far else len(found)
        if request.cached_tokens is None and self._caching:
            request.cached_tokens = min(len(found) * size, len(request.prompt))
            self.queries += len(request.prompt)
            self.hits += request.cached_tokens
        return copies

    def _offers(self, request: Request, load: Sequence[int], busy: bool) -> Iterator[Offer]:
        """Ways to start the request, best first; each fits now."""
        size, tokens = self.allocator.block_size, request.num_tokens
        blocks = -(-tokens // size)
        found = self.prefix.find(request)
        past = len(found) * size
        answer = request.max_tokens - len(request.output)
        most = self.num_ranks - len(self.closed)
        at_work = most if self._seats is None else min(most, self._seats.at_work)
        width = self._policy.width(most, tokens - past, past, answer, busy, at_work)
        want = width.ranks
        if want == 1 or self.only_local:
            yield from self._local_offers(request, found, blocks, load, width.why)
        if not self.only_local:
            room = self._room_beside(found)
            need = blocks - len(found)
            ranks = self._ranks_with_room(room, need, want, {rank for rank, _ in found})
            if ranks:
                level = want > 1 and self._policy.may_be_local(tokens)
                counts = self._spread(need, room, ranks, found, level)
                if counts is not None:
                    why = width.why if len(ranks) <= want else SpanReason.NO_ROOM
                    yield Offer(found, counts, tuple(sorted(ranks)), why=why)

    def _spread(
        self, need: int, room: Sequence[int], ranks: set[int], found: Sequence[Home], level: bool
    ) -> Sequence[int] | None:
        """``need`` blocks on ``ranks``: where the placement puts them, or, ``level``, as many on
        each as they have room for. A request that could be on one rank spans to be computed faster,
        and each rank computes over the keys that it holds."""
        inside = [n if r in ranks else 0 for r, n in enumerate(room)]
        if level:
            return split_capped(need, [int(n > 0) for n in inside], inside)
        return place(
            self._placement, need, open_slots=[0] * self.num_ranks, free_blocks=inside,
            block_size=1, last_rank=found[-1][0] if found else -1, order=self.order,
        )  # fmt: skip

    def _local_offers(
        self,
        request: Request,
        found: list[Home],
        blocks: int,
        load: Sequence[int],
        why: SpanReason,
    ) -> Iterator[Offer]:
        """On one rank: the one that holds the prefix, unless more work waits there than the prefix
        is long; else the one where least work waits, to which blocks cached on other ranks are
        copied. Ranks that would have no core of their own come last."""
        on = {rank for rank, _ in found}
        open_ranks = [rank for rank in self.order if rank not in self.closed]
        asleep = self._seats.asleep(load) if self._seats is not None else set()
        best = min((load[rank] for rank in open_ranks if rank not in asleep), default=0)
        if len(on) == 1:
            (rank,) = on
            need = blocks - len(found)
            behind = load[rank] - best > len(found) * self.allocator.block_size or rank in asleep
            if not behind and rank not in self.closed and self._room_beside(found)[rank] >= need:
                yield Offer(found, self._only(rank, need), (rank,), why=SpanReason.PREFIX)
        by_load = sorted(open_ranks, key=lambda r: (
            r in asleep, load[r], -self.allocator.num_available(r), -self.allocator.num_free(r),
        ))  # fmt: skip
        room = self.room()
        for rank in by_load:
            # Blocks that others use there are all that it can have beside what is free or cached.
            if room[rank] + self.allocator.num_used(rank) < blocks:
                continue
            chain = self.prefix.find(request, rank)
            here = [home for home in chain if home[0] == rank]
            if self._room_beside(here)[rank] >= blocks - len(here):
                yield Offer(chain, self._only(rank, blocks - len(chain)), (rank,), rank, why)

    def _only(self, rank: int, blocks: int) -> list[int]:
        return [blocks if r == rank else 0 for r in range(self.num_ranks)]

    def _room_beside(self, found: Sequence[Home]) -> list[int]:
        """Room of each rank once the found blocks are shared, and so can no longer be evicted."""
        room = self.room()
        for home in found:
            if home[0] not in self.closed and self.allocator.references(home) == 0:
                room[home[0]] -= 1
        return room

    def _ranks_with_room(
        self, room: Sequence[int], need: int, want: int, preferred: set[int]
    ) -> set[int]:
        """``want`` ranks, or as many more as it takes to hold ``need`` blocks; the preferred, then
        the roomiest first. Empty when all together have too little."""
        ranked = sorted(
            (rank for rank in self.order if room[rank]),
            key=lambda rank: (rank not in preferred, -room[rank]),
        )
        chosen: set[int] = set()
        have = 0
        for rank in ranked:
            if len(chosen) >= want and have >= need:
                break
            chosen.add(rank)
            have += room[rank]
        return chosen if have >= need else set()

    # --- a request grows

    def grow(self, request: Request) -> Home | None:
        """A block for its next token: where its last block is about to move, else on the same rank
        while it is local or the policy fills ranks, else on the rank that the placement picks. None
        when no rank that may hold it has one."""
        table = request.table
        assert table is not None
        _, ahead = request.moving.get(len(table.homes) - 1, (None, None))
        if ahead is not None and self._may_allocate(ahead[0], -1):
            return ahead[0], self.run_on(ahead[0], 1, ahead, grows=True)[0]
        last, mode = table.last_rank, self._policy.mode
        if last >= 0 and self._may_allocate(last, last):
            local = table.width == 1 and mode in ("auto", "local")
            if local or self._placement == "fill_then_spill":
                block = table.homes[-1][1]
                return last, self.allocator.allocate(last, 1, extend_from=block)[0]
        if mode == "local" and last >= 0:
            return None
        room = self.room()
        inside = [n if table.num_blocks(r) else 0 for r, n in enumerate(room)]
        if mode == "auto" and any(inside):
            room = inside  # a span no wider than it has to be
        rank = place_block(self._placement, room, last, self.order)
        if rank is None:
            return None
        return rank, self.run_on(rank, 1, table.newest_on(rank), grows=True)[0]

    def run_on(self, rank: int, count: int, before: Home | None, grows: bool) -> tuple[int, ...]:
        """``count`` blocks of ``rank`` in as few runs as its free ones allow: those right after
        ``before``, a block on ``rank``, then the rest. ``grows``: the request ends with them, so
        that where none is free after ``before`` they leave room to grow on."""
        extend = before is not None and (grows or self.allocator.room_after(before) > 0)
        after = before[1] if before is not None and extend else None
        return self.allocator.allocate(rank, count, extend_from=after)

    def block_on(self, ranks: Sequence[int], beside: Home | None = None) -> Home | None:
        """A block on the first of ``ranks`` that has one, adjacent to ``beside`` where possible."""
        for rank in ranks:
            if self._may_allocate(rank, beside[0] if beside is not None else -1):
                extend = beside[1] if beside is not None and beside[0] == rank else None
                return rank, self.allocator.allocate(rank, 1, extend_from=extend)[0]
        return None

    def _may_allocate(self, rank: int, here: int) -> bool:
        """Whether ``rank`` may allocate to a request on ``here``. A draining rank serves only
        local-mode requests already on it, until they migrate as a whole."""
        open_to = rank not in self.closed or (self.only_local and rank == here)
        return open_to and self.allocator.num_available(rank) > 0

    # --- a request leaves

    def release(self, request: Request, keep: bool = True) -> None:
        """Release every block. Those in the prefix index can still be found until they are evicted,
        the end of the sequence first; ``keep=False`` forgets them at once, and so does a closed
        rank."""
        table = request.table
        assert table is not None
        for home in table.homes:
            if not keep or home[0] in self.closed:
                self.allocator.forget(home)
        self.allocator.release([*request.held, *reversed(table.homes)])
        request.table, request.reserved, request.moving, request.num_keyed = None, {}, {}, 0
        request.shares_tail = False

    def check_integrity(self, running: Sequence[Request]) -> None:
        """Assert that the allocator's references are exactly the blocks that requests hold."""
        references: dict[Home, int] = {}
        for request in running:
            assert request.table is not None
            own = [*request.held, *request.table.homes]
            assert len(own) == len(set(own)), f"request {request.number} holds a block twice"
            for home in own:
                references[home] = references.get(home, 0) + 1
        self.allocator.check_integrity(references)
