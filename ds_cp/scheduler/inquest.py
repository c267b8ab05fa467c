"""Which request ends the workers that compute it. No torch."""

from __future__ import annotations

from collections.abc import Iterable

from ds_cp.scheduler.recovery import Flight

SUSPECT, GUILTY = 2, 3  # interruptions in a row


class Inquest:
    """Finds the request whose steps end workers.

    Whoever was in flight in ``SUSPECT`` interruptions in a row, with no step done between them, is
    suspect. Suspects run one at a time, before anyone else does. Who gets through a step is free;
    who is alone in the last of ``GUILTY`` interruptions is at fault. Workers that are ended by
    somebody else, one by one and faster than a step is done, look the same.
    """

    def __init__(self) -> None:
        self.suspects: set[int] = set()
        self._times: dict[int, int] = {}  # interruptions in a row, of requests in flight in each

    def interrupted(self, flights: Iterable[Flight]) -> int | None:
        """The request that is at fault, if that is known now."""
        requests = {number for flight in flights for number in flight.requests}
        times = {number: self._times.get(number, 0) + 1 for number in requests}
        kept = {n: t for n, t in self._times.items() if n in self.suspects and n not in times}
        self._times = times | kept
        self.suspects |= {number for number, count in times.items() if count >= SUSPECT}
        if len(requests) == 1 and max(times.values()) >= GUILTY:
            self.suspects -= requests
            return requests.pop()
        return None

    def done(self, flight: Flight) -> None:
        """A step has ended."""
        self.suspects.difference_update(flight.requests)
        self._times = {number: self._times[number] for number in self.suspects}
