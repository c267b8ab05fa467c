"""Requests that wait: by priority, then by their clients' turns, then by age."""

from __future__ import annotations

from collections.abc import Iterator
from heapq import heapify, heappop, heappush, nsmallest
from itertools import count

from ds_cp.scheduler.request import Request


class WaitingQueue:
    """A heap in ``Request.order``; a request that left early is dropped when it comes up."""

    def __init__(self) -> None:
        self._heap: list[tuple[tuple[int, int, int], int, Request]] = []
        self._pushes = count()  # so that requests themselves are never compared
        self._members: dict[int, Request] = {}

    def push(self, request: Request) -> None:
        """Add a request; a preempted one returns to the place that its age gives it."""
        self._members[request.number] = request
        heappush(self._heap, (request.order, next(self._pushes), request))

    def first(self) -> Request | None:
        """The next to start, or None."""
        while self._heap and self._heap[0][2].number not in self._members:
            heappop(self._heap)
        return self._heap[0][2] if self._heap else None

    def peek(self, count: int) -> list[Request]:
        """The next ``count`` to start, or all that there are."""
        return nsmallest(count, self._members.values(), key=lambda request: request.order)

    def remove(self, request: Request) -> None:
        """Remove a request. KeyError when it does not wait."""
        del self._members[request.number]
        if len(self._heap) > 2 * len(self._members) + 16:
            self._heap = [(r.order, next(self._pushes), r) for r in self._members.values()]
            heapify(self._heap)

    def __len__(self) -> int:
        return len(self._members)

    def __iter__(self) -> Iterator[Request]:
        return iter(sorted(self._members.values(), key=lambda request: request.order))

    def __contains__(self, request: Request) -> bool:
        return request.number in self._members
