"""A device that waits for a dead peer never ends: the wait for it does. Emulated by a clock."""

from __future__ import annotations

import pytest
import torch

from ds_cp.comm.device import PEERS_S, wait_until
from ds_cp.comm.world import FAILURE, World
from ds_cp.errors import CommError
from ds_cp.topology.hosts import Topology


class Clock:
    """Time passes in sleeps, and a little in each look."""

    def __init__(self) -> None:
        self.at = 100.0
        self.sleeps: list[float] = []

    def now(self) -> float:
        self.at += 1e-5
        return self.at

    def sleep(self, seconds: float) -> None:
        self.sleeps.append(seconds)
        self.at += seconds


class Mark:
    """A place in the queue that the device comes to at a time, or never."""

    def __init__(self, clock: Clock, after: float | None) -> None:
        self._clock = clock
        self._at = None if after is None else clock.at + after

    def query(self) -> bool:
        return self._at is not None and self._clock.at >= self._at


def wait(after: float | None, timeout_s: float, lost: str = "", since: float = 0.0) -> Clock:
    clock = Clock()
    gone = clock.at + since
    wait_until(
        Mark(clock, after), timeout_s, lambda: lost if clock.at >= gone else "",
        now=clock.now, sleep=clock.sleep,
    )  # fmt: skip
    return clock


def test_a_device_that_ends_is_waited_for() -> None:
    assert wait(0.0, 5.0).sleeps == []
    assert wait(0.0004, 5.0).sleeps == []  # a short wait takes no sleep
    long = wait(3.0, 5.0)
    assert 103.0 <= long.at < 103.01 and max(long.sleeps) <= 1e-3


def test_a_device_that_does_not_end_is_an_error_at_the_limit() -> None:
    clock = Clock()
    with pytest.raises(CommError) as caught:
        wait_until(Mark(clock, None), 7.0, lambda: "", "step 3", clock.now, clock.sleep)
    assert 107.0 <= clock.at < 107.01
    assert str(caught.value).startswith("step 3: a peer was silent for 7 s")
    assert "comm.timeout_s" in str(caught.value)


def test_a_peer_that_is_known_to_be_gone_ends_the_wait_at_once() -> None:
    with pytest.raises(CommError, match=r"a peer is gone.*\(rank 3 has ended\)"):
        wait(None, 300.0, "rank 3 has ended", since=1.0)
    assert wait(PEERS_S / 2, 300.0, "rank 3 has ended").at < 100.0 + PEERS_S  # it had ended


def test_the_world_asks_the_store_and_its_neighbours() -> None:
    class Store:
        keys: list[str] = []

        def check(self, keys: list[str]) -> bool:
            return set(keys) <= set(self.keys)

    class Near:
        def lost(self) -> int | None:
            return 2

    store = Store()
    world = World(0, Topology(("a",)), torch.device("cpu"), 5.0, joined=False, store=store)
    assert world._lost() == ""
    world._near.append(Near())  # type: ignore[arg-type]
    assert world._lost() == "rank 2 has ended"
    store.keys = [FAILURE]
    assert world._lost() == "a rank has failed"
    world.wait_for_device()  # nothing is queued on a CPU
