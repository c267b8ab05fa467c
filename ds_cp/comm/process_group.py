"""The one file that knows deepspeed.comm and torch.distributed: gloo and NCCL.

A group is always an object here, never ``None``, which would mean the whole world.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as torch_dist

from ds_cp.comm.pending import Pending, gone_peer, lost_peer
from ds_cp.comm.transport import Message
from ds_cp.errors import CommError
from ds_cp.topology.net import listening_address

if TYPE_CHECKING:  # torch.distributed has these names, but does not declare them as its own
    from torch._C._distributed_c10d import PrefixStore, Store, TCPStore
else:
    from torch.distributed import PrefixStore, Store, TCPStore

DistError = torch_dist.DistError
TorchStore = Store  # what torch takes for one


class ProcessGroup:
    """Carries messages by a process group of torch, through deepspeed.comm. See ``Transport``.

    ``ranks``: of each member the rank in torch's world, -1 for one that is away; ``handle``: the
    process group.
    """

    def __init__(self, ranks: Sequence[int], handle: object, timeout_s: float) -> None:
        self._ranks = tuple(ranks)
        self._handle: object | None = handle
        self._timeout_s = timeout_s
        self._is_abandoned = False
        self._under_way: dict[int, list[Any]] = {}  # works of exchanges that were not waited for

    def exchange(self, sends: Sequence[Message], recvs: Sequence[Message], what: str) -> Pending:
        """Start to send each tensor and to receive into each buffer. The messages move by
        themselves; over NCCL they are ordered with the current stream, and a wait does not block.
        """
        import deepspeed.comm as ds_comm

        self._check(what)
        ops: list[tuple[Any, torch.Tensor, int]] = [(ds_comm.irecv, t, peer) for peer, t in recvs]
        ops += [(ds_comm.isend, t, peer) for peer, t in sends]
        began = time.monotonic()
        try:
            if ops and ops[0][1].is_cuda:  # NCCL wants messages that progress together
                batch = [
                    ds_comm.P2POp(op, t, self._ranks[peer], group=self._handle)
                    for op, t, peer in ops
                ]
                works = list(ds_comm.batch_isend_irecv(batch))
            else:
                works = [op(t, self._ranks[peer], group=self._handle) for op, t, peer in ops]
        except RuntimeError as err:
            raise lost_peer(what, began, self._timeout_s, err) from err

        self._under_way[id(works)] = works

        def finish() -> None:
            try:
                for work in works:
                    work.wait()
            except RuntimeError as err:
                raise lost_peer(what, began, self._timeout_s, err) from err
            finally:
                del self._under_way[id(works)]
                works.clear()

        return Pending(finish, what)

    def all_reduce(self, tensor: torch.Tensor, what: str) -> None:
        """In an order that is the library's."""
        import deepspeed.comm as ds_comm

        self._check(what)
        began = time.monotonic()
        try:
            ds_comm.all_reduce(tensor, group=self._handle)
        except RuntimeError as err:
            raise lost_peer(what, began, self._timeout_s, err) from err

    def broadcast(self, tensor: torch.Tensor, what: str) -> None:
        """As the library does."""
        import deepspeed.comm as ds_comm

        self._check(what)
        began = time.monotonic()
        try:
            ds_comm.broadcast(tensor, src=self._ranks[0], group=self._handle)
        except RuntimeError as err:
            raise lost_peer(what, began, self._timeout_s, err) from err

    def abandon(self) -> None:
        """From another thread: have all later calls end with ``CommError``. One that waits goes on
        until its peer answers or leaves."""
        self._is_abandoned = True

    def _check(self, what: str) -> None:
        if self._is_abandoned:
            raise gone_peer(what, time.monotonic(), "this rank was told to leave")

    def close(self) -> None:
        """Forget the process group and the messages on their way, so that ``leave`` ends it: a
        traceback may hold on to a function that holds on to them."""
        self._handle = None
        for works in self._under_way.values():
            works.clear()


def everybody(ranks: Sequence[int], timeout_s: float) -> ProcessGroup:
    """The group of all ranks that joined; ``ranks`` as in ``ProcessGroup``."""
    return ProcessGroup(ranks, torch_dist.group.WORLD, timeout_s)


