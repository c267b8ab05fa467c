"""Which request ends the workers that compute it. No torch."""

from __future__ import annotations

from collections.abc import Container, Iterable

from ds_cp.scheduler.recovery import Flight

ALONE = 2  # interruptions in which a request was alone in flight: it is at fault
SUSPECT, GUILTY = 2, 3  # interruptions in company, and with one more in which it was alone


class Inquest:
    """Finds the request whose steps end workers.

    With no step of its own done between them: who is alone in flight in ``ALONE`` interruptions is
    at fault. In company nobody can tell whose step it was: whoever was in flight in ``SUSPECT`` of
    them is suspect, and suspects run one at a time, before anyone else does. Who gets through a
    step is free; who is alone in flight in the last of ``GUILTY`` interruptions is at fault.
    Workers that are ended by somebody else, faster than a step is done, look the same.
    """

    def __init__(self) -> None:
        self.suspects: set[int] = set()
        # Interruptions since its last step, of each request: all, and those in which it was alone.
        self._times: dict[int, int] = {}
        self._alone: dict[int, int] = {}

    def interrupted(self, flights: Iterable[Flight], alive: Container[int]) -> int | None:
        """The request that is at fault, if that is known now. ``alive``: those that have not
        ended."""
        requests = {number for flight in flights for number in flight.requests}
        for number in requests:
            self._times[number] = self._times.get(number, 0) + 1
        self._times = {n: times for n, times in self._times.items() if n in alive}
        self.suspects = {n for n, times in self._times.items() if times >= SUSPECT}
        if len(requests) == 1:
            (number,) = requests
            self._alone[number] = self._alone.get(number, 0) + 1
            self._alone = {n: times for n, times in self._alone.items() if n in self._times}
            guilty = self._alone.get(number, 0) >= ALONE or self._times.get(number, 0) >= GUILTY
            if guilty and number in self._times:
                self.suspects.discard(number)
                return number
        return None

    def done(self, flight: Flight) -> None:
        """A step has ended."""
        if self._times:
            self.suspects.difference_update(flight.requests)
            for number in flight.requests:
                self._times.pop(number, None)
                self._alone.pop(number, None)
