"""The routes of a tree: which rows go to whom, and where their answers come back.

A *row block* is the rows of one item that one rank owns (queries, in attention), and the ranks that
can answer them, its *holders* (they have keys that these rows see). Over several hosts each row
block crosses to another host once, to a carrier there (the rank with the owner's own place on its
host), which spreads it inside; answers are folded inside the host first and cross back once. So the
bytes between hosts do not grow with the ranks per host. On one host there is one level and no
carrier.

Routes are integers. They follow from what every rank knows and are kept while that stays the same.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import NamedTuple


class RowBlock(NamedTuple):
    """``rows`` rows of item ``item``, owned by rank ``owner``; ``holders``: ranks that can answer
    them, ascending, the owner too when it is one. Ranks are group indices."""

    item: int
    owner: int
    rows: int
    holders: tuple[int, ...]


Ask = dict[int, tuple[int, ...]]  # peer -> indices of row blocks, in the order of the message


class Route:
    """What one rank sends and receives of ``blocks``, which ascend by (owner, item).

    Going out, first ``between`` hosts: ``away`` to carriers, ``carried`` from owners. Then
    ``inside`` a host: to each peer of ``own`` and ``passed_on`` my own blocks and then those that I
    carry, in one message; ``asked`` are those that arrive. Answers take the same way back.
    """

    def __init__(self, blocks: Sequence[RowBlock], hosts: Sequence[int], me: int) -> None:
        away: dict[int, list[int]] = {}
        carried: dict[int, list[int]] = {}
        own: dict[int, list[int]] = {}
        passed_on: dict[int, list[int]] = {}
        asked: dict[int, list[int]] = {}
        asked_for_others: dict[int, list[int]] = {}
        there = [[r for r, h in enumerate(hosts) if h == host] for host in range(max(hosts) + 1)]
        place = {r: at for ranks in there for at, r in enumerate(ranks)}

        def carrier(host: int, owner: int) -> int:
            """The rank on ``host`` that answers for ``owner``: itself when it lives there."""
            if hosts[owner] == host:
                return owner
            return there[host][place[owner] % len(there[host])]

        for index, (_, owner, _, holders) in enumerate(blocks):
            home = hosts[owner]
            if owner == me:
                for host in sorted({hosts[r] for r in holders} - {home}):
                    away.setdefault(carrier(host, owner), []).append(index)
            elif home != hosts[me] and carrier(hosts[me], owner) == me:
                if any(hosts[r] == hosts[me] for r in holders):
                    carried.setdefault(owner, []).append(index)
            source = carrier(hosts[me], owner)
            if source == me:
                out = own if owner == me else passed_on
                for r in holders:
                    if r != me and hosts[r] == hosts[me]:
                        out.setdefault(r, []).append(index)
            elif me in holders:
                into = asked if source == owner else asked_for_others
                into.setdefault(source, []).append(index)
        for source, found in asked_for_others.items():
            asked.setdefault(source, []).extend(found)
        self.blocks = tuple(blocks)
        self.away, self.carried = _frozen(away), _frozen(carried)
        self.own, self.passed_on, self.asked = _frozen(own), _frozen(passed_on), _frozen(asked)
        self.inside = sorted({*own, *passed_on})  # whom I give row blocks within the host
        self.between = len({hosts[r] for b in blocks for r in (b.owner, *b.holders)}) > 1
        #: row blocks that arrive here, in the order of their rows here: carried ones, then asked
        self.arriving = [i for side in (self.carried, self.asked) for found in side.values()
                         for i in found]  # fmt: skip
        self._place = _rows_of(blocks, self.arriving)
        self._own_place = _rows_of(blocks, [i for i, b in enumerate(blocks) if b.owner == me])

    def rows_in(self, indices: Iterable[int]) -> int:
        """Rows of these row blocks."""
        return sum(self.blocks[i].rows for i in indices)

    def own_rows(self, indices: Iterable[int]) -> list[int]:
        """Where the rows of my own blocks are among all of mine, item by item."""
        return [row for i in indices for row in self._own_place[i]]

    def arriving_rows(self, indices: Iterable[int]) -> list[int]:
        """Where the rows of blocks that arrive here are among all that do."""
        return [row for i in indices for row in self._place[i]]


def _frozen(ask: dict[int, list[int]]) -> Ask:
    return {peer: tuple(ask[peer]) for peer in sorted(ask)}


def _rows_of(blocks: Sequence[RowBlock], order: Iterable[int]) -> dict[int, range]:
    """The rows of each block when these lie one after the other in ``order``."""
    found, at = {}, 0
    for i in order:
        found[i] = range(at, at + blocks[i].rows)
        at += blocks[i].rows
    return found


class TreeRoutes:
    """Routes of one rank of one group, kept from step to step while owners, rows and holders stay;
    the ``limit`` used last."""

    def __init__(self, limit: int = 64) -> None:
        self._limit = limit
        self._routes: OrderedDict[tuple[RowBlock, ...], Route] = OrderedDict()

    def find(self, blocks: tuple[RowBlock, ...], hosts: Sequence[int], me: int) -> Route:
        """The route of rank ``me`` for ``blocks``, which ascend by (owner, item); ``hosts``: of
        every rank of the group."""
        route = self._routes.get(blocks)
        if route is None:
            route = self._routes[blocks] = Route(blocks, hosts, me)
            if len(self._routes) > self._limit:
                self._routes.popitem(last=False)
        else:
            self._routes.move_to_end(blocks)
        return route
