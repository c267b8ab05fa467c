"""Which request ends the workers that compute it. No torch."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from ds_cp.scheduler.recovery import Flight

SUSPECT, GUILTY = 2, 3  # interruptions
PROVEN = 2  # tokens that a request has to come further than it was before it is trusted again


@dataclass
class _Record:
    """``times``: interruptions that a request was in flight in; ``reach``: how many of its tokens
    would have been computed after the last of these."""

    times: int = 0
    reach: int = 0


class Inquest:
    """Finds the request whose steps end workers.

    Whoever was in flight in ``SUSPECT`` interruptions, and has not come past the point where it was
    then, is suspect. Suspects run one at a time, before anyone else does. Who comes past that point
    is free; who is alone in flight in the last of ``GUILTY`` interruptions is at fault. Workers
    that are ended by somebody else, faster than a request gets on, look the same.

    ``suspects``: always the same set.
    """

    def __init__(self) -> None:
        self.suspects: set[int] = set()
        self._records: dict[int, _Record] = {}

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
        self._records = {n: record for n, record in self._records.items() if n in alive}
        self.suspects.clear()
        self.suspects.update(n for n, one in self._records.items() if one.times >= SUSPECT)
        if len(reached) == 1:
            (number,) = reached
            if number in self._records and self._records[number].times >= GUILTY:
                self.forget(number)
                return number
        return None

    def done(self, flight: Flight) -> None:
        """A step has ended."""
        for number, position in flight.reached if self._records else ():
            record = self._records.get(number)
            if record is not None and position >= record.reach + PROVEN:
                self.forget(number)

    def times(self, number: int) -> int:
        """The interruptions that count against a request."""
        record = self._records.get(number)
        return 0 if record is None else record.times

    def forget(self, number: int) -> None:
        """A request has ended, or come further than it was."""
        self._records.pop(number, None)
        self.suspects.discard(number)
