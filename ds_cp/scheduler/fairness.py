"""Fair shares between clients: whose request is next, and what a step has for each. No torch.

With one client nothing of it changes any order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from heapq import nlargest

KEPT = 1024  # clients that are remembered: those that asked for most
ANSWER = 256  # tokens of an answer that count at most: max_tokens is a bound, few answers reach it


class Turns:
    """Start-time fair queueing (Goyal, Vin and Cheng, SIGCOMM 1996). A request's *turn* is where
    its client's last one ends, in tokens, but not before what is served now; of one priority the
    earlier turn goes first. So a client that asks for much waits behind its own requests, and one
    that asks for little goes next."""

    def __init__(self) -> None:
        self._now = 0
        self._ends: dict[str, int] = {}

    def take(self, client: str, tokens: int, idle: bool) -> int:
        """The turn of a new request of ``tokens`` tokens. ``idle``: no other runs or waits, and
        nobody owes anything any more."""
        if idle:
            self._now = max([self._now, *self._ends.values()])
            self._ends.clear()
        turn = self.next(client)
        self._ends[client] = turn + tokens
        if len(self._ends) > 2 * KEPT:
            most = nlargest(KEPT, self._ends.items(), key=lambda item: item[1])
            self._ends = {client: end for client, end in most if end > self._now}
        return turn

    def next(self, client: str) -> int:
        """The turn that a new request of ``client`` would get."""
        return max(self._now, self._ends.get(client, 0))

    def serve(self, turn: int) -> None:
        """The prompt of the request with this turn was computed."""
        self._now = max(self._now, turn)

    def __len__(self) -> int:
        return len(self._ends)


class Shares:
    """What is left of one step's work on prompts for each client, per rank: equal parts of
    ``rooms[rank]``, of which what a client does not want goes to the others (max-min fairness).
    ``wants[client][rank]``: in the unit of the rooms. Clients that are not in it have no bound
    here."""

    def __init__(self, rooms: Sequence[float], wants: Mapping[str, Sequence[float]]) -> None:
        self._left = {client: [0.0] * len(rooms) for client in wants}
        self._fresh = set(wants)  # clients that got nothing yet
        for rank, room in enumerate(rooms):
            by_want = sorted(wants, key=lambda client: wants[client][rank])
            for number, client in enumerate(by_want):
                part = min(wants[client][rank], room / (len(by_want) - number))
                self._left[client][rank] = part
                room -= part

    def most(self, client: str, ranks: Sequence[int]) -> float:
        """What a request of ``client`` may take of each of ``ranks``."""
        left = self._left.get(client)
        return float("inf") if left is None else max(0.0, min(left[rank] for rank in ranks))

    def is_fresh(self, client: str) -> bool:
        """Whether it got nothing in this step so far."""
        return client in self._fresh

    def spend(self, client: str, rank: int, amount: float) -> None:
        """``client`` took so much of ``rank``."""
        if client in self._left and amount:
            self._left[client][rank] -= amount
            self._fresh.discard(client)
