"""A failure on one rank is reported by its cause, at once, on all.

The rank that fails writes the cause to the store by which the ranks joined, and then closes its
connections. That wakes every peer that waits for it. A peer that loses a connection reads the cause
from the store, closes its own connections, which wakes the ranks that wait for it in turn, and
raises the cause. No collective follows a failure.
"""

from __future__ import annotations

import contextlib
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import msgspec

from ds_cp.comm.world import FAILURE, World
from ds_cp.errors import CommError, DsCpError, RankFailedError

READ = "failure/read"  # prefix of the keys by which ranks say that they have read it
STORE_S = 5.0  # seconds to wait for the store, whose host may be gone
LEAVE_S = 5.0  # seconds to close connections; NCCL may wait for a message that never comes
READ_S = 3.0  # seconds that rank 0, whose process is the store, stays for the others to read
MESSAGE = 800  # characters of a cause, at most
T = TypeVar("T")


class _Cause(msgspec.Struct, array_like=True):
    rank: int
    is_comm: bool  # only the loss of a peer: the cause is not known
    message: str


@contextmanager
def failing(world: World) -> Iterator[None]:
    """Around code whose failure, or another rank's meanwhile, ends the job: it is raised by its
    cause, on every rank. An error that all ranks raise by agreement is raised as it is. Raises at
    once what ended the job before."""
    if world.failure is not None:
        raise world.failure
    try:
        yield
    except BaseException as err:
        if err is world.agreed:
            raise
        cause = fail(world, err)
        if cause is err:
            raise
        raise cause from err


def fail(world: World, err: BaseException) -> BaseException:
    """Give this rank up after ``err``, which is known on all ranks within seconds. Returns the
    error to raise: ``err`` itself if it is the first one of the job and typed (or not an
    ``Exception``, like Ctrl-C), else a ``RankFailedError`` or, where a peer was lost without a
    cause, a ``CommError``, that names the rank, its host and its message.

    The groups of ``world`` are gone afterwards. A second call returns what the first one found.
    """
    if world.failure is not None:
        return world.failure if isinstance(err, Exception) else err
    mine = _Cause(world.rank, isinstance(err, CommError), _message(err))
    # Whoever told this rank to leave knows why; the store may be on the rank that stands still.
    told = world.abandoned
    first = mine if told else _within(STORE_S, lambda: _publish(world, mine)) or mine
    _drop_locals(err)
    _within(LEAVE_S, world.leave)
    if not told:
        _stay_until_read(world, first)
    found: BaseException = err
    if first.rank != world.rank or not isinstance(err, DsCpError):
        host = world.topology.hosts[first.rank]
        kind = CommError if first.is_comm else RankFailedError
        found = kind(f"rank {first.rank} on {host}: {first.message}")
    world.failure = found
    return found if isinstance(err, Exception) else err


def _message(err: BaseException) -> str:
    text = (str(err).splitlines() or [""])[0][:MESSAGE]
    if isinstance(err, DsCpError):
        return text
    return f"{type(err).__name__}: {text}" if text else type(err).__name__


def _publish(world: World, mine: _Cause) -> _Cause:
    """Write my cause, unless another rank was first; the first one."""
    if world.size == 1 or world.store is None:
        return mine
    text = msgspec.json.encode(mine).decode()
    return msgspec.json.decode(world.store.compare_set(FAILURE, "", text), type=_Cause)


def _stay_until_read(world: World, first: _Cause) -> None:
    if world.rank != 0:
        _within(STORE_S, lambda: world.store.set(f"{READ}/{world.rank}", ""))
    elif not first.is_comm:
        _within(READ_S, lambda: _wait_for_readers(world))


def _wait_for_readers(world: World) -> None:
    if len(world.members) > 1 and world.store is not None:
        keys = [f"{READ}/{rank}" for rank in world.members if rank]
        world.store.wait(keys, timedelta(seconds=READ_S))


def _within(seconds: float, work: Callable[[], T]) -> T | None:
    """The result of ``work``; None when it fails or takes longer (it is then left behind)."""
    found: list[T] = []

    def run() -> None:
        with contextlib.suppress(Exception):
            found.append(work())

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return found[0] if found else None


def _drop_locals(err: BaseException | None) -> None:
    """Clear the local variables that the traceback keeps: a message on its way among them would
    keep gloo's connections open."""
    while err is not None:
        traceback.clear_frames(err.__traceback__)
        err = err.__cause__ or err.__context__
