"""What goes to host memory and what comes back, and the copies that a plan carries for it. No
torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

from ds_cp.cost import CostModel
from ds_cp.kv.host_tier import HostTier
from ds_cp.layout import Home, on_host
from ds_cp.plan import RankTimes, Transfer
from ds_cp.scheduler.draft import Draft
from ds_cp.scheduler.request import Request


@dataclass(frozen=True)
class HostRules:
    """``slots_per_rank``: blocks that each rank's host memory holds, () for none. ``beside``,
    ``alone``: blocks that come back from one rank in one step, beside decodes and without, at most
    (1 and up). ``cost``: says whether a copy costs less than computing; None: it does.
    ``max_model_len``: tokens of the longest request."""

    slots_per_rank: tuple[int, ...] = ()
    beside: int = 16
    alone: int = 256
    cost: CostModel | None = None
    max_model_len: int = 0


class HostMoves:
    """The host tier of all ranks, as the scheduler uses it.

    A block that the device gives away gets a slot at once, and is copied by the plan that first
    writes the block: a step copies no more than it writes anew. What comes back is bounded by step,
    and the request that waits for it computes when all of it is there.
    """

    def __init__(self, rules: HostRules, num_ranks: int, block_size: int) -> None:
        self.tier = HostTier(rules.slots_per_rank or (0,) * num_ranks)
        self.hits = 0  # prompt tokens found on the host
        self.restored = 0  # blocks that came back
        self._rules = rules
        self._back: Counter[int] = Counter()  # blocks that come back in this plan, by source rank
        self._size = block_size
        self.is_on = any(self.tier.slots_per_rank)
        self.failed = [0] * num_ranks  # blocks of each rank that could not be copied
        self._told = [0] * num_ranks  # the same, since its worker began
        self._pays = rules.cost is None or rules.cost.copy_pays(
            block_size, max(rules.max_model_len - block_size, 0), 2
        )

    def begin(self, draft: Draft) -> None:
        """Start a new plan."""
        self.tier.step = draft.step
        self._back.clear()

    def end(self, draft: Draft) -> None:
        """Nothing else is entered in the plan: add the copies of what its blocks hold."""
        if self.tier.num_due:
            draft.transfers += self.spills(draft.new_blocks)

    def keep(self, key: bytes, block: Home) -> None:
        """The device gives ``block`` away: keep its content, unless even at the end of the longest
        request it costs less to compute than to copy there and back."""
        if self._pays:
            self.tier.keep(key, block)

    def worth(self, found: list[Home]) -> list[Home]:
        """``found``, the homes of a request's first blocks, up to its first one on the host if what
        follows from there costs less to compute. On several ranks both go side by side, so that one
        rank's times compare."""
        if not self.is_on:
            return found
        cost, size = self._rules.cost, self._size
        first = next((i for i, home in enumerate(found) if on_host(home)), None)
        if first is None or cost is None:
            return found
        copied = sum(map(on_host, found)) * size
        restore = cost.host_s(copied)
        if restore < cost.prefill_s(1, (len(found) - first) * size, first * size):
            return found
        return found[:first]

    def copies(
        self, requests: tuple[int, ...], index: int, source: Home, target: Home
    ) -> list[Transfer]:
        """A copy to the block ``target``, after the one of what that holds for the host."""
        return [*self.spills((target,)), Transfer(requests, index, source, target)]

    def spills(self, blocks: Iterable[Home]) -> list[Transfer]:
        """The copies of what is due in ``blocks``, which this plan is about to write."""
        if not self.tier.num_due:
            return []
        pairs = [(block, self.tier.spill(block)) for block in blocks]
        return [Transfer((), 0, block, place) for block, place in pairs if place is not None]

    def wait_for(self, request: Request, index: int, place: Home) -> None:
        """Block ``index`` of a request that starts is to come back from ``place``."""
        self.tier.lease(place)
        request.restoring[index] = place

    def bring_back(self, request: Request, draft: Draft) -> bool:
        """Enter the next copies for a request; whether all its blocks are there then, before the
        step computes."""
        table = request.table
        assert table is not None
        most = self._rules.beside if draft.num_decodes else self._rules.alone
        now: list[tuple[int, Home, Home]] = []  # index, place, block
        for index, place in sorted(request.restoring.items()):
            if self._back[place[0]] < max(1, most):
                self._back[place[0]] += 1
                del request.restoring[index]
                now.append((index, place, table.homes[index]))
        # What has not been overwritten may lie in the very block that it gets.
        moves = [move for move in now if self.tier.source(move[1]) != move[2]]
        draft.transfers += self.spills(block for _, _, block in moves)
        for index, place, block in moves:
            source = self.tier.source(place)
            draft.transfers.append(Transfer((request.number,), index, source, block))
        for _, place, _ in now:
            self.tier.give_back(place)
            draft.restores, request.restored_step = True, draft.step
        self.restored += len(moves)
        return not request.restoring

    def observe(self, ranks: Iterable[RankTimes]) -> None:
        """A step has ended. A rank whose host memory could not copy a block uses it no more."""
        for rank, failed in ((r.rank, r.host_failed) for r in ranks if r.host_failed):
            if failed > self._told[rank]:
                self.failed[rank] += failed - self._told[rank]
                self._told[rank] = failed
                self.tier.retire(rank)

    def recover(
        self, lost: Collection[int], reported: int, running: Iterable[Request]
    ) -> list[Request]:
        """The ranks ``lost`` have nothing any more, and plans after step ``reported`` count as not
        carried out. Forget what may not be on the host; the requests among ``running`` that have
        not computed since their beginning, or some of it, was to come back: it may not have, so
        they have to start again."""
        for rank in lost:
            self.tier.empty_rank(rank)
            self.tier.retired.discard(rank)
            self._told[rank] = 0
        self.tier.rewind(reported)
        return [
            r for r in running
            if r.restoring or (r.restored_step > reported and not r.num_keyed)
        ]  # fmt: skip

    def forget(self, request: Request) -> None:
        """The request does not wait any more; what has not come back stays where it is."""
        for place in request.restoring.values():
            self.tier.give_back(place)
        request.restoring = {}

    def check_integrity(
        self, running: Sequence[Request], on_device: Callable[[bytes], Home | None]
    ) -> None:
        """Assert that the slots balance, leases are what requests wait for, and no key is also on
        the device."""
        leases = Counter(place for request in running for place in request.restoring.values())
        self.tier.check_integrity(dict(leases), on_device)
