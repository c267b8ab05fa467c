"""The one file that knows deepspeed.comm: joining a job, groups as checked objects, leaving.

Two rules hold everywhere above this file. A group is always an object, never ``None``. And both
sides of every message derive its size from what all ranks know, so an empty message is simply not
sent.
"""

from __future__ import annotations

import hashlib
import logging
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as torch_dist

from ds_cp.comm.ledger import Ledger
from ds_cp.errors import CommError, ConfigError, LaunchError
from ds_cp.topology.hosts import Topology

Message = tuple[int, torch.Tensor]  # (index of the peer within the group, contiguous tensor)


@dataclass(frozen=True)
class Rendezvous:
    """Where the ranks of one job meet.

    ``listen_fd`` is rank 0's listening socket (bound by the launch code, loopback for one-host
    jobs); the other ranks, and rank 0 of a job whose store exists already (torchrun), are clients.
    ``prefix`` keeps the keys of one generation of workers apart from the next.
    """

    host: str
    port: int
    listen_fd: int | None = None
    prefix: str = "gen0"


def _lost(what: str, timeout_s: float, err: RuntimeError) -> CommError:
    cause = (str(err).splitlines() or [type(err).__name__])[0][:200]
    return CommError(
        f"{what}: a peer is gone or silent for {timeout_s:g} s ({cause}); see the other ranks' "
        "logs, or raise comm.timeout_s"
    )


class Pending:
    """An exchange on its way. Wait for it exactly once."""

    def __init__(self, works: list[Any], what: str, timeout_s: float) -> None:
        self._works: list[Any] | None = works
        self._what = what
        self._timeout_s = timeout_s

    def wait(self) -> None:
        """Block until every message has arrived; ``CommError`` after the job's time limit."""
        if self._works is None:
            raise RuntimeError(f"{self._what}: waited for twice")
        works, self._works = self._works, None
        try:
            for work in works:
                work.wait()
        except RuntimeError as err:
            raise _lost(self._what, self._timeout_s, err) from err


class Group:
    """Some ranks of the job that talk to each other.

    ``ranks``: world ranks in group order; ``rank``: my index in it; ``hosts``: host index of every
    member; ``ring``: the order (of group indices) in which a ring visits the members so that every
    host border is crossed once. A group of one does no call and returns the same types.
    """

    def __init__(
        self, name: str, ranks: Sequence[int], world: World, handle: object | None
    ) -> None:
        if world.rank not in ranks:
            raise ValueError(f"group {name}: rank {world.rank} is not a member of {list(ranks)}")
        self.name = name
        self.ranks = tuple(ranks)
        self.rank = self.ranks.index(world.rank)
        self.size = len(self.ranks)
        sub = world.topology.subset(self.ranks)
        self.hosts = tuple(sub.host_index(r) for r in range(self.size))
        self.ring = sub.ring_order()
        self.device = world.device
        self.ledger = world.ledger
        self._timeout_s = world.timeout_s
        self._handle = handle

    def close(self) -> None:
        """Give the process group up; no call may follow."""
        self._handle = None

    def __repr__(self) -> str:
        return f"Group({self.name}, ranks={list(self.ranks)}, rank={self.rank})"

    def exchange(self, sends: Sequence[Message], recvs: Sequence[Message], scheme: str) -> Pending:
        """Start one round: send each tensor to its peer, receive into each buffer from its peer.

        Tensors are contiguous, any dtype. Between two ranks messages keep their order. Empty
        tensors are skipped on both sides. The ledger books the payload under ``scheme``.
        """
        import deepspeed.comm as ds_comm

        nbytes = inter = 0
        ops: list[tuple[Any, torch.Tensor, int]] = []
        for peer, buffer in recvs:
            if buffer.numel():
                ops.append((ds_comm.irecv, self._checked(peer, buffer), peer))
        for peer, tensor in sends:
            if not tensor.numel():
                continue
            ops.append((ds_comm.isend, self._checked(peer, tensor), peer))
            size = tensor.numel() * tensor.element_size()
            nbytes += size
            if self.hosts[peer] != self.hosts[self.rank]:
                inter += size
        what = f"{scheme} in group {self.name}"
        if not ops:
            return Pending([], what, self._timeout_s)
        self.ledger.add(scheme, nbytes, inter)
        try:
            if ops[0][1].is_cuda:  # NCCL wants messages that progress together
                batch = [
                    ds_comm.P2POp(op, t, self.ranks[peer], group=self._handle)
                    for op, t, peer in ops
                ]
                works = ds_comm.batch_isend_irecv(batch)
            else:
                works = [op(t, self.ranks[peer], group=self._handle) for op, t, peer in ops]
        except RuntimeError as err:
            raise _lost(what, self._timeout_s, err) from err
        return Pending(works, what, self._timeout_s)

    def _checked(self, peer: int, tensor: torch.Tensor) -> torch.Tensor:
        if peer == self.rank or not 0 <= peer < self.size:
            raise ValueError(f"group {self.name}: rank {self.rank} cannot message rank {peer}")
        if not tensor.is_contiguous():
            raise ValueError(f"group {self.name}: tensors on the wire must be contiguous")
        return tensor

    def all_reduce(self, tensor: torch.Tensor, scheme: str) -> None:
        """Sum ``tensor`` over the group in place. It must be contiguous: a reduced temporary is
        lost."""
        if self.size == 1:
            return
        import deepspeed.comm as ds_comm

        if not tensor.is_contiguous():
            raise ValueError(f"group {self.name}: all_reduce of a non-contiguous tensor")
        nbytes = 2 * (self.size - 1) * tensor.numel() * tensor.element_size() // self.size
        spans_hosts = len(set(self.hosts)) > 1
        self.ledger.add(scheme, nbytes, nbytes if spans_hosts else 0)
        try:
            ds_comm.all_reduce(tensor, group=self._handle)
        except RuntimeError as err:
            raise _lost(f"{scheme} in group {self.name}", self._timeout_s, err) from err

    def broadcast(self, tensor: torch.Tensor, scheme: str) -> None:
        """Give member 0's ``tensor`` (contiguous, same shape everywhere) to all, in place."""
        if self.size == 1:
            return
        import deepspeed.comm as ds_comm

        if self.rank == 0:
            nbytes = tensor.numel() * tensor.element_size()
            away = sum(host != self.hosts[0] for host in self.hosts)
            self.ledger.add(scheme, nbytes * (self.size - 1), nbytes * away)
        try:
            ds_comm.broadcast(tensor, src=self.ranks[0], group=self._handle)
        except RuntimeError as err:
            raise _lost(f"{scheme} broadcast in group {self.name}", self._timeout_s, err) from err

    def barrier(self) -> None:
        """Wait until every member is here."""
        token = torch.zeros(1, dtype=torch.int32, device=self.device)
        self.all_reduce(token, "barrier")


