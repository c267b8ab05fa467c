"""Which blocks a request gets: found ones, placed ones, one more when it grows. No torch."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace

from ds_cp.kv.blocks import BlockAllocator
from ds_cp.kv.placement import place, place_block
from ds_cp.kv.prefix import PrefixKeys
from ds_cp.kv.table import SequenceTable
from ds_cp.layout import Home, on_host, split_capped
from ds_cp.plan import Transfer
from ds_cp.scheduler.host_moves import HostMoves, HostRules
from ds_cp.scheduler.mode_policy import ModePolicy, Seats
from ds_cp.scheduler.offer import Offer, on_device, only, ranks_with_room
from ds_cp.scheduler.prefix_index import PrefixIndex, is_second
from ds_cp.scheduler.reasons import SpanReason
from ds_cp.scheduler.request import Refusal, Request


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
        host: HostRules | None = None,
    ) -> None:
        self.host = HostMoves(host or HostRules(), len(blocks_per_rank), block_size)
        evicted, tier = (self._evicted, self.host.tier) if self.host.is_on else (None, None)
        self.allocator = BlockAllocator(blocks_per_rank, block_size, evicted)
        self.prefix = PrefixIndex(self.allocator, tier)
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
        every = enumerate(self.allocator.blocks_per_rank)
        return [0 if rank in self.closed else blocks for rank, blocks in every]

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

    def _evicted(self, key: bytes, home: Home) -> None:
        """The allocator gives a cached block away. A second copy is not kept: the first one is
        somewhere, or was the older."""
        if home[0] not in self.closed and not is_second(key):
            self.host.keep(key, home)

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
        far = []
        for index, home in enumerate(found):
            if on_host(home):  # before blocks are given away, which want slots
                self.host.wait_for(request, index, home)
                far.append(index)
            elif target in (-1, home[0]):
                self.allocator.share(home)
            else:
                far.append(index)
        request.reserved = {
            rank: list(self.allocator.allocate(rank, n)) for rank, n in enumerate(offer.new) if n
        }
        homes, copies = list(found), []
        for index in far:  # the first blocks of the run, so that the request's are adjacent
            homes[index] = self._take_reserved(request, found[index][0] if target < 0 else target)
            if index not in request.restoring:
                copies.append(Transfer((), index, found[index], homes[index]))
        copies = [*self.host.spills(copy.target for copy in copies), *copies]
        request.table = SequenceTable(size, homes, len(homes) * size)
        request.workers = offer.workers
        request.why_span = offer.why
        request.num_keyed = 0 if far else len(found)
        if request.cached_tokens is None and self._caching:
            request.cached_tokens = min(len(found) * size, len(request.prompt))
            self.queries += len(request.prompt)
            self.hits += request.cached_tokens
            self.host.hits += len(request.restoring) * size
        return copies

    @staticmethod
    def _take_reserved(request: Request, rank: int) -> Home:
        """One of its reserved blocks: of ``rank``, or else of the rank that has most of them."""
        reserved = request.reserved
        if rank not in reserved:
            rank = max(reserved, key=lambda r: len(reserved[r]))
        block = reserved[rank].pop(0)
        if not reserved[rank]:
            del reserved[rank]
        return rank, block

    def _find(self, request: Request, near: int | None = None) -> list[Home]:
        """What there is of the request's beginning, and is worth having."""
        return self.host.worth(self.prefix.find(request, near))

    def _offers(self, request: Request, load: Sequence[int], busy: bool) -> Iterator[Offer]:
        """Ways to start the request, best first; each fits now."""
        size, tokens = self.allocator.block_size, request.num_tokens
        blocks = -(-tokens // size)
        found = self._find(request)
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
            need = blocks - on_device(found)
            ranks = ranks_with_room(self.order, room, need, want, {rank for rank, _ in found})
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
            need = blocks - on_device(found)
            behind = load[rank] - best > len(found) * self.allocator.block_size or rank in asleep
            if not behind and rank not in self.closed and self._room_beside(found)[rank] >= need:
                yield Offer(found, only(rank, need, self.num_ranks), (rank,), why=SpanReason.PREFIX)
        by_load = sorted(open_ranks, key=lambda r: (
            r in asleep, load[r], -self.allocator.num_available(r), -self.allocator.num_free(r),
        ))  # fmt: skip
        room = self.room()
        for rank in by_load:
            # Blocks that others use there are all that it can have beside what is free or cached.
            if room[rank] + self.allocator.num_used(rank) < blocks:
                continue
            chain = self._find(request, rank)
            here = [home for home in chain if home[0] == rank and not on_host(home)]
            need = blocks - len(here)
            if self._room_beside(here)[rank] >= need:
                yield Offer(chain, only(rank, need, self.num_ranks), (rank,), rank, why)

    def _room_beside(self, found: Sequence[Home]) -> list[int]:
        """Room of each rank once the found blocks are shared, and so can no longer be evicted."""
        room = self.room()
        for home in found:
            open_block = not on_host(home) and home[0] not in self.closed
            if open_block and self.allocator.references(home) == 0:
                room[home[0]] -= 1
        return room

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
        self.host.forget(request)
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
        self.host.check_integrity(running, self.allocator.find)
