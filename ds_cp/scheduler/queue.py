"""Requests that wait: by priority, then by their clients' turns, then by age."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from heapq import heapify, heappop, heappush, nsmallest
from itertools import count

from ds_cp.scheduler.backlog import Backlog, Load
from ds_cp.scheduler.request import Request


class WaitingQueue:
    """A heap in ``Request.order``; a request that left early is dropped when it comes up.
    ``load_of``: what a request wants, for ``before``."""

    def __init__(self, load_of: Callable[[Request], Load] = lambda request: Load()) -> None:
        self._load_of = load_of
        self._heap: list[tuple[tuple[int, int, int], int, Request]] = []
        self._pushes = count()  # so that requests themselves are never compared
        self._members: dict[int, Request] = {}
        self._backlog = Backlog()
        self._clients = Counter[str]()

    def push(self, request: Request) -> None:
        """Add a request; a preempted one returns to the place that its age gives it."""
        assert request.number not in self._members
        self._members[request.number] = request
        heappush(self._heap, (request.order, next(self._pushes), request))
        self._backlog.add(request.order, self._load_of(request))
        self._clients[request.client] += 1

    def first(self) -> Request | None:
        """The next to start, or None."""
        while self._heap and self._heap[0][2].number not in self._members:
            heappop(self._heap)
        return self._heap[0][2] if self._heap else None

    def peek(self, count: int) -> list[Request]:
        """The next ``count`` to start, or all that there are."""
        return nsmallest(count, self._members.values(), key=lambda request: request.order)

    def before(self, priority: float, turn: float) -> Load:
        """What those want that start before a new request of this priority and turn."""
        return self._backlog.before((priority, turn, float("inf")))

    def of_client(self, client: str) -> int:
        """Requests of one client."""
        return self._clients[client]

    @property
    def num_clients(self) -> int:
        """Clients that have requests here."""
        return len(self._clients)

    def remove(self, request: Request) -> None:
        """Remove a request. KeyError when it does not wait."""
        del self._members[request.number]
        self._backlog.remove(request.order)
        self._clients[request.client] -= 1
        if not self._clients[request.client]:
            del self._clients[request.client]
        if len(self._heap) > 2 * len(self._members) + 16:
            self._heap = [(r.order, next(self._pushes), r) for r in self._members.values()]
            heapify(self._heap)

    def __len__(self) -> int:
        return len(self._members)

    def __iter__(self) -> Iterator[Request]:
        return iter(sorted(self._members.values(), key=lambda request: request.order))

    def __contains__(self, request: Request) -> bool:
        return request.number in self._members
