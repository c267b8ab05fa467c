"""Which rank is on which host, and what follows from it. Pure Python over a list of names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from ds_cp.errors import TopologyError


def rank_text(ranks: Sequence[int]) -> str:
    """Ranks as people write them: ``(0, 1, 2, 5)`` is ``"0-2,5"``."""
    parts: list[str] = []
    i = 0
    while i < len(ranks):
        j = i
        while j + 1 < len(ranks) and ranks[j + 1] == ranks[j] + 1:
            j += 1
        parts.append(str(ranks[i]) if i == j else f"{ranks[i]}-{ranks[j]}")
        i = j + 1
    return ",".join(parts)


def name_hosts(leaders: Sequence[int], names: Sequence[str]) -> tuple[str, ...]:
    """A name for each rank's host, from ``leaders[rank]``, the first rank on the same host, and
    from the name that each host gives itself; ``#2`` and so on tell namesakes apart."""
    chosen: dict[int, str] = {}
    for leader in sorted(set(leaders)):
        name, n = names[leader], 1
        while name in chosen.values():
            n += 1
            name = f"{names[leader]}#{n}"
        chosen[leader] = name
    return tuple(chosen[leader] for leader in leaders)


def _plural(count: int, word: str) -> str:
    return f"{count} {word}" if count == 1 else f"{count} {word}s"


@dataclass(frozen=True)
class Topology:
    """The host name of each rank: ``hosts[rank]``. Ranks may be spread over hosts in any order.

    Hosts are numbered in the order of their first rank, so rank 0 is always on host 0. Raises
    ``TopologyError`` without a rank, or for a rank without a host name.
    """

    hosts: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.hosts:
            raise TopologyError("a topology needs at least one rank; the list of hosts is empty")
        for rank, name in enumerate(self.hosts):
            if not isinstance(name, str) or not name:
                raise TopologyError(f"rank {rank} has no host name (got {name!r})")

    @classmethod
    def from_hosts(cls, hosts: Iterable[str]) -> Topology:
        """A topology from the host name of each rank, in rank order."""
        return cls(tuple(hosts))

    @property
    def size(self) -> int:
        """Number of ranks."""
        return len(self.hosts)

    @cached_property
    def host_names(self) -> tuple[str, ...]:
        """Names of the hosts, in the order of their first rank."""
        return tuple(dict.fromkeys(self.hosts))

    @property
    def num_hosts(self) -> int:
        """Number of hosts."""
        return len(self.host_names)

    @cached_property
    def _host_of_rank(self) -> tuple[int, ...]:
        index = {name: i for i, name in enumerate(self.host_names)}
        return tuple(index[name] for name in self.hosts)

    @cached_property
    def _ranks_of_host(self) -> tuple[tuple[int, ...], ...]:
        ranks: list[list[int]] = [[] for _ in self.host_names]
        for rank, host in enumerate(self._host_of_rank):
            ranks[host].append(rank)
        return tuple(tuple(r) for r in ranks)

    def host_index(self, rank: int) -> int:
        """Index into ``host_names`` of the host that ``rank`` runs on."""
        self._check_rank(rank)
        return self._host_of_rank[rank]

    def ranks_on(self, host_index: int) -> tuple[int, ...]:
        """Ranks of one host, ascending. ``TopologyError`` when there is no such host."""
        if not 0 <= host_index < self.num_hosts:
            raise TopologyError(f"host index {host_index} is not in 0..{self.num_hosts - 1}")
        return self._ranks_of_host[host_index]

    def local_rank(self, rank: int) -> int:
        """Position of ``rank`` among the ranks of its host."""
        return self._ranks_of_host[self.host_index(rank)].index(rank)

    def local_size(self, rank: int) -> int:
        """Number of ranks on the host of ``rank``."""
        return len(self._ranks_of_host[self.host_index(rank)])

    @cached_property
    def leaders(self) -> tuple[int, ...]:
        """First rank of each host, in host order."""
        return tuple(ranks[0] for ranks in self._ranks_of_host)

    def ring_order(self) -> tuple[int, ...]:
        """All ranks in an order that leaves each host once per round.

        One round (the last rank back to the first included) goes to another host ``num_hosts``
        times, the fewest possible with more than one host; 0 with one host.
        """
        return tuple(rank for ranks in self._ranks_of_host for rank in ranks)

    def crossings(self, order: Sequence[int]) -> int:
        """Steps of one round over ``order`` that go to another host, closing step included."""
        hosts = [self.host_index(rank) for rank in order]
        return sum(hosts[i - 1] != hosts[i] for i in range(len(hosts)))

    def subset(self, ranks: Sequence[int]) -> Topology:
        """The topology of a group: its rank ``i`` is ``ranks[i]`` here. Raises
        ``TopologyError`` for a rank named twice or out of range."""
        if len(set(ranks)) != len(ranks):
            raise TopologyError(f"a group names a rank twice: {list(ranks)}")
        for rank in ranks:
            self._check_rank(rank)
        return Topology(tuple(self.hosts[rank] for rank in ranks))

    def describe(self) -> list[str]:
        """Lines for the start-up summary."""
        where = ", ".join(
            f"{name} rank{'s' if len(ranks) > 1 else ''} {rank_text(ranks)}"
            for name, ranks in zip(self.host_names, self._ranks_of_host, strict=True)
        )
        lines = [f"{_plural(self.num_hosts, 'host')}: {where}"]
        if self.num_hosts > 1:
            order = self.ring_order()
            lines.append(
                f"ring order {' '.join(map(str, order))}: "
                f"{self.crossings(order)} of {self.size} steps cross a host border"
            )
        return lines

    def _check_rank(self, rank: int) -> None:
        if not 0 <= rank < self.size:
            raise TopologyError(f"rank {rank} is not in 0..{self.size - 1}")