class World:
    """This process's seat in the job: who am I, where are the others, and the groups we share."""

    def __init__(
        self, rank: int, topology: Topology, device: torch.device, timeout_s: float, joined: bool,
        store: Any = None,
    ) -> None:  # fmt: skip
        self.rank = rank
        self.size = topology.size
        self.topology = topology
        self.device = device
        self.timeout_s = timeout_s
        self.ledger = Ledger()
        self.store = store  # of the ranks that joined: keys and values, also after ``leave``
        self.failure: BaseException | None = None  # why this world is of no use any more
        self._joined = joined
        handle = torch_dist.group.WORLD if self.size > 1 else None
        self.everybody = Group("world", range(self.size), self, handle)
        self._groups = [self.everybody]

    def group(self, name: str, members: Sequence[Sequence[int]]) -> Group:
        """Make one group out of each list of world ranks and return mine.

        Collective: every rank calls it, in the same order, with the same lists (a partition).
        """
        flat = sorted(r for ranks in members for r in ranks)
        if flat != list(range(self.size)):
            raise ValueError(f"group {name}: {members} is not a partition of {self.size} ranks")
        mine: Group | None = None
        for ranks in members:
            handle = None
            if len(ranks) > 1:
                # deepspeed.comm.new_group takes no timeout, and torch's default is 30 minutes
                # whatever the world's own limit is.
                limit = timedelta(seconds=self.timeout_s)
                handle = torch_dist.new_group(list(ranks), timeout=limit)
            if self.rank in ranks:
                mine = Group(name, ranks, self, handle)
        assert mine is not None
        self._groups.append(mine)
        return mine

    def leave(self) -> None:
        """Leave cleanly: gloo's threads end here, whoever still holds this world.

        ``destroy_process_group`` alone leaves them running as long as any object refers to a
        process group. At exit such a thread may drop a tensor, want the interpreter's lock for it,
        be ended by the interpreter, and abort the process ("terminate called without an active
        exception").
        """
        if self._joined and torch_dist.is_initialized():
            torch_dist.destroy_process_group()
            for group in self._groups:
                group.close()
        self._joined = False


