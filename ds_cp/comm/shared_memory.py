"""Ranks of one host exchange through memory that they share, and that nobody else can open.

The memory is a file without a name (memfd): no folder holds it, and it is gone with the processes.
The first member of a group makes it, fixes its size, so that no member can make another crash by
cutting it short, and the others open it as /proc/PID/fd/N, which the kernel allows to the same user
only. When all have it, it is closed: from then on only these processes have it.

Where one of them cannot, all ranks of that host agree, through the store, not to use it.
"""

from __future__ import annotations

import fcntl
import os
import stat
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ds_cp.comm import channel as ch
from ds_cp.comm.channel import Channel, ChannelError, Messages, Shape
from ds_cp.comm.pending import Pending, gone_peer, silent_peer
from ds_cp.comm.transport import Message, sum_in_order
from ds_cp.errors import CommError
from ds_cp.native import Library, load

# Bytes from each member to each other, by the number of members; claimed as they are touched. Large
# ones let a sender go on before its peer reads.
RING_BYTES = {4: 8 * 2**20, 8: 4 * 2**20, ch.MAX_MEMBERS: 2**20}
# The most that a wait looks before it sleeps: where every thread of the ranks has a core, as long
# as a rank may compute between two exchanges; where every rank has one, a moment; else nothing.
LOOK_S, SHORT_LOOK_S = 2e-3, 50e-6
NAME = "ds_cp"  # of the memory, in /proc/PID/maps
_NOEXEC = 0x8  # MFD_NOEXEC_SEAL, which Python does not know yet
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


@dataclass(frozen=True)
class Process:
    """One rank's process: ``host`` and ``namespace`` are alike where it can be reached by pid."""

    pid: int
    namespace: str
    host: str


class UnavailableError(Exception):
    """Why memory cannot be shared, in a few words."""


class SharedMemory:
    """Carries the messages of members on one host. CPU tensors only; see ``Transport``.

    ``seats``: index in the channel of every member of the group that is in it.
    """

    def __init__(
        self, channel: Channel, members: Sequence[int], ranks: Sequence[int], me: int,
        timeout_s: float,
    ) -> None:  # fmt: skip
        """``members``: group indices that the channel joins, in its order; ``ranks``: their world
        ranks; ``me``: this one's group index."""
        self._channel = channel
        self._seats = {member: seat for seat, member in enumerate(members)}
        self._all = list(members) == list(range(len(members)))  # its seats are the group's indices
        self._ranks = tuple(ranks)
        self._me = me
        self._timeout_s = timeout_s

    def exchange(self, sends: Sequence[Message], recvs: Sequence[Message], what: str) -> Pending:
        """Start to send each tensor and to receive into each buffer."""
        return self.prepare(sends, recvs, what)()

    def prepare(
        self, sends: Sequence[Message], recvs: Sequence[Message], what: str
    ) -> Callable[[], Pending]:
        """What starts such an exchange each time it is called."""
        if not self._all:
            sends, recvs = self._seated(sends), self._seated(recvs)
        return self._between_seats(sends, recvs, what)

    def _between_seats(
        self, sends: Sequence[Message], recvs: Sequence[Message], what: str
    ) -> Callable[[], Pending]:
        messages = Messages.of(sends, recvs)
        most = max((tensor.nbytes for _, tensor in sends), default=0)
        long = most > self._channel.ring_bytes  # else ``start`` hands over all that it is given

        def start() -> Pending:
            began = time.monotonic()
            try:
                number = self._channel.start(messages)
            except ChannelError as err:
                raise self._comm_error(what, began, err) from None
            if not number:
                return Pending(None, what)
            finish = partial(self._finish, number, what, began)
            return Pending(finish, what, partial(self._hurry, finish) if long else None)

        return start

    def _hurry(self, finish: Callable[[], None]) -> bool:
        """As ``Pending`` wants it."""
        waits = self.unsent()
        if waits:
            finish()
        return waits

    def _seated(self, messages: Sequence[Message]) -> list[Message]:
        return [(self._seats[peer], tensor) for peer, tensor in messages]

    def _finish(self, number: int, what: str, began: float) -> None:
        try:
            while not self._channel.wait(number, began + self._timeout_s - time.monotonic()):
                pass  # a signal may have come, and Python has looked at it
        except ChannelError as err:
            raise self._comm_error(what, began, err) from None

    def unsent(self) -> bool:
        """Move what can be moved; whether messages still wait to be sent."""
        try:
            return self._channel.pump() > 0
        except ChannelError:
            return False  # who waits for the peer will say so

    def all_reduce(self, tensor: torch.Tensor, what: str) -> None:
        """Sum in the members' order."""

        def exchange(s: Sequence[Message], r: Sequence[Message], what: str) -> Pending:
            return self._between_seats(s, r, what)()

        sum_in_order(exchange, self._seats[self._me], len(self._seats), tensor, what)

    def broadcast(self, tensor: torch.Tensor, what: str) -> None:
        """From member 0 to each of the others."""
        if self._me == 0:
            others = [peer for peer in self._seats if peer != 0]
            self.exchange([(peer, tensor) for peer in others], [], what).wait()
        else:
            self.exchange([], [(0, tensor)], what).wait()

    def lost(self) -> int | None:
        """The world rank of a member that has ended or left, else None."""
        try:
            seat = self._channel.lost()
        except ChannelError:
            return None
        return None if seat is None else self._ranks[seat]

    def close(self) -> None:
        """Leave: every member that waits for this one wakes."""
        self._channel.close()

    def _comm_error(self, what: str, began: float, err: ChannelError) -> CommError:
        who = f"rank {self._ranks[err.peer]}" if 0 <= err.peer < len(self._ranks) else "this rank"
        if err.reason == ch.SILENT:
            return silent_peer(what, self._timeout_s, who)
        cause = {
            ch.GONE: "its process has ended",
            ch.CLOSED: "it has left",
            ch.DIFFERENT: f"it sent {err.found} bytes where {err.expected} were expected",
            ch.SHUT: "it has left",
        }.get(err.reason, "the memory between it and this rank is damaged")
        return gone_peer(what, began, f"{who}: {cause}")


