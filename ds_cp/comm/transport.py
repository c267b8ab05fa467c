"""What carries a group's messages, and how several carriers make one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import torch

from ds_cp.comm.pending import Pending

Message = tuple[int, torch.Tensor]  # (index of the peer within the group, contiguous tensor)
PUMP_S = 0.0005  # between two looks at what waits to be sent, while another carrier is waited for


class Transport(Protocol):
    """Carries messages between the members of one group.

    Tensors are contiguous and not empty, peers are members other than this one: the group has
    checked that. Between two members messages keep their order. Every call raises ``CommError``
    when a peer is gone or silent; ``what`` names the exchange in it.
    """

    def exchange(self, sends: Sequence[Message], recvs: Sequence[Message], what: str) -> Pending:
        """Start to send each tensor and to receive into each buffer."""

    def all_reduce(self, tensor: torch.Tensor, what: str) -> None:
        """Sum ``tensor`` over the group in place."""

    def broadcast(self, tensor: torch.Tensor, what: str) -> None:
        """Give member 0's ``tensor`` to all, in place."""

    def close(self) -> None:
        """Wake the peers that wait for this member; no call may follow. May be called twice."""


@runtime_checkable
class Preparing(Transport, Protocol):
    """A transport that can do once what is the same each time the same tensors are exchanged."""

    def prepare(
        self, sends: Sequence[Message], recvs: Sequence[Message], what: str
    ) -> Callable[[], Pending]:
        """What does as ``exchange`` with these each time it is called."""


class Near(Transport, Protocol):
    """A transport that moves messages only while one of its calls runs."""

    def unsent(self) -> bool:
        """Move what can be moved; whether messages still wait to be sent."""


class Routed:
    """Members of several hosts: ``near`` carries what stays on this one, ``far`` the rest.

    ``hosts``: host index of every member, -1 for one that is away; ``rank``: this one's index;
    ``near`` is None where this host has no such carrier. A broadcast goes to one member of each
    host, which passes it on.
    """

    def __init__(self, rank: int, hosts: Sequence[int], near: Near | None, far: Transport) -> None:
        self._rank = rank
        self._hosts = tuple(hosts)
        self._near = near
        self._far = far
        self._is_near = [near is not None and host == hosts[rank] for host in hosts]

    def exchange(self, sends: Sequence[Message], recvs: Sequence[Message], what: str) -> Pending:
        """Both carriers' parts at once."""
        near = self._near
        there = self._of(sends, False), self._of(recvs, False)
        far = self._far.exchange(*there, what) if there[0] or there[1] else Pending(None, what)
        if near is None:
            return far
        mine = near.exchange(self._of(sends, True), self._of(recvs, True), what)

        def finish() -> None:
            mine.wait()
            _wait_beside(far, near)

        def hurry() -> bool:
            mine.before_work()
            return False

        return Pending(finish, what, hurry)

    def _of(self, messages: Sequence[Message], near: bool) -> list[Message]:
        return [message for message in messages if self._is_near[message[0]] == near]

    def all_reduce(self, tensor: torch.Tensor, what: str) -> None:
        """By the carrier that reaches all."""
        self._far.all_reduce(tensor, what)

    def broadcast(self, tensor: torch.Tensor, what: str) -> None:
        """To the first member of each host, and from there inside it."""
        hosts = [host for host in dict.fromkeys(self._hosts) if host >= 0]
        first = {host: self._hosts.index(host) for host in hosts}
        mine = first[self._hosts[self._rank]]
        if self._rank != mine:
            self.exchange([], [(mine, tensor)], what).wait()
            return
        others = [leader for leader in first.values() if leader != 0]
        inside = [
            member
            for member, host in enumerate(self._hosts)
            if host == self._hosts[mine] and member != mine
        ]
        if mine != 0:
            self.exchange([], [(0, tensor)], what).wait()
            others = []
        if others or inside:
            self.exchange([(peer, tensor) for peer in (*others, *inside)], [], what).wait()

    def close(self) -> None:
        """Close both."""
        if self._near is not None:
            self._near.close()
        self._far.close()


def _wait_beside(far: Pending, near: Near) -> None:
    """Wait for ``far``, whose messages move by themselves. What ``near`` still has to send moves
    meanwhile: a peer may need it before it answers."""
    if not near.unsent():
        far.wait()
        return
    done = threading.Event()
    failed: list[BaseException] = []

    def wait() -> None:
        try:
            far.wait()
        except BaseException as err:
            failed.append(err)
        finally:
            done.set()

    threading.Thread(target=wait, daemon=True).start()
    while not done.wait(PUMP_S):
        near.unsent()
    if failed:
        raise failed[0]


def sum_in_order(
    exchange: Callable[[Sequence[Message], Sequence[Message], str], Pending],
    rank: int, size: int, tensor: torch.Tensor, what: str,
) -> None:  # fmt: skip
    """Sum ``tensor`` over ``size`` members in place, in the order of the members: the same bits on
    each of them and in every run. 16-bit types are summed in fp32 and rounded once.

    Small tensors go to all at once, large ones by slices: each member sums one and gives it out.
    """
    flat = tensor.view(-1)
    if flat.numel() * flat.element_size() * (size - 1) <= SMALL_SUM or flat.numel() < size:
        flat.copy_(_gather_and_sum(exchange, rank, size, flat, [flat] * size, what))
        return
    slices = list(torch.tensor_split(flat, size))
    mine = slices[rank]
    mine.copy_(_gather_and_sum(exchange, rank, size, mine, slices, what))
    others = [peer for peer in range(size) if peer != rank]
    exchange([(p, mine) for p in others], [(p, slices[p]) for p in others], what).wait()


SMALL_SUM = 64 * 1024  # bytes that a member sends at once to sum by one exchange


def _gather_and_sum(
    exchange: Callable[[Sequence[Message], Sequence[Message], str], Pending],
    rank: int, size: int, mine: torch.Tensor, gives: Sequence[torch.Tensor], what: str,
) -> torch.Tensor:  # fmt: skip
    """Send ``gives[peer]`` to each peer and sum what they send for my slice ``mine``."""
    others = [peer for peer in range(size) if peer != rank]
    parts = {peer: torch.empty_like(mine) for peer in others}
    exchange([(p, gives[p]) for p in others], list(parts.items()), what).wait()
    parts[rank] = mine
    wide = mine.dtype in (torch.float16, torch.bfloat16)
    total = parts[0].to(torch.float32) if wide else parts[0].clone()
    for peer in range(1, size):
        total += parts[peer]
    return total
