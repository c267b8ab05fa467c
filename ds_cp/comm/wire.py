"""The one file that knows deepspeed.comm: joining a job, groups as checked objects, leaving.

Two rules hold everywhere above this file. A group is always an object, never ``None``. And both
sides of a message derive its size from what all ranks know, so an empty message is not sent.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as torch_dist

from ds_cp.comm.ledger import Ledger
from ds_cp.comm.local_work import LocalWork
from ds_cp.comm.pending import Pending, lost_peer
from ds_cp.errors import CommError, ConfigError
from ds_cp.topology.hosts import Topology, name_hosts
from ds_cp.topology.net import host_key, listening_address

if TYPE_CHECKING:  # torch.distributed has these names, but does not declare them as its own
    from torch._C._distributed_c10d import PrefixStore, Store, TCPStore
else:
    from torch.distributed import PrefixStore, Store, TCPStore

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


class Group:
    """Some ranks of the job that exchange messages.

    ``ranks``: world ranks in group order; ``rank``: this rank's index in it; ``hosts``: host index
    of every member; ``ring``: the order (of group indices) in which a ring visits the members so
    that it enters each host once. A group of one does no call and returns the same types.
    Raises ``ValueError`` when this rank is not a member.
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
        self._local_work = world.local_work
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
        tensors are skipped on both sides. The ledger counts the payload under ``scheme``. Raises
        ``ValueError`` for a tensor that is not contiguous, ``CommError`` when a peer is gone.
        """
        import deepspeed.comm as ds_comm

        self._local_work.refuse(scheme, self.name)
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
        began = time.monotonic()
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
            raise lost_peer(what, began, self._timeout_s, err) from err
        return Pending(works, what, self._timeout_s)

    def _checked(self, peer: int, tensor: torch.Tensor) -> torch.Tensor:
        if peer == self.rank or not 0 <= peer < self.size:
            raise ValueError(f"group {self.name}: rank {self.rank} cannot message rank {peer}")
        if not tensor.is_contiguous():
            raise ValueError(f"group {self.name}: tensors on the wire must be contiguous")
        return tensor

    def all_reduce(self, tensor: torch.Tensor, scheme: str) -> None:
        """Sum ``tensor`` over the group in place.

        Raises ``ValueError`` for a tensor that is not contiguous (what was reduced would be a
        temporary, and lost), ``CommError`` when a peer is gone.
        """
        self._local_work.refuse(scheme, self.name)
        if self.size == 1:
            return
        import deepspeed.comm as ds_comm

        if not tensor.is_contiguous():
            raise ValueError(f"group {self.name}: all_reduce of a non-contiguous tensor")
        nbytes = 2 * (self.size - 1) * tensor.numel() * tensor.element_size() // self.size
        spans_hosts = len(set(self.hosts)) > 1
        self.ledger.add(scheme, nbytes, nbytes if spans_hosts else 0)
        began = time.monotonic()
        try:
            ds_comm.all_reduce(tensor, group=self._handle)
        except RuntimeError as err:
            what = f"{scheme} in group {self.name}"
            raise lost_peer(what, began, self._timeout_s, err) from err

    def broadcast(self, tensor: torch.Tensor, scheme: str) -> None:
        """Give member 0's ``tensor`` (same shape everywhere) to all, in place. ``ValueError`` and
        ``CommError`` as in ``all_reduce``."""
        self._local_work.refuse(scheme, self.name)
        if self.size == 1:
            return
        import deepspeed.comm as ds_comm

        if not tensor.is_contiguous():
            raise ValueError(f"group {self.name}: broadcast of a non-contiguous tensor")
        if self.rank == 0:
            nbytes = tensor.numel() * tensor.element_size()
            away = sum(host != self.hosts[0] for host in self.hosts)
            self.ledger.add(scheme, nbytes * (self.size - 1), nbytes * away)
        began = time.monotonic()
        try:
            ds_comm.broadcast(tensor, src=self.ranks[0], group=self._handle)
        except RuntimeError as err:
            what = f"{scheme} broadcast in group {self.name}"
            raise lost_peer(what, began, self._timeout_s, err) from err

    def barrier(self) -> None:
        """Wait until every member is here."""
        token = torch.zeros(1, dtype=torch.int32, device=self.device)
        self.all_reduce(token, "barrier")


class World:
    """This process's place in the job: its rank, every rank's host, and the groups it is in."""

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
        self.local_work = LocalWork()
        self.store = store  # of the ranks that joined: keys and values, also after ``leave``
        self.failure: BaseException | None = None  # why this world is of no use any more
        self.agreed: BaseException | None = None  # an error that all ranks raise, and go on
        self._joined = joined
        handle = torch_dist.group.WORLD if self.size > 1 else None
        self.everybody = Group("world", range(self.size), self, handle)
        self._groups = [self.everybody]

    def group(self, name: str, members: Sequence[Sequence[int]]) -> Group:
        """Make one group of each list of world ranks and return this rank's.

        Collective: every rank calls it, in the same order, with the same lists. Raises
        ``ValueError`` unless these are a partition of the ranks.
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
        """Leave cleanly: gloo's threads end here, even if this world is still referred to.

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
    knows it (MPI), else ``None`` and the names are exchanged through the store, where two hosts of
    one name get different ones. ``digest``: what all ranks must have in common (their config).
    Raises ``CommError`` when not all ranks arrive in time, ``LaunchError`` when the store cannot
    listen, ``ConfigError`` when ranks were started differently.
    """
    limit = timedelta(seconds=timeout_s)
    try:
        store = _open_store(rank, rendezvous, limit)
        names = _introduce(rank, world_size, host, digest, store)
        _init_process_group(rank, world_size, store, device, limit)
    except (RuntimeError, torch_dist.DistError) as err:
        where = f"{rendezvous.host} port {rendezvous.port}"
        if rank == 0 and rendezvous.listen_fd is not None:
            where += f" (it listens on {listening_address(rendezvous.listen_fd)[0]})"
        raise CommError(
            f"rank {rank} of {world_size} could not join the others at {where} "
            f"within {timeout_s:g} s: {(str(err).splitlines() or [type(err).__name__])[0][:200]}"
        ) from err
    topology = Topology.from_hosts(list(hosts or names))
    return World(rank, topology, device, timeout_s, joined=True, store=store)


