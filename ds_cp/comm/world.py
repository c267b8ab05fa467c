"""This process's place in the job."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from typing import Any, Literal
from weakref import WeakMethod

import torch

from ds_cp.comm import process_group
from ds_cp.comm.device import mark_here, wait_until
from ds_cp.comm.group import Group
from ds_cp.comm.ledger import Ledger, Waits
from ds_cp.comm.listeners import close_listeners, cut_connections
from ds_cp.comm.local_work import LocalWork
from ds_cp.comm.process_group import DistError, ProcessGroup
from ds_cp.comm.shared_memory import Neighbours, SharedMemory
from ds_cp.comm.staging import Staged
from ds_cp.comm.transport import Routed, Transport
from ds_cp.errors import CommError
from ds_cp.topology.hosts import Topology

Backend = Literal["gloo", "nccl"]
FAILURE = "failure"  # key in the store: why a rank has given the job up


class World:
    """This process's place in the job: its rank, every rank's host, and the groups it is in.

    ``backend``: what carries the tensors of a CUDA device; ``neighbours``: makes shared memory with
    the ranks of this host, None when that is off; ``sharing``: ranks, this one among them, that
    compute on its CUDA device; ``cores``: that the ranks of this host may use together, and
    ``threads``: CPU threads of this rank, both this process's cores where not given;
    ``left``: the world that this process was in before: what it has sent counts on;
    ``notes``: lines for the start-up summary.

    ``generation``: which meeting of the ranks this is; ``members``: those that met, ascending, rank
    0 among them: the others are away, and keep their numbers; ``born``: of each rank, the first
    generation that its process was in, -1 for those that are away.
    """

    def __init__(
        self, rank: int, topology: Topology, device: torch.device, timeout_s: float, joined: bool,
        store: Any = None, backend: Backend = "gloo", neighbours: Neighbours | None = None,
        sharing: int = 1, cores: int | None = None, threads: int | None = None,
        left: World | None = None, members: Sequence[int] | None = None,
    ) -> None:  # fmt: skip
        self.rank = rank
        self.size = topology.size
        self.members = tuple(range(self.size) if members is None else members)
        self._places = {member: place for place, member in enumerate(self.members)}
        self.topology = topology
        self.device = device
        self.timeout_s = timeout_s
        self.backend = backend
        self.sharing = sharing
        self.cores = cores or len(os.sched_getaffinity(0))
        self.threads = threads or self.cores
        self.ledger: Ledger = Ledger() if left is None else left.ledger
        self.waits: Waits = Waits() if left is None else left.waits
        self.generation = 0
        self.born: tuple[int, ...] = (0,) * self.size
        self.raw_store: Any = None  # what ``store`` is a part of, and
        self.is_store = False  # whether it is this process that keeps it
        self.abandoned = False  # by ``abandon``
        self.local_work: LocalWork = LocalWork()
        self.store = store  # of the ranks that joined: keys and values, also after ``leave``
        self.failure: BaseException | None = None  # why this world is of no use any more
        self.agreed: BaseException | None = None  # an error that all ranks raise, and go on
        self.notes: list[str] = []
        self._joined = joined
        self._is_all = False  # that this process does over a network
        self._neighbours = neighbours
        self._near: list[SharedMemory] = []
        self._far: list[ProcessGroup] = []
        self._made = 0  # groups, the same number on every rank
        self._before_leaving: list[WeakMethod[Callable[[], None]]] = []
        self._groups: list[Group] = []
        ranks = range(self.size)
        alone = len(self.members) == 1
        far = None if alone else process_group.everybody(self._placed(ranks), timeout_s)
        self.everybody = self._with_carriers("world", ranks, far)

    def group(self, name: str, members: Sequence[Sequence[int]]) -> Group:
        """Make one group of each list of world ranks and return this rank's.

        Collective: every rank that is here calls it, in the same order, with the same lists, which
        name those that are away too. Raises ``ValueError`` unless these are a partition of the
        ranks, ``CommError`` when a rank does not come.
        """
        flat = sorted(r for ranks in members for r in ranks)
        if flat != list(range(self.size)):
            raise ValueError(f"group {name}: {members} is not a partition of {self.size} ranks")
        mine: Group | None = None
        for ranks in members:
            places = self._placed(ranks)
            several = sum(place >= 0 for place in places) > 1
            far = process_group.new_group(places, self.timeout_s) if several else None
            if self.rank in ranks:
                mine = self._with_carriers(name, ranks, far)
        assert mine is not None
        return mine

    def _placed(self, ranks: Sequence[int]) -> list[int]:
        """Their places among those that met; -1 for who is away."""
        return [self._places.get(rank, -1) for rank in ranks]

    def _with_carriers(self, name: str, ranks: Sequence[int], far: ProcessGroup | None) -> Group:
        self._made += 1
        if far is not None:
            self._far.append(far)
        here: Transport | None = far
        if far is not None and self._neighbours is not None:
            hosts = [self.topology.host_index(r) if r in self._places else -1 for r in ranks]
            me = list(ranks).index(self.rank)
            near = self._share(ranks, [i for i, host in enumerate(hosts) if host == hosts[me]])
            if len({host for host in hosts if host >= 0}) > 1:
                here = Routed(me, hosts, near, far)
            elif near is not None:
                here = near
        there: Transport | None = None
        if self.device.type == "cuda" and here is not None:
            there = far if self.backend == "nccl" else Staged(here)
        group = Group(name, ranks, self, here, there)
        self._groups.append(group)
        return group

    def _share(self, ranks: Sequence[int], members: Sequence[int]) -> SharedMemory | None:
        """Shared memory between those members, if they are several and each of them can."""
        if len(members) < 2 or self._neighbours is None:
            return None
        try:
            found = self._neighbours.join(f"near/{self._made}", ranks, members)
        except (RuntimeError, DistError) as err:
            text = (str(err).splitlines() or [""])[0][:200]
            raise CommError(f"a rank of this host did not come to share memory ({text})") from err
        if isinstance(found, SharedMemory):
            self._near.append(found)
            return found
        host = self.topology.hosts[self.rank]
        note = f"ranks on {host} exchange by gloo, not through shared memory: {found}"
        if note not in self.notes:
            self.notes.append(note)
        return None

    @property
    def shares_memory(self) -> bool:
        """Whether this rank exchanges with those of its host through shared memory."""
        return bool(self._near)

    def wait_for_device(self) -> None:
        """Block until the device has done what is queued on the current stream, exchanges over NCCL
        among it. ``CommError`` when a peer is gone, or after the job's time limit."""
        if self.device.type != "cuda":
            return
        if len(self.members) == 1:
            torch.cuda.synchronize(self.device)
            return
        wait_until(mark_here(self.device), self.timeout_s, self._lost)

    def _lost(self) -> str:
        """Who is known to be gone: by the cause that it wrote, or by its process."""
        if self.abandoned:
            return "this rank was told to leave"
        with contextlib.suppress(Exception):
            if self.store.check([FAILURE]):
                return "a rank has failed"
        found = next((who for near in self._near if (who := near.lost()) is not None), None)
        return "" if found is None else f"rank {found} has ended"

    def abandon(self) -> None:
        """From another thread: have the exchange that this rank is in, and all later ones, end with
        ``CommError``. Only ``leave`` may follow."""
        self.abandoned = True
        for far in self._far:
            far.abandon()
        for near in self._near:
            near.close()
        if self._joined and self.backend == "nccl":
            process_group.abort_nccl()
        if self._joined and self._is_all and self.raw_store is not None:
            cut_connections(self.raw_store.port)

    def close_listeners(self, keep: int | None) -> None:
        """All groups are made: nobody connects to this process any more, but to the port ``keep``.
        For a process in which nothing else listens, or connects."""
        self._is_all = True
        if self._joined:
            close_listeners(keep)

    def before_leaving(self, work: Callable[[], None]) -> None:
        """``work``, a method of an object that may end before, is called when this world is
        left, and no more than once: it gives up what must not outlive the connections."""
        self._before_leaving.append(WeakMethod(work))

    @property
    def has_left(self) -> bool:
        """Whether ``leave`` has come to its end."""
        return not self._joined

    def leave(self) -> None:
        """Leave: every peer that waits for this rank wakes, and gloo's threads end here, even if
        this world is still referred to."""
        while self._before_leaving:
            if (work := self._before_leaving.pop()()) is not None:
                work()
        if self._joined:
            for group in self._groups:
                group.close()
            for far in self._far:  # also those that shared memory stands in for
                far.close()
            process_group.leave()
            if self._neighbours is not None:
                self._neighbours.close()
        self._joined = False