@dataclass(frozen=True)
class Grid:
    """World = cp x tp: ``rank = cp_index * tp_size + tp_index``.

    A cp group shares a sequence (and may span hosts); a tp group shares a layer's heads and stays
    inside one host. Raises ``TopologyError`` when the factors or the hosts do not fit.
    """

    topology: Topology
    cp_size: int
    tp_size: int

    def __post_init__(self) -> None:
        world = self.topology.size
        if self.cp_size < 1 or self.tp_size < 1 or self.cp_size * self.tp_size != world:
            raise TopologyError(
                f"context_parallel.size {self.cp_size} x tensor_parallel.tp_size {self.tp_size} "
                f"= {self.cp_size * self.tp_size}, but the job has {_plural(world, 'rank')}: "
                f"launch that many ranks or set context_parallel.size to auto"
            )
        for group in self.tp_groups():
            if len({self.topology.host_index(rank) for rank in group}) > 1:
                where = ", ".join(f"rank {r} on {self.topology.hosts[r]}" for r in group)
                raise TopologyError(
                    f"a tensor-parallel group must be on one host, "
                    f"but tp_size {self.tp_size} puts together {where}: "
                    f"choose a tensor_parallel.tp_size that divides the ranks of each host, "
                    f"and number the ranks host by host (mpirun --map-by slot)"
                )

    def coords(self, rank: int) -> tuple[int, int]:
        """``(cp_index, tp_index)`` of a world rank."""
        self.topology._check_rank(rank)
        return divmod(rank, self.tp_size)

    def rank_of(self, cp_index: int, tp_index: int) -> int:
        """World rank at a place of the grid."""
        if not (0 <= cp_index < self.cp_size and 0 <= tp_index < self.tp_size):
            raise TopologyError(
                f"({cp_index}, {tp_index}) is outside the grid "
                f"cp {self.cp_size} x tp {self.tp_size}"
            )
        return cp_index * self.tp_size + tp_index

    def cp_groups(self) -> tuple[tuple[int, ...], ...]:
        """World ranks of each cp group; the group of ``tp_index`` is at that place."""
        return tuple(
            tuple(range(tp_index, self.topology.size, self.tp_size))
            for tp_index in range(self.tp_size)
        )

    def tp_groups(self) -> tuple[tuple[int, ...], ...]:
        """World ranks of each tp group; the group of ``cp_index`` is at that place."""
        return tuple(
            tuple(range(cp_index * self.tp_size, (cp_index + 1) * self.tp_size))
            for cp_index in range(self.cp_size)
        )

    def cp_topology(self, tp_index: int = 0) -> Topology:
        """Topology of one cp group, its ranks numbered by ``cp_index``."""
        return self.topology.subset(self.cp_groups()[tp_index])


def resolve_grid(topology: Topology, cp_size: int | Literal["auto"], tp_size: int) -> Grid:
    """The grid of a config; ``cp_size`` ``"auto"`` takes all ranks that ``tp_size`` leaves. Raises
    ``TopologyError`` when the sizes do not make the job's ranks."""
    if tp_size < 1:
        raise TopologyError(f"tensor_parallel.tp_size must be at least 1 (got {tp_size})")
    if cp_size != "auto":
        return Grid(topology, cp_size, tp_size)
    if topology.size % tp_size:
        raise TopologyError(
            f"tensor_parallel.tp_size {tp_size} does not divide "
            f"the {_plural(topology.size, 'rank')} of the job: launch a multiple of {tp_size}"
        )
    return Grid(topology, topology.size // tp_size, tp_size)
