"""Routes of a tree: what each rank sends and receives, from integers alone; and that they are kept.
Every rank's route is made here, and what they say to each other must fit together."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from ds_cp.comm.tree import Route, RowBlock, TreeRoutes

HOSTS = [
    (0,),
    (0, 0),
    (0, 1),
    (0, 0, 0, 0),
    (0, 0, 1, 1),
    (0, 1, 0, 1),
    (0, 1, 1, 1),
    (0, 1, 2, 0, 1),
]


def some_blocks(size: int, rng: random.Random) -> tuple[RowBlock, ...]:
    found = []
    for owner in range(size):
        for item in sorted(rng.sample(range(6), rng.randint(0, 3))):
            holders = tuple(sorted(rng.sample(range(size), rng.randint(0, size))))
            found.append(RowBlock(item, owner, rng.randint(1, 4), holders))
    return tuple(found)


@pytest.mark.parametrize("hosts", HOSTS, ids=str)
def test_rows_reach_every_holder_once_and_answers_come_back(hosts: tuple[int, ...]) -> None:
    rng = random.Random(sum(hosts) + len(hosts))
    ranks = range(len(hosts))
    for _ in range(60):
        blocks = some_blocks(len(hosts), rng)
        routes = [Route(blocks, hosts, me) for me in ranks]
        # Both sides of a message name the same row blocks in the same order.
        for me, route in enumerate(routes):
            for peer, found in route.away.items():
                assert routes[peer].carried[me] == found and hosts[peer] != hosts[me]
            for peer in route.inside:
                found = route.own.get(peer, ()) + route.passed_on.get(peer, ())
                assert routes[peer].asked[me] == found and hosts[peer] == hosts[me]
            assert sum(map(len, route.carried.values())) == sum(
                me in routes[r].away and len(routes[r].away[me]) for r in ranks
            )
        for index, (_, owner, _, holders) in enumerate(blocks):
            got = Counter(
                me for me in ranks for found in (routes[me].carried, routes[me].asked)
                for kept in found.values() for i in kept if i == index
            )  # fmt: skip
            assert all(count == 1 for count in got.values()) and owner not in got
            assert set(holders) - {owner} <= set(got)
            others = {hosts[r] for r in holders} - {hosts[owner]}
            crossed = [p for p, kept in routes[owner].away.items() if index in kept]
            assert {hosts[p] for p in crossed} == others and len(crossed) == len(others)
            assert set(got) - set(holders) <= set(crossed)  # only carriers hear it for others


def test_rows_lie_in_the_order_of_the_messages() -> None:
    """Rank 1 of two hosts carries for rank 3 and is asked by rank 0, whose items come first."""
    blocks = (
        RowBlock(0, 0, 2, (0, 1, 2)),
        RowBlock(2, 0, 1, (1,)),
        RowBlock(1, 1, 3, (0, 1)),
        RowBlock(4, 1, 2, (3,)),
        RowBlock(3, 3, 4, (0, 1, 2)),
    )
    route = Route(blocks, (0, 0, 1, 1), 1)
    assert route.away == {3: (3,)} and route.carried == {3: (4,)}
    assert route.own == {0: (2,)} and route.passed_on == {0: (4,)} and route.inside == [0]
    assert route.asked == {0: (0, 1)}
    assert route.arriving == [4, 0, 1] and route.rows_in(route.arriving) == 7
    assert route.arriving_rows([4]) == [0, 1, 2, 3] and route.arriving_rows([1]) == [6]
    assert route.own_rows([3]) == [3, 4] and route.own_rows([2, 3]) == [0, 1, 2, 3, 4]


def test_routes_are_kept_while_owners_rows_and_holders_stay() -> None:
    routes, hosts = TreeRoutes(limit=2), (0, 0)
    one, other, third = (
        (RowBlock(0, 0, 1, (0, 1)),),
        (RowBlock(0, 0, 1, (0,)),),
        (RowBlock(0, 1, 1, (0, 1)),),
    )
    first = routes.find(one, hosts, 0)
    assert routes.find((RowBlock(0, 0, 1, (0, 1)),), hosts, 0) is first
    second = routes.find(other, hosts, 0)
    assert second is not first and routes.find(one, hosts, 0) is first
    assert routes.find(third, hosts, 0) is not second  # and ``other``, used longest ago, goes
    assert routes.find(one, hosts, 0) is first
    assert routes.find(other, hosts, 0) is not second
