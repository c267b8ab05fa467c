"""A parser of reasoning, and behind it one of tool calls."""

from __future__ import annotations

from ds_cp.parsing.events import Content, Event, Parser, joined


class Chain:
    """What the first parser finds to be content is read by the second."""

    def __init__(self, first: Parser, second: Parser) -> None:
        self._first = first
        self._second = second

    def feed(self, text: str) -> list[Event]:
        """What is certain with one more piece of output."""
        return self._through(self._first.feed(text))

    def finish(self) -> list[Event]:
        """The rest, when no piece follows."""
        return joined([*self._through(self._first.finish()), *self._second.finish()])

    def _through(self, events: list[Event]) -> list[Event]:
        found: list[Event] = []
        for event in events:
            found += self._second.feed(event.text) if isinstance(event, Content) else [event]
        return joined(found) if len(found) > 1 else found


class Plain:
    """All text is content."""

    def feed(self, text: str) -> list[Event]:
        """The text."""
        return [Content(text)] if text else []

    def finish(self) -> list[Event]:
        """Nothing."""
        return []
