"""What the parsers of tool calls share: content beside calls, text that is held until it is known
to be a call, and arguments that are JSON."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ds_cp.parsing.events import ArgumentsDelta, CallBegin, CallEnd, Content
from ds_cp.parsing.held import HeldText
from ds_cp.parsing.ids import OPENAI, new_ids
from ds_cp.parsing.json_reader import JsonReader
from ds_cp.parsing.machine import WAIT, Gate, Machine, Markers

MAX_HELD = 1 << 18  # characters that are held at most, until it is known what they are
MAX_NAME = 256  # characters of a tool's name as a model may write it
MAX_CALLS = 128  # calls of one answer, and so of a message that a client sends back
UNFINISHED = "the answer ended before the arguments did"
NOT_JSON = "the arguments are not JSON"
NO_OBJECT = "the arguments are not an object"
_NAME = re.compile(r"[^\s\ud800-\udfff<>{}\[\]\"'(),;|]+")


def is_name(text: str) -> bool:
    """Whether a text can be the name of a tool."""
    return len(text) <= MAX_NAME and _NAME.fullmatch(text) is not None


@dataclass(frozen=True)
class Toolbox:
    """The tools of a request, as parsers need them.

    ``schemas``: by name, the JSON schema of a tool's arguments; values that a format writes as text
    are converted by it. ``new_id``: the id of a call, from its name and its index.
    """

    schemas: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    new_id: Callable[[str, int], str] = field(default_factory=lambda: new_ids(OPENAI))


class CallsMachine(Machine):
    """States of a parser of tool calls begin in ``_start``. Text that may be a call is held by
    ``_hold``, and is content after ``_give_up``."""

    def __init__(self, tools: Toolbox) -> None:
        super().__init__()
        self._tools = tools
        self._gate = Gate()
        self._index = -1
        self._ids: set[str] = set()  # of the calls so far
        self._open = False
        self._held = HeldText()
        self._header = ""  # what is read before a call is certain: a name, mostly
        self._reader = JsonReader()
        self._ends = Markers()  # what closes the arguments that are read now
        self._bad = ""  # what is wrong with them

    # --- what is found

    def _may_begin(self, name: str) -> bool:
        """Whether what is held can be a call of ``name``; else it is content. Behind ``MAX_CALLS``
        calls nothing is one."""
        return self._index + 1 < MAX_CALLS and is_name(name)

    def _say(self, text: str) -> None:
        """Content."""
        if text:
            self._events.append(Content(self._gate.push(text)))

    def _hold(self, text: str) -> bool:
        """Hold text that may be a call. False, and it is content, where it is too much."""
        self._held.append(text)
        if self._held.chars <= MAX_HELD:
            return True
        self._give_up()
        return False

    def _hold_space(self) -> bool:
        """Hold the white space that comes next; as ``_hold``."""
        return self._hold(self._space(MAX_HELD + 1 - self._held.chars))

    def _keep(self, space: str) -> bool:
        """White space between calls: held with what is held, else content if content follows."""
        if self._held:
            return self._hold(space)
        self._say(space)
        return True

    def _hold_header(self, markers: Markers, most: int = MAX_NAME) -> str | None:
        """Read and hold the header up to one of the markers, and return that; ``WAIT`` before it
        has come; None where it is too long or never comes: then all is content."""
        start, room = self._pos, most - len(self._header)
        before, marker = self._until(markers)
        if len(before) > room:
            self._pos = start + room
            self._hold(before[:room])
            self._give_up()
            return None
        self._header += before
        if not self._hold(before):
            return None
        if marker is None and self._final:
            self._give_up()
            return None
        return WAIT if marker is None else marker

    def _give_up(self, rest: str = "") -> bool:
        """What is held, and ``rest``, is content. The next state is ``_start``."""
        self._say(self._held.take() + rest)
        self._state = self._start
        return True

    def _begin(self, name: str, id_: str | None = None) -> None:
        """A call: what is held belongs to it. ``id_``: as the model wrote it, which it gets unless
        an earlier call of the answer has it: results must find their call."""
        self._held.clear()
        self._gate.cut()
        self._index += 1
        self._open, self._bad = True, ""
        number = self._index
        while not id_ or id_ in self._ids:
            id_, number = self._tools.new_id(name, number), number + 1
        self._ids.add(id_)
        self._events.append(CallBegin(self._index, id_, name))

    def _argue(self, text: str) -> None:
        """More of the arguments."""
        if text:
            self._events.append(ArgumentsDelta(self._index, text))

    def _end(self, problem: str = "") -> None:
        """The end of the call; complete without a ``problem``."""
        self._open = False
        self._events.append(CallEnd(self._index, not problem, problem))

    def _close(self) -> None:
        if self._open:
            self._end(self._bad or UNFINISHED)
        if self._held:
            self._give_up()
        self._events.append(Content(self._gate.flush()))

    # --- arguments that are JSON: an object, then one of ``_ends``

    def _read_arguments(self, ends: Markers) -> None:
        """Read an object next; ``_after_arguments`` is called behind it, with the marker that
        closes it if there is one already."""
        self._ends = ends
        self._reader = JsonReader()
        self._state = self._before_json

    def _after_arguments(self, marker: str | None) -> None:
        raise NotImplementedError

    def _before_json(self) -> bool:
        self._space()
        if self._at_end():
            return False
        if self._text[self._pos] == "{":
            self._state = self._in_json
            return True
        before, marker = self._until(self._ends)
        if before:
            self._spoil(NO_OBJECT, before)
        elif marker is None:
            return False
        else:
            self._argue("{}")
            self._end()
        if marker is not None:
            self._close_arguments(marker)
        return True

    def _in_json(self) -> bool:
        out: list[str] = []
        self._pos = self._reader.push(self._text, self._pos, out)
        self._argue("".join(out))
        if self._reader.done:
            self._end()
            self._after_arguments(None)
            return True
        if self._reader.bad:
            self._spoil(NOT_JSON)
            return True
        return False

    def _spoil(self, problem: str, text: str = "") -> None:
        """The arguments are no JSON object: what follows up to their end is passed on as it is."""
        self._bad = problem
        self._argue(text)
        self._state = self._in_bad

    def _in_bad(self) -> bool:
        before, marker = self._until(self._ends)
        self._argue(before)
        if marker is None:
            return False
        self._close_arguments(marker)
        return True

    def _close_arguments(self, marker: str) -> None:
        if self._open:
            self._end(self._bad)
        self._after_arguments(marker)
