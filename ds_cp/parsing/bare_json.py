"""Calls as JSON that is the whole answer: Llama 3, and models that were only told to do so."""

from __future__ import annotations

from ds_cp.parsing.calls import Toolbox
from ds_cp.parsing.machine import SPACE, WAIT
from ds_cp.parsing.marked_json import MarkedJson

PYTHON_TAG = "<|python_tag|>"
_FENCES = ("```json", "```tool_call", "```")


class BareJson(MarkedJson):
    """An answer that begins with an object or a list, perhaps within a fence or behind ``tag``, and
    calls a known tool. Several calls follow each other, with ``;`` or ``,`` or nothing between.
    Anything else is content, and so is all that follows it, up to the next ``tag``."""

    def __init__(self, tools: Toolbox, tag: str = PYTHON_TAG) -> None:
        super().__init__(tools, tag, only_known=True)
        self._beginnings = (tag, *_FENCES, "{", "[")

    def _start(self) -> bool:
        """At the beginning of the answer."""
        if not self._hold_space():
            return True
        if self._at_end():
            return False
        begin = self._ahead(self._beginnings)
        if begin == WAIT:
            return False
        if begin is None:
            return self._give_up()
        if begin in "{[":
            self._state = self._opening
        else:
            self._pos += len(begin)
            self._marked(begin)
        return True

    def _give_up(self, rest: str = "") -> bool:
        super()._give_up(rest)
        self._state = self._plain
        return True

    def _plain(self) -> bool:
        before, marker = self._until(self._outside)
        self._say(before)
        return marker is not None and self._marked(marker)

    def _after_arguments(self, marker: str | None) -> None:
        super()._after_arguments(marker)
        if marker is None:
            self._state = self._plain

    def _tail(self) -> bool:
        skipped = SPACE + ",;}" + ("" if self._in_list else "]")
        while not self._at_end() and self._text[self._pos] in skipped:
            self._pos += 1
        if self._at_end():
            return False
        char = self._text[self._pos]
        if char == "{":
            self._next_object()
        elif char == "]":
            self._in_list = False
            self._pos += 1
        elif char == "`" and (begin := self._ahead(("```",))) is not None:
            self._pos += 0 if begin == WAIT else len(begin)
            return begin != WAIT
        else:
            self._state = self._plain
        return True
