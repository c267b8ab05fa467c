"""Which of a few media types an ``Accept`` header asks for (RFC 9110 12.5.1)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

MAX_CHARS = 1024  # characters of a header that is read; browsers and Prometheus send 100 to 300
_TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_ELEMENT = re.compile(r'(?:[^",]|"(?:[^"\\]|\\.)*")+')  # between commas, those in quotes apart
_RANGE = re.compile(rf"\s*({_TOKEN})/({_TOKEN})\s*(;.*)?", re.DOTALL)
_PARAMETER = re.compile(rf';\s*({_TOKEN})\s*=\s*("(?:[^"\\]|\\.)*"|{_TOKEN})\s*')
_WEIGHT = re.compile(r"0(\.[0-9]{0,3})?|1(\.0{0,3})?")


@dataclass(frozen=True)
class Offer:
    """A media type that can be sent, all in small letters, and its version."""

    type: str
    subtype: str
    version: str


@dataclass(frozen=True)
class Range:
    """One element of an ``Accept`` header. ``parameters``: without ``q``, which is ``weight``."""

    type: str
    subtype: str
    parameters: dict[str, str]
    weight: float

    def fit(self, offer: Offer) -> int:
        """How exactly this names the offer: 0 does not, 1 ``*/*``, 2 ``text/*``, 3 by name, 4 by
        name and version."""
        if (self.type, self.subtype) == ("*", "*"):
            return 1
        if self.type != offer.type:
            return 0
        if self.subtype == "*":
            return 2
        version = self.parameters.get("version")
        if self.subtype != offer.subtype or version not in (None, offer.version):
            return 0
        return 3 if version is None else 4


def choose(header: str, offers: Sequence[Offer]) -> tuple[Offer, dict[str, str]]:
    """The offer that the header wants most, and the parameters of the range that names it.

    Of offers wanted equally it is the one named most exactly, then the first. The first also
    answers a header that wants none of them, or that is no ``Accept`` header: whoever scrapes gets
    something rather than a 406.
    """
    ranges = parse(header)
    best: tuple[float, int] = (0.0, 0)
    chosen: tuple[Offer, dict[str, str]] = (offers[0], {})
    for offer in offers:
        fitting = max(ranges, key=lambda found: found.fit(offer), default=None)  # noqa: B023
        exact = 0 if fitting is None else fitting.fit(offer)
        if fitting is not None and exact and fitting.weight and (fitting.weight, exact) > best:
            best, chosen = (fitting.weight, exact), (offer, fitting.parameters)
    return chosen


def parse(header: str) -> list[Range]:
    """The elements of an ``Accept`` header, without those that are not valid; none of a header that
    is longer than ``MAX_CHARS``."""
    ranges: list[Range] = []
    if len(header) > MAX_CHARS:
        return ranges
    for element in _ELEMENT.findall(header):
        found = _RANGE.fullmatch(element.rstrip())
        if found is None:
            continue
        parameters = {
            name.lower(): value.strip('"').lower()
            for name, value in _PARAMETER.findall(found[3] or "")
        }
        weight = parameters.pop("q", "1")
        if _WEIGHT.fullmatch(weight) is not None:
            ranges.append(Range(found[1].lower(), found[2].lower(), parameters, float(weight)))
    return ranges
