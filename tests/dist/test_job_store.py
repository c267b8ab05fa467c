"""Ranks join by our own store, on a port that wants the job's secret."""

from __future__ import annotations

import os
import socket
import threading
import time
from dataclasses import replace
from datetime import timedelta
from typing import Any

import msgspec
import pytest
import torch

from ds_cp.comm.job_store import open_job_store
from ds_cp.comm.wire import Rendezvous, World, join
from ds_cp.errors import CommError, LaunchError
from ds_cp.link.knock import Port
from ds_cp.link.seal import Claim
from tests.helpers.ranks import run_ranks

SECRET = b"0123456789abcdef"


def port_of(rank: int, size: int, number: int, secret: bytes = SECRET) -> Port:
    claim = Claim("store", rank, size, "localhost", os.getpid(), "1.0", "mark")
    return Port("127.0.0.1", number, secret, claim, 60.0)


def meets(world: World, shared_memory: bool) -> list[float]:
    """Twice, under two generations."""
    rank, size = world.rank, world.size
    sock = socket.create_server(("127.0.0.1", 0)) if rank == 0 else None
    if sock is not None:
        world.store.set("number", str(sock.getsockname()[1]))
    number = int(world.store.get("number"))
    listen_fd = None if sock is None else sock.fileno()
    left: World | None = None
    sums = []
    for generation in range(2):
        (left or world).leave()
        left = join(
            rank, size,
            Rendezvous("nowhere", number, listen_fd, generation, port_of(rank, size, number)),
            host="localhost", hosts=None, device=torch.device("cpu"), timeout_s=60,
            shared_memory=shared_memory, left=left,
        )  # fmt: skip
        total = torch.full((4,), float(rank))
        left.everybody.all_reduce(total, "test_sum")
        left.group("pairs", [[0, 1], [2]]).all_reduce(total, "test_pair")
        sums.append(float(total[0]))
    left.store.set(f"read/{rank}", "")
    left.store.wait([f"read/{r}" for r in range(size)])
    left.leave()
    return sums


@pytest.mark.parametrize("shared_memory", [True, False])
def test_ranks_meet_by_our_own_store(shared_memory: bool) -> None:
    found = run_ranks(meets, 3, shared_memory, shared_memory=shared_memory)
    assert found == [[6.0, 6.0], [6.0, 6.0], [3.0, 3.0]]


@pytest.fixture
def stores() -> Any:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        number = sock.getsockname()[1]
        first = open_job_store(port_of(0, 2, number), sock.fileno(), 60.0, 60.0)
        other = open_job_store(port_of(1, 2, number), None, 60.0, 60.0)
        yield first, other, number
        other.close()
        first.close()


def test_it_does_what_torchs_do(stores: Any) -> None:
    first, other, _ = stores
    first.set("a", "1")
    other.multi_set(["b", "c"], [b"2", "3"])
    assert other.get("a") == b"1" and first.multi_get(["c", "b"]) == [b"3", b"2"]
    assert first.add("n", 2) == 2 and other.add("n", -5) == -3
    other.append("a", "x")
    assert first.get("a") == b"1x"
    assert first.compare_set("w", "", "mine") == b"mine" == other.compare_set("w", "", "yours")
    assert first.num_keys() == 5 and first.delete_key("w") and not other.check(["a", "w"])
    with pytest.raises(RuntimeError, match="did not come within 0.05 s"):
        other.wait(["never"], timedelta(seconds=0.05))
    other.multi_set(["gen1/a", "gen1/b", "gen11/a"], ["1", "2", "3"])
    assert first.forget("gen1/") == 2 and first.check(["gen11/a"]) and not first.check(["gen1/a"])
    copy = other.clone()
    assert copy.get("a") == b"1x"
    copy.close()


def test_a_thread_that_waits_keeps_no_other_out(stores: Any) -> None:
    first, _, _ = stores
    found: list[bytes] = []
    waiter = threading.Thread(target=lambda: found.append(first.get("late")))
    waiter.start()
    first.set("early", "1")
    first.set("late", "2")
    waiter.join(60)
    assert found == [b"2"]


def test_a_wait_is_given_up(stores: Any) -> None:
    first, _, _ = stores
    first.given_up = lambda: True
    with pytest.raises(RuntimeError, match="not waited for any more"):
        first.wait(["never"])


def meets_in_vain(world: World) -> float:
    """Rank 1 says hello and does not make its groups: rank 0 waits inside torch."""
    rank = world.rank
    sock = socket.create_server(("127.0.0.1", 0)) if rank == 0 else None
    if sock is not None:
        world.store.set("number", str(sock.getsockname()[1]))
    number = int(world.store.get("number"))
    port = port_of(rank, 2, number)
    world.leave()
    if rank == 1:
        store = open_job_store(port, None, 60.0, 60.0)
        store.set("ds_cp/gen0/hello/1", store.get("ds_cp/gen0/hello/0"))
        with pytest.raises(RuntimeError):  # it goes with rank 0
            store.get("never")
        return 0.0
    assert sock is not None
    began = time.monotonic()
    with pytest.raises(CommError, match="could not join the others"):
        join(
            0, 2, Rendezvous("nowhere", number, sock.fileno(), 0, port), host="localhost",
            hosts=None, device=torch.device("cpu"), timeout_s=600,
            given_up=lambda: time.monotonic() - began > 3.0,
        )  # fmt: skip
    return time.monotonic() - began


def test_a_meeting_is_given_up_inside_torch() -> None:
    """So a worker whose peer dies while groups are made keeps its model and KV."""
    assert 3.0 < run_ranks(meets_in_vain, 2)[0] < 100


def test_a_store_that_is_gone(stores: Any) -> None:
    first, other, _ = stores
    first.close()
    with pytest.raises(RuntimeError, match="is gone"):
        other.get("a")


def test_who_does_not_know_the_secret_gets_no_store(stores: Any) -> None:
    _, _, number = stores
    with pytest.raises(LaunchError, match="does not share the job's secret"):
        open_job_store(port_of(1, 2, number, b"f" * 16), None, 60.0, 60.0)


def test_rank_0_learns_of_who_does_not_fit(stores: Any) -> None:
    first, _, number = stores
    port = port_of(1, 2, number)
    odd = replace(port, claim=msgspec.structs.replace(port.claim, mark="other"))
    with pytest.raises(LaunchError, match="was started with another config than rank 0"):
        open_job_store(odd, None, 60.0, 60.0)
    assert "rank 1 on localhost cannot join: " in first.misfit
