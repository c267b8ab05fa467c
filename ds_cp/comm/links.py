"""How fast the wire is, measured at start: one pair of ranks per class of link."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from ds_cp.comm.wire import Group, World

SMALL, LARGE = 1024, 2 * 2**20  # bytes
SCHEME = "link_probe"


@dataclass(frozen=True)
class LinkSpeed:
    """One-way ``latency_us`` (microseconds) of 1 KiB and ``gb_per_s`` (1e9 bytes/s) of 2 MiB, best
    of a few. ``name``: "within a host" or "between hosts"."""

    name: str
    latency_us: float
    gb_per_s: float


def measure_links(world: World) -> tuple[LinkSpeed, ...]:
    """Ping-pong from rank 0 to a rank of its host and to one of the next host, where they exist.

    Collective; takes milliseconds. Rank 0's figures, which is where they are printed; the other
    ranks return what they saw themselves, or zeros when they took no part.
    """
    if world.size == 1:
        return ()
    group = world.group("links", [list(range(world.size))])
    topology = world.topology
    pairs = []
    same = [r for r in topology.ranks_on(topology.host_index(0)) if r != 0]
    if same:
        pairs.append(("within a host", same[0]))
    if topology.num_hosts > 1:
        pairs.append(("between hosts", topology.ranks_on(1)[0]))
    found = []
    for name, peer in pairs:
        small = _one_way(group, peer, SMALL, rounds=20)
        large = _one_way(group, peer, LARGE, rounds=4)
        rate = LARGE / large / 1e9 if large else 0.0
        found.append(LinkSpeed(name, small * 1e6, rate))
    group.barrier()
    world.ledger.clear()  # the books start with the first step
    return tuple(found)


def _one_way(group: Group, peer: int, nbytes: int, rounds: int) -> float:
    """Half of the fastest round trip in seconds, on rank 0 and on ``peer``."""
    if group.rank not in (0, peer):
        return 0.0
    other = peer if group.rank == 0 else 0
    data = torch.zeros(nbytes, dtype=torch.uint8, device=group.device)
    back = torch.empty_like(data)
    best = float("inf")
    for _ in range(rounds):
        began = time.perf_counter()
        if group.rank == 0:
            group.exchange([(other, data)], [], SCHEME).wait()
            group.exchange([], [(other, back)], SCHEME).wait()
        else:
            group.exchange([], [(other, back)], SCHEME).wait()
            group.exchange([(other, data)], [], SCHEME).wait()
        best = min(best, time.perf_counter() - began)
    return best / 2
