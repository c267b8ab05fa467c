"""Ranks meet without those that are away, which keep their numbers, and with them again."""

from __future__ import annotations

import pytest
import torch

from ds_cp.comm.control import Control
from ds_cp.comm.failure import failing
from ds_cp.comm.wire import Rendezvous, World, join
from ds_cp.errors import CommError
from ds_cp.startup.agreement import Report, exchange_reports
from tests.helpers.ranks import run_ranks

HOSTS = {"one": ("a", "a", "a", "a"), "two": ("a", "a", "b", "b"), "mixed": ("a", "b", "b", "a")}
AWAY = ((3,), (), (1,), (2, 3), (1, 2, 3), ())  # of each meeting


def again(world: World, generation: int, away: tuple[int, ...], shared_memory: bool) -> World:
    raw = world.raw_store
    return join(
        world.rank, world.size, Rendezvous(raw.host, raw.port, generation=generation),
        host="localhost", hosts=world.topology.hosts, device=torch.device("cpu"), timeout_s=60,
        shared_memory=shared_memory, left=world, members=[r for r in range(4) if r not in away],
        began=world.topology.hosts,
    )  # fmt: skip


def use(world: World) -> list[object]:
    """Whatever groups do, each among those that are here."""
    cp = world.group("cp", [list(range(world.size))])
    pairs = world.group("pairs", [[0, 1], [2, 3]])
    mine = torch.full((3,), float(10**world.rank))
    cp.all_reduce(mine, "test")
    large = torch.full((100_000,), float(10**world.rank))
    cp.all_reduce(large, "test")
    assert large[0] == large[-1] == mine[0]
    payload = bytes(range(100)) * (1 + 90 * (world.generation % 2))
    given = Control(world).broadcast(payload if world.rank == 0 else None)
    others = [r for r in cp.present if r != cp.rank]
    got = {r: torch.zeros(5) for r in others}
    cp.exchange(
        [(r, torch.full((5,), float(world.rank * 10 + r))) for r in others], list(got.items()), "x"
    ).wait()
    assert all(got[r][0] == r * 10 + world.rank for r in others)
    near = [i for i in pairs.present if i != pairs.rank]
    buffer = torch.zeros(1)
    for i in near:
        pairs.exchange([(i, torch.tensor([float(world.rank)]))], [(i, buffer)], "y").wait()
        assert buffer[0] == pairs.ranks[i]
    reports = exchange_reports(world, Report(0, f"rank {world.rank}"))
    with pytest.raises(ValueError, match="cannot message"):
        cp.exchange([((set(range(4)) - set(cp.present)).pop(), mine)], [], "z") if others else (
            cp.exchange([(1, mine)], [], "z")
        )
    return [float(mine[0]), given == payload, [r.message for r in reports], cp.ring, cp.hosts]


def meet(world: World, shared_memory: bool) -> list[list[object] | None]:
    found: list[list[object] | None] = []
    hosts = world.topology.hosts
    for generation, away in enumerate(AWAY, 1):
        if world.rank in away:
            if not world.has_left:
                world.leave()
            found.append(None)
            continue
        world.leave()
        world = again(world, generation, away, shared_memory)
        assert world.topology.hosts == hosts and world.size == 4
        assert world.born == tuple(-1 if r in away else 0 for r in range(4))
        found.append(use(world) if away else [])
        world.store.set(f"done/{world.rank}", "")  # a meeting ends together
        world.store.wait([f"done/{r}" for r in world.members])
    world.leave()
    return found


@pytest.mark.parametrize("shared_memory", [True, False])
@pytest.mark.parametrize("hosts", HOSTS)
def test_ranks_meet_without_some(hosts: str, shared_memory: bool) -> None:
    seen = run_ranks(meet, 4, shared_memory, hosts=HOSTS[hosts], shared_memory=shared_memory)
    for number, away in enumerate(AWAY):
        here = [r for r in range(4) if r not in away]
        numbers = {name: i for i, name in enumerate(dict.fromkeys(HOSTS[hosts]))}
        for rank in range(4):
            if rank in away:
                assert seen[rank][number] is None
            elif away:
                total, given, said, ring, places = seen[rank][number]
                assert total == sum(10.0**r for r in here) and given
                assert said == [f"rank {r}" if r in here else "" for r in range(4)]
                assert sorted(ring) == here
                assert places == tuple(
                    -1 if r in away else numbers[HOSTS[hosts][r]] for r in range(4)
                )


def fails(world: World, shared_memory: bool) -> str:
    """Who meets without others learns of the loss of a peer as ever."""
    world.leave()
    if world.rank == 3:
        return ""
    world = again(world, 1, (3,), shared_memory)
    if world.rank == 1:
        world.leave()
        return ""
    with pytest.raises(CommError) as found, failing(world):
        world.everybody.exchange([], [(1, torch.empty(8))], "test").wait()
    return str(found.value)


@pytest.mark.parametrize("shared_memory", [True, False])
def test_a_loss_among_the_rest(shared_memory: bool) -> None:
    said = run_ranks(fails, 4, shared_memory, shared_memory=shared_memory)
    assert all("rank" in said[rank] for rank in (0, 2)), said
