"""Some ranks of the job that exchange messages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch

from ds_cp.comm.pending import Pending
from ds_cp.comm.transport import Message, Preparing, Transport

if TYPE_CHECKING:
    from ds_cp.comm.world import World


class Prepared:
    """An exchange that ``Group.prepare`` gives: started any number of times, each when the one
    before was waited for. ``weight``: its bytes as the ledger counts them, None when nothing is
    sent or received; ``begin``: starts it."""

    __slots__ = ("_begin", "_group", "_scheme", "_weight")

    def __init__(
        self, group: Group, scheme: str, weight: tuple[int, int] | None,
        begin: Callable[[], Pending],
    ) -> None:  # fmt: skip
        self._group = group
        self._scheme = scheme
        self._weight = weight
        self._begin = begin

    def start(self) -> Pending:
        """Start one round, as ``Group.exchange`` does."""
        group = self._group
        group.local_work.refuse(self._scheme, group.name)
        if self._weight is not None:
            group.ledger.add(self._scheme, *self._weight)
        pending = self._begin()
        pending.waits = group.waits
        return pending


class Group:
    """Some ranks of the job that exchange messages.

    ``ranks``: world ranks in group order; ``rank``: this rank's index in it; ``hosts``: host index
    of every member, -1 for one that is away; ``ring``: the order (of group indices) in which a ring
    visits the members so that it enters each host once; ``transport``: carries what is on the CPU;
    ``on_device``: what is on a CUDA device. Both may be exchanged for others, which see every
    message. A group of one does no call and returns the same types. A member that is away keeps its
    index, and nobody messages it; the first one is here. Raises ``ValueError`` when this rank is
    not a member.
    """

    def __init__(
        self, name: str, ranks: Sequence[int], world: World, transport: Transport | None,
        on_device: Transport | None = None,
    ) -> None:  # fmt: skip
        if world.rank not in ranks:
            raise ValueError(f"group {name}: rank {world.rank} is not a member of {list(ranks)}")
        self.name = name
        self.ranks = tuple(ranks)
        self.rank = self.ranks.index(world.rank)
        self.size = len(self.ranks)
        sub = world.topology.subset(self.ranks)
        here = set(world.members)
        self.present = tuple(i for i, r in enumerate(self.ranks) if r in here)
        self.hosts = tuple(sub.host_index(i) if i in self.present else -1 for i in range(self.size))
        self._peers = frozenset(self.present)
        self._is_far = [host != self.hosts[self.rank] for host in self.hosts]
        self.ring = tuple(i for i in sub.ring_order() if i in self.present)
        self.device = world.device
        self.ledger = world.ledger
        self.waits = world.waits
        self.transport = transport
        self.on_device = on_device
        self.local_work = world.local_work

    def close(self) -> None:
        """Wake the peers that wait for this rank and give the connections up; no call may
        follow."""
        for transport in (self.transport, self.on_device):
            if transport is not None:
                transport.close()

    def __repr__(self) -> str:
        return f"Group({self.name}, ranks={list(self.ranks)}, rank={self.rank})"

    def exchange(self, sends: Sequence[Message], recvs: Sequence[Message], scheme: str) -> Pending:
        """Start one round: send each tensor to its peer, receive into each buffer from its peer.

        Tensors are contiguous, any dtype, all on the CPU or all on the device. They stay untouched
        until the round was waited for. Between two ranks messages keep their order. Empty tensors
        are skipped on both sides. The ledger counts the payload under ``scheme``. Raises
        ``ValueError`` for a tensor that is not contiguous, ``CommError`` when a peer is gone.
        """
        self.local_work.refuse(scheme, self.name)
        coming, going = self._checked(recvs), self._checked(sends)
        what = f"{scheme} in group {self.name}"
        if not coming and not going:
            return Pending(None, what)
        self.ledger.add(scheme, *self._weighed(going))
        pending = self._carrier((going or coming)[0][1]).exchange(going, coming, what)
        pending.waits = self.waits
        return pending

    def prepare(self, sends: Sequence[Message], recvs: Sequence[Message], scheme: str) -> Prepared:
        """A round as in ``exchange`` of tensors that stay where they are, checked here, once."""
        coming, going = self._checked(recvs), self._checked(sends)
        what = f"{scheme} in group {self.name}"
        if not coming and not going:
            return Prepared(self, scheme, None, partial(Pending, None, what))
        carrier = self._carrier((going or coming)[0][1])
        if isinstance(carrier, Preparing):
            begin = carrier.prepare(going, coming, what)
        else:
            begin = partial(carrier.exchange, going, coming, what)
        return Prepared(self, scheme, self._weighed(going), begin)

    def _weighed(self, going: Sequence[Message]) -> tuple[int, int]:
        """Bytes that are sent, and those of them for other hosts."""
        nbytes = inter = 0
        for peer, tensor in going:
            size = tensor.nbytes
            nbytes += size
            if self._is_far[peer]:
                inter += size
        return nbytes, inter

    def _checked(self, messages: Sequence[Message]) -> list[Message]:
        """Those that are not empty."""
        found = []
        for message in messages:
            peer, tensor = message
            if not tensor.numel():
                continue
            if peer == self.rank or peer not in self._peers:
                raise ValueError(f"group {self.name}: rank {self.rank} cannot message rank {peer}")
            if not tensor.is_contiguous():
                raise ValueError(f"group {self.name}: tensors on the wire must be contiguous")
            found.append(message)
        return found

    def _carrier(self, tensor: torch.Tensor) -> Transport:
        found = self.on_device if tensor.is_cuda else self.transport
        assert found is not None, f"group {self.name} has nothing that carries {tensor.device.type}"
        return found

    def all_reduce(self, tensor: torch.Tensor, scheme: str) -> None:
        """Sum ``tensor`` over the group in place; within a host in the order of the ranks.

        Raises ``ValueError`` for a tensor that is not contiguous (what was reduced would be a
        temporary, and lost), ``CommError`` when a peer is gone.
        """
        self.local_work.refuse(scheme, self.name)
        if (number := len(self.present)) == 1:
            return
        if not tensor.is_contiguous():
            raise ValueError(f"group {self.name}: all_reduce of a non-contiguous tensor")
        nbytes = 2 * (number - 1) * tensor.numel() * tensor.element_size() // number
        spans_hosts = len({self.hosts[i] for i in self.present}) > 1
        self.ledger.add(scheme, nbytes, nbytes if spans_hosts else 0)
        self._carrier(tensor).all_reduce(tensor, f"{scheme} in group {self.name}")

    def broadcast(self, tensor: torch.Tensor, scheme: str) -> None:
        """Give member 0's ``tensor`` (same shape everywhere) to all, in place. ``ValueError`` and
        ``CommError`` as in ``all_reduce``."""
        self.local_work.refuse(scheme, self.name)
        if len(self.present) == 1:
            return
        if not tensor.is_contiguous():
            raise ValueError(f"group {self.name}: broadcast of a non-contiguous tensor")
        if self.rank == 0:
            nbytes = tensor.numel() * tensor.element_size()
            far = sum(self._is_far[i] for i in self.present)
            self.ledger.add(scheme, nbytes * (len(self.present) - 1), nbytes * far)
        self._carrier(tensor).broadcast(tensor, f"{scheme} broadcast in group {self.name}")

    def barrier(self) -> None:
        """Wait until every member is here."""
        token = torch.zeros(1, dtype=torch.int32)
        self.all_reduce(token, "barrier")
