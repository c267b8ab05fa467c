"""The memory of all requests together: what is admitted, and that nothing stays charged."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from ds_cp.api.answers import trim
from ds_cp.api.answers.budget import (
    MIB,
    Budget,
    Held,
    auto_bytes,
)
from ds_cp.api.errors import RETRY_AFTER, ApiError


def refusal(held: Held, size: int) -> ApiError:
    before = held.size
    with pytest.raises(ApiError) as caught:
        held.reserve(size)
    assert held.size == before
    return caught.value


def test_large_requests_leave_room_for_small_ones() -> None:
    budget = Budget(1024 * MIB)
    first, second = Held(budget), Held(budget)
    first.reserve(700 * MIB)
    error = refusal(second, 100 * MIB)
    assert error.status_code == 503 and error.code == "server_busy"
    assert error.headers == RETRY_AFTER
    assert "need 100.0 MiB" in error.detail and "700.0 of 1024.0 MiB" in error.detail
    small = [Held(budget) for _ in range(400)]
    for number, held in enumerate(small):
        if number < 324:
            held.reserve(MIB)
        else:
            assert refusal(held, MIB).status_code == 503
    for number in range(10):  # a large request in small steps is a large one all the same
        grown = Held(budget)
        small[number].release()
        grown.reserve(MIB)
        assert refusal(grown, MIB).status_code == 503
    first.release()
    second.reserve(100 * MIB)


def test_what_can_never_be_had_is_a_400() -> None:
    budget = Budget(100 * MIB)
    held = Held(budget)
    error = refusal(held, 76 * MIB)
    assert error.status_code == 400 and error.code == "request_too_large"
    assert "76.0 MiB" in error.detail and "75.0 MiB" in error.detail
    held.reserve(75 * MIB)


def test_an_admitted_request_may_outgrow_what_it_reserved() -> None:
    budget = Budget(100 * MIB)
    held = Held(budget)
    held.reserve(10)
    held.spend(4)
    assert (held.spent, held.size, budget.used) == (4, 10, 10)
    held.spend(8)
    assert (held.spent, held.size, budget.used) == (12, 12, 12)
    held.spend(200 * MIB)
    assert budget.used == 200 * MIB + 12
    assert refusal(Held(budget), 1).status_code == 503
    held.release()
    held.release()
    assert budget.used == held.size == 0


def test_what_is_given_back_is_free_and_told() -> None:
    freed: list[int] = []
    budget = Budget(100 * MIB)
    held = Held(budget, freed.append)
    held.take(30)
    held.give_back(20)
    assert (held.spent, held.size, budget.used, freed) == (10, 10, 10, [20])
    held.reserve(50)
    held.spend(90)
    assert (held.size, budget.used) == (100, 100)  # 40 beyond what is reserved
    held.unspend(70)
    assert (held.spent, held.size, budget.used, freed) == (30, 60, 60, [20, 70])
    held.release()
    assert (held.size, budget.used, freed) == (0, 0, [20, 70, 30])


def test_auto_is_a_part_of_the_machine() -> None:
    assert 256 * MIB <= auto_bytes() <= 8192 * MIB


class ClockLoop:
    """What a trimmer asks of an event loop, on a clock of its own."""

    def __init__(self) -> None:
        self.now = 100.0
        self.calls: list[tuple[float, Callable[[], object]]] = []

    def time(self) -> float:
        return self.now

    def call_at(self, when: float, call: Callable[[], object]) -> None:
        self.calls.append((when, call))

    def run_in_executor(self, _: None, call: Callable[[int], object], value: int) -> None:
        call(value)

    def advance(self, seconds: float) -> None:
        self.now += seconds
        due = [call for when, call in self.calls if when <= self.now]
        self.calls = [one for one in self.calls if one[0] > self.now]
        for call in due:
            call()


def test_freed_memory_is_given_back_once_it_is_much(monkeypatch: Any) -> None:
    calls: list[int] = []
    trimmer = trim.Trimmer()
    monkeypatch.setattr(trimmer, "_trim", calls.append)
    loop = ClockLoop()
    monkeypatch.setattr(asyncio, "get_running_loop", lambda: loop)
    for _ in range(3):
        trimmer.released(trim.TRIM_BYTES // 4)
    loop.advance(10.0)
    assert calls == []
    for _ in range(8):
        trimmer.released(trim.TRIM_BYTES)
    loop.advance(0.9 * trim.TRIM_AFTER_S)
    assert calls == []
    loop.advance(0.2 * trim.TRIM_AFTER_S)
    assert calls == [0]
    trimmer.released(trim.TRIM_BYTES)
    loop.advance(0.9 * trim.TRIM_EVERY_S)
    assert calls == [0]  # not so soon again
    loop.advance(0.2 * trim.TRIM_EVERY_S)
    assert calls == [0, 0]
    trimmer.released(trim.TRIM_BYTES - 1)
    loop.advance(10.0)
    assert calls == [0, 0]


# Frees every other one of 40 blocks of 4 MB, after glibc has seen blocks of that size freed; prints
# how many MB of them are still in memory, before and after a trim.
_FREES = """
from ds_cp.api.answers.trim import Trimmer

def resident():
    status = open("/proc/self/status").read()
    return int(status.partition("VmRSS:")[2].split()[0]) // 1024

trimmer = Trimmer()
before = resident()
for _ in range(2):
    blocks = [b"x" * (4 << 20) for _ in range(40)]
    del blocks[::2]
kept = resident() - before
trimmer._trim(0)
print(kept, resident() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc; run it on Linux")
def test_freed_blocks_leave_although_others_stay() -> None:
    said = subprocess.check_output([sys.executable, "-c", _FREES], timeout=60)
    kept, left = map(int, said.split())
    assert 75 <= left <= 100 and left <= kept, (kept, left)


def test_what_moves_is_charged_once_and_outlives_where_it_was() -> None:
    budget = Budget(100 * MIB)
    first = Held(budget)
    first.reserve(10 * MIB)
    first.spend(4 * MIB)
    second = first.moved()
    assert (first.size, second.size, budget.used) == (0, 10 * MIB, 10 * MIB)
    first.release()
    second.spend(8 * MIB)  # of which 2 MiB are more than it had reserved
    assert budget.used == 12 * MIB
    second.release()
    assert budget.used == 0
