"""Ranks leave their groups and meet again in the same processes, under the next generation."""

from __future__ import annotations

import contextlib
import os
import socket
import threading

import pytest
import torch

from ds_cp.comm.failure import failing
from ds_cp.comm.wire import Rendezvous, World, join
from ds_cp.errors import CommError
from tests.helpers.ranks import run_ranks

GENERATIONS = 3
NEW = 2  # the rank that is another process from generation 2 on, as far as the others know


def again(world: World, generation: int, shared_memory: bool) -> World:
    raw = world.raw_store
    born = 2 if world.rank == NEW and generation >= 2 else 0
    return join(
        world.rank, world.size, Rendezvous(raw.host, raw.port, generation=generation),
        host="localhost", hosts=None, device=torch.device("cpu"), timeout_s=60,
        shared_memory=shared_memory, born=born, left=world,
    )  # fmt: skip


def interrupt(world: World) -> None:
    """A rank leaves while the next one waits for it, and that one is waited for in turn."""
    if world.rank == NEW:
        world.leave()
        return
    with pytest.raises(CommError), failing(world):
        buffer = torch.empty(8)
        world.everybody.exchange([], [((world.rank + 1) % world.size, buffer)], "test").wait()


def meet_and_meet(world: World, shared_memory: bool) -> list[tuple[int, tuple[int, ...], float]]:
    seen = []
    for generation in range(1, GENERATIONS + 1):
        sent = world.ledger["test_sum"].exchanges
        interrupt(world)
        assert world.has_left
        world = again(world, generation, shared_memory)
        pair = world.group("pairs", [[0, 1], [2]])
        total = torch.full((4,), float(world.rank))
        world.everybody.all_reduce(total, "test_sum")
        pair.all_reduce(total, "test_pair")
        assert world.ledger["test_sum"].exchanges == sent + 1, "what was sent before is forgotten"
        seen.append((world.generation, world.born, float(total[0])))
    world.leave()
    return seen


@pytest.mark.parametrize("shared_memory", [True, False])
def test_ranks_meet_again(shared_memory: bool) -> None:
    found = run_ranks(meet_and_meet, 3, shared_memory, shared_memory=shared_memory)
    born = {1: (0, 0, 0), 2: (0, 0, 2), 3: (0, 0, 2)}
    for rank, seen in enumerate(found):
        total = 3.0 if rank == 2 else 6.0
        assert seen == [(g, born[g], total) for g in range(1, GENERATIONS + 1)]


def abandoned(world: World) -> str:
    """Rank 0 waits for rank 1, which waits for nobody: only another thread can end that."""
    world.close_listeners(world.raw_store.port)
    if world.rank == 0:
        timer = threading.Timer(0.3, world.abandon)
        timer.start()
        with pytest.raises(CommError) as found, failing(world):
            world.everybody.exchange([], [(1, torch.empty(8))], "test").wait()
        timer.join()
        world.store.set("abandoned", "")
        world.store.get("read")  # this process is the store
        return str(found.value)
    world.store.get("abandoned")
    world.store.set("read", "")
    world.leave()
    return ""


@pytest.mark.parametrize("shared_memory", [True, False])
def test_a_rank_is_told_to_leave_while_it_waits(shared_memory: bool) -> None:
    """In gloo, whose abort wakes nobody, its connections are cut."""
    said, _ = run_ranks(abandoned, 2, shared_memory=shared_memory)
    assert "this rank: it has left" in said or "Connection closed by peer" in said


def refuses(world: World) -> str:
    """Whoever computes when it is told notices at its next exchange."""
    world.abandon()
    with pytest.raises(CommError) as found:
        world.everybody.all_reduce(torch.zeros(2), "test")
    world.leave()
    return str(found.value)


@pytest.mark.parametrize("shared_memory", [True, False])
def test_what_was_abandoned_refuses(shared_memory: bool) -> None:
    for said in run_ranks(refuses, 2, shared_memory=shared_memory):
        assert "it has left" in said or "told to leave" in said


def waits_in_vain(world: World) -> float:
    """The others do not come, and the meeting is given up."""
    import time

    raw = world.raw_store
    world.leave()
    if world.rank == 1:
        return 0.0
    began = time.monotonic()
    with pytest.raises(CommError, match="could not join the others"):
        join(
            0, 2, Rendezvous(raw.host, raw.port, generation=1), host="localhost", hosts=None,
            device=torch.device("cpu"), timeout_s=600, left=world,
            given_up=lambda: time.monotonic() - began > 1.0,
        )  # fmt: skip
    return time.monotonic() - began


def test_a_meeting_is_given_up() -> None:
    assert 1.0 < run_ranks(waits_in_vain, 2)[0] < 100


def meet_after_a_broken_connection(world: World) -> list[float]:
    """Every connection of rank 0 is shut from outside, those to its own store among them."""
    sums = []
    for generation in (1, 2):
        if world.rank == 0:
            for fd in connected():
                with contextlib.suppress(OSError), socket.socket(fileno=os.dup(fd)) as sock:
                    sock.shutdown(socket.SHUT_RDWR)  # some went with others
        with pytest.raises(CommError), failing(world):
            world.everybody.exchange([], [(1 - world.rank, torch.empty(8))], "test").wait()
        world = again(world, generation, shared_memory=False)
        total = torch.full((4,), 1.0 + world.rank)
        world.everybody.all_reduce(total, "test_sum")
        sums.append(float(total[0]))
    world.leave()
    return sums


def connected() -> list[int]:
    found = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(int(name))) as sock:
            if sock.family in (socket.AF_INET, socket.AF_INET6):
                sock.getpeername()
                found.append(int(name))
    return found


def test_broken_connections_do_not_keep_ranks_apart() -> None:
    assert run_ranks(meet_after_a_broken_connection, 2, shared_memory=False) == [[3.0, 3.0]] * 2