def new_group(ranks: Sequence[int], timeout_s: float) -> ProcessGroup:
    """A new group; every rank that joined calls it, members or not. deepspeed.comm.new_group takes
    no timeout, and torch's default is 30 minutes whatever the world's own limit is. Raises
    ``CommError`` when one does not come, or the store is gone."""
    here = [rank for rank in ranks if rank >= 0]
    try:
        handle = torch_dist.new_group(here, timeout=timedelta(seconds=timeout_s))
    except (RuntimeError, DistError) as err:
        text = (str(err).splitlines() or [type(err).__name__])[0][:200]
        raise CommError(f"a rank did not come to make a group ({text})") from err
    return ProcessGroup(ranks, handle, timeout_s)


def in_a_job() -> bool:
    """Whether this process has process groups of torch: an engine's, or the caller's own."""
    return torch_dist.is_initialized()


def leave() -> None:
    """End all process groups that no object refers to any more.

    ``destroy_process_group`` alone leaves gloo's threads running as long as any object refers to a
    process group. At exit such a thread may drop a tensor, want the interpreter's lock for it, be
    ended by the interpreter, and abort the process ("terminate called without an active
    exception").
    """
    if torch_dist.is_initialized():
        torch_dist.destroy_process_group()


def open_store(host: str, port: int, listen_fd: int | None, timeout_s: float) -> Store:
    """The store by which ranks join: on the listening socket ``listen_fd``, or a client's.

    Rank 0 is a client of its own store, at the address that listens: ``host`` is for the others,
    and may lead elsewhere here (a host's own name is often a loopback address).
    """
    limit = timedelta(seconds=timeout_s)
    if listen_fd is not None:
        ip, bound = listening_address(listen_fd)
        # The store takes the socket as it is: bound to loopback, it is not reachable from outside,
        # whereas a store that binds by itself listens on every interface.
        return TCPStore(
            ip, bound, is_master=True, timeout=limit, wait_for_workers=False,
            master_listen_fd=os.dup(listen_fd), use_libuv=True,
        )  # fmt: skip
    return TCPStore(host, port, is_master=False, timeout=limit, wait_for_workers=False)


def prefixed(store: Store, prefix: str) -> Store:
    """The part of a store that one meeting of the ranks uses."""
    return PrefixStore(prefix_of(prefix), store)


def prefix_of(prefix: str) -> str:
    """How the keys of that part begin, up to a slash."""
    return f"ds_cp/{prefix}"


def abort_nccl() -> None:
    """End the kernels of all NCCL groups, which wait for a peer. Nothing else may follow but
    ``leave``. gloo's abort wakes nobody who waits (torch 2.13)."""
    for handle in list(torch_dist.distributed_c10d._world.pg_map):
        with contextlib.suppress(RuntimeError):
            handle.abort()


def import_libraries() -> None:
    """Import DeepSpeed as ``start`` wants it, ahead of that."""
    logging.getLogger("DeepSpeed").addFilter(_worth_showing)  # the same one once
    import deepspeed.comm  # noqa: F401
    from deepspeed.ops import __compatible_ops__

    __compatible_ops__["deepspeed_shm_comm"] = False


def start(
    rank: int, size: int, store: Store, device: torch.device, nccl: bool, timeout_s: float
) -> None:
    """torch joins with our own store; DeepSpeed then adopts the group.

    The shared-memory op is marked as not available first: its compilation takes 60 to 100 s, needs
    a compiler, and once loaded it ignores the group argument of an all-reduce.
    """
    import_libraries()
    import deepspeed.comm as ds_comm

    limit = timedelta(seconds=timeout_s)
    torch_dist.init_process_group(
        "cpu:gloo,cuda:nccl" if nccl else "gloo", store=store, rank=rank, world_size=size,
        timeout=limit, device_id=device if nccl else None,
    )  # fmt: skip
    ds_comm.init_distributed(
        dist_backend="nccl" if nccl else "gloo",
        auto_mpi_discovery=False, verbose=False, timeout=limit, rank=rank, world_size=size,
    )  # fmt: skip


def _worth_showing(record: logging.LogRecord) -> bool:
    """False for DeepSpeed's warning, on every rank, that a CPU job runs on CPUs; the start-up
    summary says it once."""
    return not record.getMessage().startswith("Setting accelerator to CPU")
