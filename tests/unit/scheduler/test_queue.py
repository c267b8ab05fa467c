"""The queue against a sorted list."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_cp.sampling_params import SamplingParams
from ds_cp.scheduler.queue import WaitingQueue
from ds_cp.scheduler.request import Request


def request(number: int, priority: int = 0) -> Request:
    return Request(number, f"r{number}", (1,), SamplingParams(), 1, 0, priority)


def check(queue: WaitingQueue, members: list[Request], gone: list[Request]) -> None:
    want = sorted(members, key=lambda r: (r.priority, r.number))
    assert list(queue) == want and len(queue) == len(want)
    assert queue.first() is (want[0] if want else None)
    assert all(r in queue for r in members) and not any(r in queue for r in gone)


@given(st.lists(st.integers(-2, 2), max_size=12), st.data())
def test_order_is_priority_then_age(priorities: list[int], data: st.DataObject) -> None:
    """Requests leave from any place, and preempted ones come back."""
    queue = WaitingQueue()
    outside = [request(n, priority) for n, priority in enumerate(priorities)]
    inside: list[Request] = []
    check(queue, [], outside)
    for _ in range(data.draw(st.integers(0, 30))):
        if outside and data.draw(st.booleans()):
            inside.append(outside.pop(data.draw(st.integers(0, len(outside) - 1))))
            queue.push(inside[-1])
        elif inside:
            outside.append(inside.pop(data.draw(st.integers(0, len(inside) - 1))))
            queue.remove(outside[-1])
        check(queue, inside, outside)


def test_a_request_that_does_not_wait_cannot_be_removed() -> None:
    queue = WaitingQueue()
    queue.push(request(1))
    with pytest.raises(KeyError):
        queue.remove(request(2))
    assert len(queue) == 1


def test_removed_requests_need_no_room() -> None:
    """Ten thousand come and are aborted, from the back: the queue holds hardly more than what
    waits."""
    queue, rng = WaitingQueue(), random.Random(1)
    staying = [request(n) for n in range(5)]
    for each in staying:
        queue.push(each)
    most = 0
    for n in range(5, 10_005):
        newcomer = request(n, rng.randint(0, 3))
        queue.push(newcomer)
        queue.remove(newcomer)
        most = max(most, len(queue._heap))
    assert most <= 2 * 6 + 17
    check(queue, staying, [])
