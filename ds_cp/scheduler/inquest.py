"""Which request ends the workers that compute it. No torch."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from ds_cp.scheduler.recovery import Flight

SUSPECT = 2  # interruptions in which a request was in flight
ALONE = 2  # in which it was alone, after which it is at fault
ROW = 3  # without a step done between them; who is alone in the last is at fault
PROVEN = 2  # tokens that a request has to come further than it was before it is trusted again


@dataclass
class _Record:
    """``times``: interruptions that a request was in flight in, ``alone`` in so many of them;
    ``reach``: how many of its tokens would have been computed after the last of these."""

    times: int = 0
    alone: int = 0
    reach: int = 0


class Inquest:
    """Finds the request whose steps end workers.

    In company nobody can tell whose step it was: whoever was in flight in ``SUSPECT``
    interruptions, and has not come past the point where it was then, is suspect. Suspects run one
    at a time, before anyone else does. Who comes past that point is free; who is alone in ``ALONE``
    interruptions before it does is at fault, or in the last of ``ROW`` in which nobody got on.
    Workers that are ended by somebody else, faster than a request gets on, look the same.

    ``suspects``: always the same set.
    """

    def __init__(self) -> None:
        self.suspects: set[int] = set()
        self._records: dict[int, _Record] = {}
        self._row = 0  # interruptions since the last step that was done

    def interrupted(self, flights: Iterable[Flight], alive: Collection[int]) -> int | None:
        """The request that is at fault, if that is known now. ``alive``: those that have not
        ended."""
        reached: dict[int, int] = {}
        for flight in flights:
            for number, position in flight.reached:
                reached[number] = max(position, reached.get(number, 0))
        for number, position in reached.items():
            record = self._records.setdefault(number, _Record())
            record.times += 1
            record.reach = max(record.reach, position)
        self._row += 1
        self._records = {n: record for n, record in self._records.items() if n in alive}
        self.suspects.clear()
        self.suspects.update(n for n, one in self._records.items() if one.times >= SUSPECT)
        if len(reached) == 1:
            (number,) = reached
            if (own := self._records.get(number)) is not None:
                own.alone += 1
                if own.alone >= ALONE or (own.times >= ROW and self._row >= ROW):
                    self.forget(number)
                    return number
        return None

    def done(self, flight: Flight) -> None:
        """A step has ended."""
        self._row = 0
        for number, position in flight.reached if self._records else ():
            record = self._records.get(number)
            if record is not None and position >= record.reach + PROVEN:
                self.forget(number)

    def forget(self, number: int) -> None:
        """A request has ended, or come further than it was."""
        self._records.pop(number, None)
        self.suspects.discard(number)
