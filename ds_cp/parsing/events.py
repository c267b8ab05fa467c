"""What a parser finds in a model's output, and how it is asked."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Content:
    """Text of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """Text that the model thought before it answered."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegin:
    """A tool call. ``index``: 0 for the first of the answer. ``name`` is whole, but need not be
    that of a tool."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class ArgumentsDelta:
    """More of a call's arguments. All of a complete call joined are the JSON text of an object."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class CallEnd:
    """The end of a call. Not ``complete``: the answer ended within the arguments, or they are no
    JSON object; ``problem`` says which. Then the deltas are the text as far as it went."""

    index: int
    complete: bool
    problem: str = ""


Event = Content | Reasoning | CallBegin | ArgumentsDelta | CallEnd


class Parser(Protocol):
    """Reads the output of one answer. Any text is accepted, and any split of it gives the same
    events, but for where texts are cut. The work is linear in the text, and what is held back is
    bounded."""

    def feed(self, text: str) -> list[Event]:
        """What is certain with one more piece of output."""

    def finish(self) -> list[Event]:
        """The rest, when no piece follows: what was held back, and the end of an open call."""


def joined(events: Iterable[Event]) -> list[Event]:
    """Events with neighbouring texts of one kind put together, empty ones left out."""
    found: list[Event] = []
    for event in events:
        last = found[-1] if found else None
        match last, event:
            case Content(before), Content(text):
                found[-1] = Content(before + text)
            case Reasoning(before), Reasoning(text):
                found[-1] = Reasoning(before + text)
            case ArgumentsDelta(index, before), ArgumentsDelta(same, text) if index == same:
                found[-1] = ArgumentsDelta(index, before + text)
            case _, Content("") | Reasoning("") | ArgumentsDelta(_, ""):
                pass
            case _:
                found.append(event)
    return found
