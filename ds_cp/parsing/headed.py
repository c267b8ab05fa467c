"""Calls with a header between markers and JSON arguments: DeepSeek V3 and V3.1, Kimi K2."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ds_cp.parsing.calls import NO_OBJECT, CallsMachine, Toolbox
from ds_cp.parsing.machine import SPACE, WAIT, Markers

MAX_FENCE = 64  # characters between a name and its arguments


@dataclass(frozen=True)
class Style:
    """Markers of a family. ``named_after``: a header that means that the name comes behind the
    separator, on a line of its own. ``read``: from a header, the name and the id (or None)."""

    section_begin: str
    call_begin: str
    separator: str
    call_end: str
    section_end: str
    read: Callable[[str], tuple[str, str | None]]
    named_after: str | None = None


def _as_it_is(header: str) -> tuple[str, str | None]:
    return header, None


def _numbered(header: str) -> tuple[str, str | None]:
    """``functions.NAME:INDEX`` is Kimi's id of a call."""
    name, colon, number = header.rpartition(":")
    if not colon or not number.isdigit():
        return header.removeprefix("functions."), None
    return name.removeprefix("functions."), header


DEEPSEEK = Style(
    "<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>",
    "<｜tool▁calls▁end｜>", _as_it_is, "function",
)  # fmt: skip
KIMI = Style(
    "<|tool_calls_section_begin|>", "<|tool_call_begin|>", "<|tool_call_argument_begin|>",
    "<|tool_call_end|>", "<|tool_calls_section_end|>", _numbered,
)  # fmt: skip


class Headed(CallsMachine):
    """A section of calls: marker, header, separator, JSON, marker."""

    def __init__(self, tools: Toolbox, style: Style) -> None:
        super().__init__(tools)
        self._style = style
        self._outside = Markers(style.section_begin, style.call_begin)
        self._within = Markers(style.call_begin, style.section_end)
        self._separators = Markers(style.separator, style.call_end, style.section_end)
        self._closing = Markers(style.call_end, style.section_end, style.call_begin)
        self._fence_ends = Markers("{", *self._closing.texts)

    def _start(self) -> bool:
        before, marker = self._until(self._outside)
        self._say(before)
        if marker is None:
            return False
        self._hold(marker)
        self._enter(marker)
        return True

    def _enter(self, marker: str) -> None:
        self._header = ""
        self._state = self._in_header if marker == self._style.call_begin else self._section

    def _section(self) -> bool:
        """Between calls."""
        space, marker = self._expect(self._within)
        if not self._keep(space):
            return True
        if marker is None:
            return self._give_up()
        if marker == self._style.section_end:
            self._held.clear()
            self._state = self._start
        elif marker != WAIT:
            self._hold(marker)
            self._enter(marker)
        return marker != WAIT

    def _in_header(self) -> bool:
        marker = self._hold_header(self._separators)
        if marker is None or marker == WAIT:
            return marker is None
        if marker != self._style.separator:
            return self._give_up(marker)
        self._hold(marker)
        self._header = self._header.strip()
        if self._header == self._style.named_after:
            self._state = self._behind_separator
            return True
        name, id_ = self._style.read(self._header)
        return self._announce(name, id_)

    def _announce(self, name: str, id_: str | None = None) -> bool:
        if not self._may_begin(name):
            return self._give_up()
        self._begin(name, id_)
        self._read_arguments(self._closing)
        return True

    def _behind_separator(self) -> bool:
        """Where the header may be a name after all, if arguments follow at once."""
        if not self._hold_space():
            return True
        if self._at_end():
            return False
        if self._text[self._pos] == "{":
            return self._announce(self._header)
        self._header = ""
        self._state = self._named_line
        return True

    def _named_line(self) -> bool:
        marker = self._hold_header(_LINE)
        if marker is None or marker == WAIT:
            return marker is None
        if marker == "{":
            self._pos -= 1
        else:
            self._hold(marker)
        name = self._header.strip()
        if not self._may_begin(name):
            return self._give_up()
        self._begin(name)
        self._header = ""
        self._state = self._fence
        return True

    def _fence(self) -> bool:
        """What stands between a name and its arguments: the beginning of a block of code."""
        before, marker = self._until(self._fence_ends)
        self._header += before
        self._pos -= len(marker or "")
        if marker == "{" and len(self._header) <= MAX_FENCE:
            self._read_arguments(self._closing)
        elif marker is not None or self._final or len(self._header) > MAX_FENCE:
            self._ends = self._closing
            self._spoil(NO_OBJECT, self._header)
        else:
            return False
        return True

    def _after_arguments(self, marker: str | None) -> None:
        if marker is None:
            self._state = self._tail
        elif marker == self._style.section_end:
            self._state = self._start
        elif marker == self._style.call_begin:
            self._hold(marker)
            self._enter(marker)
        else:
            self._state = self._section

    def _tail(self) -> bool:
        """Behind arguments: the end of the block of code, and the marker."""
        while not self._at_end() and self._text[self._pos] in SPACE + "`":
            self._pos += 1
        if self._at_end():
            return False
        _, marker = self._expect(self._closing)
        if marker is None:
            self._state = self._start
        elif marker != WAIT:
            self._after_arguments(marker)
        return marker != WAIT


_LINE = Markers("\n", "{")