def _open_store(rank: int, at: Rendezvous, limit: timedelta) -> Store:
    if rank == 0 and at.listen_fd is not None:
        # Rank 0 is a client of its own store, at the address that listens: ``at.host`` is for the
        # others, and may lead elsewhere here (a host's own name is often a loopback address).
        ip, port = listening_address(at.listen_fd)
        # The store takes the socket as it is: bound to loopback, it is not reachable from outside,
        # whereas a store that binds by itself listens on every interface.
        store = TCPStore(
            ip, port, is_master=True, timeout=limit, wait_for_workers=False,
            master_listen_fd=os.dup(at.listen_fd), use_libuv=True,
        )  # fmt: skip
    else:
        store = TCPStore(at.host, at.port, is_master=False, timeout=limit, wait_for_workers=False)
    return PrefixStore(f"ds_cp/{at.prefix}", store)


def _introduce(rank: int, size: int, host: str, digest: str, store: Store) -> list[str]:
    """Publish this rank's host and a digest of its config; returns every rank's host, rank 0
    first. ``ConfigError`` when the digests differ."""
    mark = hashlib.sha256(digest.encode()).hexdigest()
    store.set(f"hello/{rank}", f"{mark} {host_key()} {host}")
    hellos = [store.get(f"hello/{r}").decode().split(" ", 2) for r in range(size)]
    odd = [r for r, hello in enumerate(hellos) if hello[0] != hellos[0][0]]
    if odd:
        # Rank 0 is the store: it must stay until the other ranks have read every digest.
        store.set(f"read/{rank}", "")
        if rank == 0:
            store.wait([f"read/{r}" for r in range(size)])
        raise ConfigError(
            f"ranks {odd[:8]} were started with another config than rank 0: "
            "start every rank with the same file and options"
        )
    hosts = [(name, key) for _, key, name in hellos]
    return list(name_hosts([hosts.index(own) for own in hosts], [name for name, _ in hosts]))


def _worth_showing(record: logging.LogRecord) -> bool:
    """False for DeepSpeed's warning, on every rank, that a CPU job runs on CPUs; the start-up
    summary says it once."""
    return not record.getMessage().startswith("Setting accelerator to CPU")


def _init_process_group(
    rank: int, size: int, store: Store, device: torch.device, limit: timedelta
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