def longest_look(ranks: int, threads: int, cores: int) -> float:
    """Seconds that a wait may look before it sleeps, with so many ranks of so many threads on a
    host of so many cores."""
    if ranks * threads <= cores:
        return LOOK_S
    return SHORT_LOOK_S if ranks <= cores else 0.0


class Neighbours:
    """Makes channels with the ranks of this host.

    ``ranks``: world ranks of this host; ``processes``: of these, by rank; ``store``: what the ranks
    share (``set``, ``get``); ``cores``: that these ranks may use; ``threads``: of each rank.
    """

    def __init__(
        self, rank: int, ranks: Sequence[int], processes: Mapping[int, Process], store: Any,
        timeout_s: float, cores: int, threads: int,
        find: Callable[[], Library | str] = load,
    ) -> None:  # fmt: skip
        self._rank = rank
        self._ranks = tuple(ranks)
        self._processes = processes
        self._store = store
        self._timeout_s = timeout_s
        self._look_s = longest_look(len(ranks), threads, cores)
        self._find = find
        self._pidfds: dict[int, int] = {}

    def join(self, key: str, group: Sequence[int], members: Sequence[int]) -> SharedMemory | str:
        """A channel between the ``members`` (group indices, at least two, this rank among them) of
        a group of world ranks ``group``; or why there is none, the same words on each of them.

        All members call it, with the same ``key``, which is used once. Raises what the store
        raises when a member does not come.
        """
        ranks = [group[member] for member in members]
        key = f"{key}/{ranks[0]}"
        seat = ranks.index(self._rank)
        fd = -1
        channel: Channel | None = None
        reason = ""
        try:
            if seat == 0:
                channel, fd = self._make(key, ranks)
            else:
                channel = self._enter(key, ranks, seat)
        except UnavailableError as err:
            reason = str(err)
            if seat == 0:
                self._store.set(key, f"- {reason}")
        self._store.set(f"{key}/{seat}", reason)
        said = [self._store.get(f"{key}/{other}").decode() for other in range(len(ranks))]
        if fd >= 0:
            os.close(fd)  # each of them has it, or none will
        why = next((f"rank {ranks[i]}: {text}" for i, text in enumerate(said) if text), "")
        if channel is not None and not why:
            me = members[seat]
            return SharedMemory(channel, members, ranks, me, self._timeout_s)
        if channel is not None:
            channel.close()
        return why

    def close(self) -> None:
        """Give up what tells whether the neighbours live; channels are closed before."""
        for pidfd in self._pidfds.values():
            os.close(pidfd)
        self._pidfds.clear()

    def _make(self, key: str, ranks: Sequence[int]) -> tuple[Channel, int]:
        library, shape, pidfds = self._look(ranks)
        token = os.urandom(ch.TOKEN)
        with _refusing("the memory cannot be made"):
            fd = private_memory(shape.nbytes(library))
            try:
                channel = Channel(library, fd, shape, 0, token, pidfds, self._look_s, make=True)
            except BaseException:
                os.close(fd)
                raise
        self._store.set(key, f"{os.getpid()} {fd} {token.hex()}")
        return channel, fd

    def _enter(self, key: str, ranks: Sequence[int], seat: int) -> Channel:
        where, _, rest = self._store.get(key).decode().partition(" ")
        library, shape, pidfds = self._look(ranks)
        if where == "-":
            raise UnavailableError(rest)
        number, token = rest.split(" ")
        with _refusing(f"the memory of rank {ranks[0]} cannot be opened"):
            fd = open_memory(f"/proc/{int(where)}/fd/{int(number)}", shape.nbytes(library))
            try:
                return Channel(
                    library, fd, shape, seat, bytes.fromhex(token), pidfds, self._look_s, make=False
                )
            finally:
                os.close(fd)

    def _look(self, ranks: Sequence[int]) -> tuple[Library, Shape, list[int]]:
        """What every seat needs before there is a channel. Raises ``UnavailableError``."""
        library = self._find()
        if isinstance(library, str):
            raise UnavailableError(library)
        if len(ranks) > ch.MAX_MEMBERS:
            raise UnavailableError(f"{len(ranks)} ranks are more than {ch.MAX_MEMBERS}")
        mine = self._processes[self._rank]
        for rank in ranks:
            other = self._processes[rank]
            if other.host != mine.host:
                raise UnavailableError(f"rank {rank} runs under another kernel or network")
            if other.namespace != mine.namespace:
                raise UnavailableError(f"rank {rank} is in another pid namespace")
        ring_bytes = next(size for most, size in RING_BYTES.items() if len(ranks) <= most)
        shape = Shape(len(ranks), ring_bytes)
        return library, shape, [self._life(rank) for rank in ranks]

    def _life(self, rank: int) -> int:
        """A pidfd of a neighbour, which tells when its process has ended; -1 for this rank."""
        if rank == self._rank:
            return -1
        if rank not in self._pidfds:
            with _refusing(f"the process of rank {rank} cannot be watched"):
                self._pidfds[rank] = os.pidfd_open(self._processes[rank].pid)
        return self._pidfds[rank]


@contextmanager
def _refusing(what: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, AttributeError) as err:
        words = err.strerror if isinstance(err, OSError) and err.strerror else str(err)
        raise UnavailableError(f"{what} ({words})") from None


def private_memory(nbytes: int) -> int:
    """A descriptor of new zeroed memory, of that size for good, for this user alone."""
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        fd = os.memfd_create(NAME, flags | _NOEXEC)
    except OSError:  # kernels before 6.3
        fd = os.memfd_create(NAME, flags)
    try:
        os.fchmod(fd, 0o600)
        os.ftruncate(fd, nbytes)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except BaseException:
        os.close(fd)
        raise
    return fd


def open_memory(path: str, nbytes: int) -> int:
    """A descriptor of another process's memory, once it is seen to be such a one: this user's, of
    that size, and that for good. Raises ``OSError``, ``ValueError``."""
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode) or found.st_size != nbytes:
            raise ValueError(f"it is not {nbytes} bytes of memory")
        if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077:
            raise ValueError("it is not this user's alone")
        if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS != _SEALS:
            raise ValueError("its size is not fixed")
    except BaseException:
        os.close(fd)
        raise
    return fd
