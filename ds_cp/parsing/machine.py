"""The base of the parsers: a state machine over text that arrives in pieces."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from ds_cp.parsing.events import Event, joined

SPACE = " \t\r\n"
MAX_SPACE = 64  # characters of white space that are held back until it is known what follows
WAIT = "\0wait"  # what ``Machine._ahead`` says while more text can decide


class Markers:
    """Literal texts that are looked for together. None may be empty or within another one: then
    the first that is complete is also the leftmost of the whole text."""

    def __init__(self, *texts: str) -> None:
        self.texts = tuple(dict.fromkeys(texts))
        assert all(self.texts), self.texts
        assert not any(a in b for a in self.texts for b in self.texts if a != b), self.texts
        self._search = re.compile("|".join(map(re.escape, self.texts)) or r"(?!)").search
        self._first = frozenset(text[0] for text in self.texts)
        self._longest = max(map(len, self.texts), default=1)

    def search(self, text: str, start: int) -> re.Match[str] | None:
        """The leftmost of the texts from ``start`` on."""
        return self._search(text, start)

    def begun(self, text: str, start: int) -> int:
        """Characters at the end of ``text`` that may begin one of the texts."""
        for at in range(max(start, len(text) - self._longest + 1), len(text)):
            if text[at] in self._first:
                end = text[at:]
                if any(marker.startswith(end) for marker in self.texts):
                    return len(end)
        return 0


class Gate:
    """Passes text on, but holds white space back until it is known whether a boundary follows it:
    at boundaries there is none. A run longer than ``MAX_SPACE`` loses only that many of it.

    ``trim_start``: the text begins at a boundary.
    """

    def __init__(self, trim_start: bool = False) -> None:
        self._held = ""
        self._trim_start = trim_start
        self._cut = False  # a boundary was the last that came
        self.passed = False  # something has passed

    def push(self, text: str) -> str:
        """What passes now."""
        text = self._held + text
        if self._trim_start and not self.passed:
            text = text.lstrip(SPACE)
        body = text.rstrip(SPACE)
        if len(text) - len(body) > MAX_SPACE:
            body = text[:-MAX_SPACE]
        self._held = text[len(body) :]
        if body:
            self.passed, self._cut = True, False
        return body

    def cut(self) -> None:
        """A boundary: what is held is dropped."""
        self._held, self._cut = "", True
        self._trim_start = self._trim_start or not self.passed

    def flush(self) -> str:
        """What is held, at the end of a text that no boundary closes."""
        text, self._held = self._held, ""
        return "" if self._cut else text


class Machine:
    """Runs states over the text. A state is a method that consumes text from ``_pos`` on, and says
    whether the next state should run; False waits for more text."""

    def __init__(self) -> None:
        self._text = ""
        self._pos = 0
        self._final = False
        self._events: list[Event] = []
        self._state: Callable[[], bool] = self._start

    def feed(self, text: str) -> list[Event]:
        """What is certain with one more piece of output."""
        assert not self._final, "text after the end"
        if text:
            self._text = self._text[self._pos :] + text
            self._pos = 0
            while self._state():
                pass
        return self._take()

    def finish(self) -> list[Event]:
        """The rest, when no piece follows."""
        self._final = True
        while self._state():
            pass
        self._close()
        return self._take()

    def _start(self) -> bool:
        raise NotImplementedError

    def _close(self) -> None:
        """Emit what is held, at the end of the text."""
        raise NotImplementedError

    def _take(self) -> list[Event]:
        events, self._events = self._events, []
        return joined(events) if len(events) > 1 else events

    # --- reading

    def _until(self, markers: Markers) -> tuple[str, str | None]:
        """The certain text before the next marker, and the marker, or None while there is none.
        Both are consumed."""
        found = markers.search(self._text, self._pos)
        if found is not None:
            before, self._pos = self._text[self._pos : found.start()], found.end()
            return before, found.group()
        kept = 0 if self._final else markers.begun(self._text, self._pos)
        end = len(self._text) - kept
        before, self._pos = self._text[self._pos : end], end
        return before, None

    def _ahead(self, texts: Iterable[str]) -> str | None:
        """The longest of ``texts`` that comes next, unconsumed; None for none of them, ``WAIT``
        where more text decides."""
        best: str | None = None
        for text in texts:
            if self._text.startswith(text, self._pos):
                if best is None or len(text) > len(best):
                    best = text
            elif not self._final and text.startswith(self._text[self._pos :]):
                if best is None or len(text) > len(best):
                    return WAIT
        return best

    def _space(self, most: int | None = None) -> str:
        """The white space that comes next, ``most`` characters of it, consumed."""
        rest = self._pos
        text, end = self._text, len(self._text)
        end = end if most is None else min(end, rest + most)
        while rest < end and text[rest] in SPACE:
            rest += 1
        found, self._pos = text[self._pos : rest], rest
        return found

    def _expect(self, markers: Markers) -> tuple[str, str | None]:
        """The white space that comes next, and the marker behind it, consumed; ``WAIT`` where more
        text decides, None for other text."""
        space = self._space()
        if self._at_end():
            return space, WAIT
        marker = self._ahead(markers.texts)
        if marker is not None and marker != WAIT:
            self._pos += len(marker)
        return space, marker

    def _at_end(self) -> bool:
        return self._pos == len(self._text)