def join(
    rank: int,
    world_size: int,
    rendezvous: Rendezvous,
    *,
    host: str,
    hosts: Sequence[str] | None,
    device: torch.device,
    timeout_s: float,
    digest: str = "",
) -> World:
    """Join the job and learn its hosts.

    ``host`` is this process's host name; ``hosts`` the host of every rank when the launch code
    knows it (MPI), else ``None`` and the names are exchanged through the store. ``digest``: what
    all ranks must have in common (their config). Raises ``CommError`` when not all ranks arrive in
    time, ``LaunchError`` when the store cannot listen, ``ConfigError`` when ranks were started
    differently.
    """
    limit = timedelta(seconds=timeout_s)
    try:
        store = _open_store(rank, rendezvous, limit)
        names = _introduce(rank, world_size, host, digest, store)
        _init_process_group(rank, world_size, store, device, limit)
    except (RuntimeError, torch_dist.DistError) as err:
        raise CommError(
            f"rank {rank} of {world_size} could not join the others at "
            f"{rendezvous.host}:{rendezvous.port} within {timeout_s:g} s: "
            f"{str(err).splitlines()[0][:200]}"
        ) from err
    topology = Topology.from_hosts(list(hosts or names))
    return World(rank, topology, device, timeout_s, joined=True, store=store)


def _open_store(rank: int, at: Rendezvous, limit: timedelta) -> torch_dist.Store:
    if rank == 0 and at.listen_fd is not None:
        try:
            bound = socket.socket(fileno=os.dup(at.listen_fd))
        except OSError as err:
            raise LaunchError(f"the store's socket is not usable: {err}") from err
        port = bound.getsockname()[1]
        # The store takes the socket as it is: bound to loopback, it is not reachable from outside,
        # whereas a store that binds by itself listens on every interface.
        store = torch_dist.TCPStore(
            at.host, port, is_master=True, timeout=limit, wait_for_workers=False,
            master_listen_fd=bound.detach(), use_libuv=True,
        )  # fmt: skip
    else:
        store = torch_dist.TCPStore(
            at.host, at.port, is_master=False, timeout=limit, wait_for_workers=False
        )
    return torch_dist.PrefixStore(f"ds_cp/{at.prefix}", store)


def _introduce(rank: int, size: int, host: str, digest: str, store: torch_dist.Store) -> list[str]:
    """Tell the others my host and what I was started with; every rank's host, rank 0 first."""
    mark = hashlib.sha256(digest.encode()).hexdigest()
    store.set(f"hello/{rank}", f"{mark} {host}")
    hellos = [store.get(f"hello/{r}").decode().split(" ", 1) for r in range(size)]
    odd = [r for r, hello in enumerate(hellos) if hello[0] != hellos[0][0]]
    if odd:
        # Rank 0 is the store: it must not go before the others have read who is at odds.
        store.set(f"read/{rank}", "")
        if rank == 0:
            store.wait([f"read/{r}" for r in range(size)])
        raise ConfigError(
            f"ranks {odd[:8]} were started with another config than rank 0: start every rank "
            "with the same "
            "file and options"
        )
    return [hello[1] for hello in hellos]


def _worth_showing(record: logging.LogRecord) -> bool:
    """Every rank of a CPU job would warn that it runs on a CPU; the start-up summary says it
    once."""
    return not record.getMessage().startswith("Setting accelerator to CPU")


def _init_process_group(
    rank: int, size: int, store: torch_dist.Store, device: torch.device, limit: timedelta
) -> None:
    """torch joins with our own store; DeepSpeed then adopts the group.

    The shared-memory op is marked as not available first: its compilation takes 60 to 100 s, needs
    a compiler, and once loaded it ignores the group argument of an all-reduce.
    """
    logging.getLogger("DeepSpeed").addFilter(_worth_showing)
    import deepspeed.comm as ds_comm
    from deepspeed.ops import __compatible_ops__

    __compatible_ops__["deepspeed_shm_comm"] = False
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    torch_dist.init_process_group(
        backend, store=store, rank=rank, world_size=size, timeout=limit,
        device_id=device if device.type == "cuda" else None,
    )  # fmt: skip
    ds_comm.init_distributed(
        dist_backend="nccl" if device.type == "cuda" else "gloo",
        auto_mpi_discovery=False, verbose=False, timeout=limit, rank=rank, world_size=size,
    )  # fmt: skip
