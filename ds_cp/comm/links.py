"""How fast the wire is, measured at start: one pair of ranks per class of link."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from ds_cp.comm.world import World

SMALL = 1024  # bytes of a message that shows the latency
LARGE = 2 * 2**20  # bytes of a message that shows the rate
SMALL_ROUNDS = 20  # round trips of a small message; the fastest counts
LARGE_ROUNDS = 4  # the same of a large one
SCHEME = "link_probe"  # name in the ledger


@dataclass(frozen=True)
class LinkSpeed:
    """One-way ``latency_us`` (microseconds) of 1 KiB and ``gb_per_s`` (1e9 bytes/s) of 2 MiB, best
    of a few. ``name``: "within a host", by shared memory where it has that, or "between hosts".
    ``in_background``: bytes move while a rank computes; in shared memory only inside calls."""

    name: str
    latency_us: float
    gb_per_s: float
    in_background: bool = True


def measure_links(world: World) -> tuple[LinkSpeed, ...]:
    """Ping-pong from rank 0 to a rank of its host and to one of the next host, where they exist.

    Collective; takes milliseconds, over the group of all ranks, so nothing is left to be freed.
    Rank 0 and its peers return what they measured, the other ranks zeros.
    """
    if world.size == 1:
        return ()
    topology = world.topology
    pairs: list[tuple[str, int, bool]] = []
    same = [r for r in topology.ranks_on(topology.host_index(0)) if r != 0]
    if same:
        how = ", shared memory" if world.shares_memory else ""
        pairs.append((f"within a host{how}", same[0], not world.shares_memory))
    if topology.num_hosts > 1:
        pairs.append(("between hosts", topology.ranks_on(1)[0], True))
    found = []
    for name, peer, in_background in pairs:
        small = _one_way(world, peer, SMALL, SMALL_ROUNDS)
        large = _one_way(world, peer, LARGE, LARGE_ROUNDS)
        rate = LARGE / large / 1e9 if large else 0.0
        found.append(LinkSpeed(name, small * 1e6, rate, in_background))
    world.everybody.barrier()
    world.ledger.clear()  # it counts from the first step on
    return tuple(found)


def _one_way(world: World, peer: int, nbytes: int, rounds: int) -> float:
    """Half of the fastest round trip in seconds, on rank 0 and on ``peer``; 0 on other ranks.

    A message counts once it is in the device's memory: NCCL's ``wait`` only orders CUDA streams, so
    the device is waited for before the clock is read.
    """
    group = world.everybody
    if group.rank not in (0, peer):
        return 0.0
    other = peer if group.rank == 0 else 0
    data = torch.zeros(nbytes, dtype=torch.uint8, device=group.device)
    back = torch.empty_like(data)
    best = float("inf")
    for _ in range(rounds):
        world.wait_for_device()
        began = time.perf_counter()
        if group.rank == 0:
            group.exchange([(other, data)], [], SCHEME).wait()
            group.exchange([], [(other, back)], SCHEME).wait()
        else:
            group.exchange([], [(other, back)], SCHEME).wait()
            group.exchange([(other, data)], [], SCHEME).wait()
        world.wait_for_device()
        best = min(best, time.perf_counter() - began)
    return best / 2
