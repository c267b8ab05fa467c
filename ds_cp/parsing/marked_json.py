"""Calls as JSON objects, or a list of them, behind a marker: Hermes and Qwen, and their kin."""

from __future__ import annotations

from ds_cp.parsing.call_object import CallObject
from ds_cp.parsing.calls import MAX_HELD, CallsMachine, Toolbox
from ds_cp.parsing.machine import SPACE, Markers


class MarkedJson(CallsMachine):
    """``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``.

    ``begin``: the marker. ``end``: what closes it; empty where nothing does. ``only_known``: what
    has no known tool's name is content.
    """

    def __init__(self, tools: Toolbox, begin: str, end: str = "", only_known: bool = False) -> None:
        super().__init__(tools)
        self._only_known = only_known
        self._outside = Markers(begin)
        self._tail_ends = Markers(*filter(None, (begin, end)))
        self._begin_marker = begin
        self._in_list = False
        self._call = CallObject()
        self._told = False  # the call that is read has been announced

    def _start(self) -> bool:
        before, marker = self._until(self._outside)
        self._say(before)
        if marker is None:
            return False
        return self._marked(marker)

    def _marked(self, marker: str) -> bool:
        self._hold(marker)
        self._in_list = False
        self._state = self._opening
        return True

    def _opening(self) -> bool:
        """Behind the marker."""
        if not self._hold_space():
            return True
        if self._at_end():
            return False
        char = self._text[self._pos]
        if char == "[" and not self._in_list:
            self._in_list = True
            self._pos += 1
            return self._hold(char) or True
        if char != "{":
            return self._give_up()
        self._next_object()
        return True

    def _next_object(self) -> None:
        self._call, self._told = CallObject(), False
        self._state = self._object

    def _object(self) -> bool:
        call, start = self._call, self._pos
        room = MAX_HELD + 1 - self._held.chars
        if self._told or len(self._text) - start <= room:
            self._pos = call.push(self._text, start)
        else:
            self._pos += call.push(self._text[start : start + room], 0)
        if self._final and self._at_end():
            call.end()
        if not self._told:
            if not self._hold(self._text[start : self._pos]):
                return True
            if call.bad and not call.ready:
                return self._give_up()
            if not call.ready:
                return False
            known = not self._only_known or call.name in self._tools.schemas
            if not known or not self._may_begin(call.name):
                return self._give_up()
            self._told = True
            self._begin(call.name)
        if self._open:
            self._argue(call.take())
            if call.arguments_done:
                self._end(call.problem)
            elif call.bad and not (self._final and self._at_end()):
                return self._broken(call.problem)
        if call.done:
            self._state = self._tail
        elif call.bad:
            self._state = self._tail
        else:
            return False
        return True

    def _broken(self, problem: str) -> bool:
        """The arguments are no JSON: what follows up to the end marker is passed on."""
        self._ends = self._tail_ends
        self._spoil(problem)
        return True

    def _after_arguments(self, marker: str | None) -> None:
        if marker == self._begin_marker:
            self._marked(marker)
        else:
            self._state = self._start

    def _tail(self) -> bool:
        """Behind an object: another one, the end of the list, or the end marker."""
        self._skip_tail()
        if self._at_end():
            return False
        char = self._text[self._pos]
        if char == "{":
            self._next_object()
            return True
        if char == "]" and self._in_list:
            self._in_list = False
            self._pos += 1
            return True
        marker = self._ahead(self._tail_ends.texts)
        if marker is None:
            self._state = self._start
            return True
        return marker in self._tail_ends.texts and self._tail_marker(marker)

    def _skip_tail(self) -> None:
        """White space, commas of a list, and one brace more than there should be."""
        skipped = SPACE + (",}" if self._in_list else "};")
        text, end = self._text, len(self._text)
        while self._pos < end and text[self._pos] in skipped:
            self._pos += 1

    def _tail_marker(self, marker: str) -> bool:
        self._pos += len(marker)
        if marker == self._begin_marker:
            return self._marked(marker)
        self._state = self._start
        return True
