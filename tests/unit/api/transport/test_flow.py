"""The deadline of clients that do not read, on a clock of its own."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from ds_cp.api.transport.flow import WRITE_BYTES_PER_S, Flow, WriteDeadline


class Transport:
    """A transport whose buffer a test fills and empties."""

    def __init__(self) -> None:
        self.waiting = 0
        self.reading = True

    def get_write_buffer_size(self) -> int:
        return self.waiting

    def get_extra_info(self, name: str) -> Any:
        class Unknown:
            def fileno(self) -> int:
                return -1

        return Unknown()

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True

    def is_closing(self) -> bool:
        return False


class Clock:
    """A loop's timers, moved by hand."""

    def __init__(self) -> None:
        self.now = 0.0
        self.timers: list[list[Any]] = []

    def time(self) -> float:
        return self.now

    def call_later(self, seconds: float, call: Any, *args: Any) -> Any:
        timer = [self.now + seconds, call, args]
        self.timers.append(timer)

        class Handle:
            def cancel(handle) -> None:  # noqa: N805
                if timer in self.timers:
                    self.timers.remove(timer)

        return Handle()

    def run(self, seconds: float) -> None:
        end = self.now + seconds
        while due := [timer for timer in self.timers if timer[0] <= end]:
            timer = min(due, key=lambda timer: timer[0])
            self.timers.remove(timer)
            self.now = max(self.now, timer[0])
            timer[1](*timer[2])
        self.now = end


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def transport() -> Transport:
    return Transport()


def deadline(clock: Clock, transport: Transport) -> tuple[WriteDeadline, list[int]]:
    late: list[int] = []
    made: Any = WriteDeadline(clock, transport, 10.0, late.append)  # type: ignore[arg-type]
    return made, late


def test_who_takes_nothing_is_late_after_the_deadline(clock: Clock, transport: Transport) -> None:
    writing, late = deadline(clock, transport)
    transport.waiting = 500
    writing.begin()
    clock.run(9.9)
    assert not late
    clock.run(0.2)
    assert late == [500] and not clock.timers


def test_who_takes_at_the_rate_is_never_late(clock: Clock, transport: Transport) -> None:
    writing, late = deadline(clock, transport)
    transport.waiting = 100 * WRITE_BYTES_PER_S
    writing.begin()
    for _ in range(99):
        clock.run(1.0)
        transport.waiting -= WRITE_BYTES_PER_S
    assert not late
    clock.run(12.0)
    assert late


def test_what_was_taken_at_once_is_no_time_for_later(clock: Clock, transport: Transport) -> None:
    """The client's host takes as much as it has room for, whether or not the client reads."""
    writing, late = deadline(clock, transport)
    transport.waiting = 1000 * WRITE_BYTES_PER_S
    writing.begin()
    clock.run(1.0)
    transport.waiting = 10
    clock.run(9.0)
    assert not late
    clock.run(2.5)
    assert late == [10]


def test_pauses_add_up_within_a_request(clock: Clock, transport: Transport) -> None:
    """A stream whose client takes each event late, and one that is renewed by another request."""
    for renewed in (False, True):
        writing, late = deadline(clock, transport)
        for _ in range(4):
            transport.waiting = 10
            writing.begin()
            clock.run(4.0)
            if late:
                break
            transport.waiting = 0
            writing.end()
            clock.run(100.0)  # time without waiting bytes does not count
            if renewed:
                writing.renew()
        assert bool(late) != renewed


def test_the_end_shortens_it(clock: Clock, transport: Transport) -> None:
    for begun_first in (True, False):
        writing, late = deadline(clock, transport)
        transport.waiting = 10
        if begun_first:
            writing.begin()
            clock.run(1.0)
        writing.shorten(2.0)
        writing.renew()
        if not begun_first:
            writing.begin()
        clock.run(1.9)
        assert not late
        clock.run(0.2)
        assert late == [10]


def test_held_reading_is_resumed_by_time_alone() -> None:
    transport: Any = Transport()

    async def run() -> None:
        flow = Flow(transport)
        loop = asyncio.get_running_loop()
        flow.hold(loop, 0.05)
        flow.resume_reading()
        assert not transport.reading
        flow.pause_reading()
        flow.resume_reading()
        assert not transport.reading  # as when the application asks for more of a body
        await asyncio.sleep(0.1)
        assert transport.reading
        flow.hold(loop, 0.05)
        flow.pause_reading()
        await asyncio.sleep(0.1)
        assert not transport.reading  # the pause outlives the hold
        flow.resume_reading()
        assert transport.reading

    asyncio.run(run())
