"""A call as one JSON object, ``{"name": ..., "arguments": {...}}``, read in pieces."""

from __future__ import annotations

import json

from ds_cp.parsing.calls import MAX_HELD, NO_OBJECT, NOT_JSON, is_name
from ds_cp.parsing.held import HeldText
from ds_cp.parsing.json_reader import JsonReader

NAMES = frozenset({"name", "tool_name"})
ARGUMENTS = frozenset({"arguments", "parameters"})
MAX_KEY = 1024  # characters of a key, or of a name with its quotes

_START, _FIRST_KEY, _KEY, _IN_KEY, _COLON, _VALUE, _IN_VALUE, _NEXT, _DONE, _BAD = range(10)


class CallObject:
    """Reads the object. ``name``: once it is known. ``ready``: the name is, and the arguments have
    begun or will never come; then ``take`` gives what is new of them."""

    def __init__(self) -> None:
        self.name = ""
        self.problem = ""  # of the arguments
        self.arguments_done = False
        self._begun = False  # the arguments have
        self._state = _START
        self._key = ""
        self._reader = JsonReader()
        self._captured = HeldText()  # a key, a name, or arguments that are a string
        self._captured_chars = 0  # as the model wrote it
        self._out: list[str] = []  # arguments that nobody has taken
        self._kind = ""  # of the value that is read: name, arguments, text or other

    @property
    def done(self) -> bool:
        """Whether the object has ended."""
        return self._state == _DONE

    @property
    def bad(self) -> bool:
        """Whether the text is no such object."""
        return self._state == _BAD

    @property
    def ready(self) -> bool:
        """Whether this is a call for certain."""
        return bool(self.name) and (self._begun or self.done)

    def take(self) -> str:
        """What is new of the arguments' text."""
        text = "".join(self._out)
        self._out = []
        return text

    def push(self, text: str, pos: int) -> int:
        """Read ``text`` from ``pos`` on; returns where it stopped."""
        while pos < len(text) and self._state < _DONE:
            if self._state in (_IN_KEY, _IN_VALUE):
                pos = self._read(text, pos)
            elif text[pos] in " \t\r\n":
                pos += 1
            else:
                pos = self._sign(text, pos)
        return pos

    def end(self) -> None:
        """No text follows."""
        if self._state != _DONE:
            self._state = _BAD

    def _sign(self, text: str, pos: int) -> int:
        char, state = text[pos], self._state
        if state == _START and char == "{":
            self._state = _FIRST_KEY
        elif (state == _FIRST_KEY or state == _NEXT) and char == "}":
            self._finish()
        elif state in (_FIRST_KEY, _KEY) and char == '"':
            self._capture(_IN_KEY)
            return pos
        elif state == _COLON and char == ":":
            self._state = _VALUE
        elif state == _NEXT and char == ",":
            self._state = _KEY
        elif state == _VALUE:
            self._kind = self._kind_of(char)
            self._capture(_IN_VALUE)
            return pos
        else:
            self._state = _BAD
            return pos
        return pos + 1

    def _capture(self, state: int) -> None:
        self._state = state
        self._reader = JsonReader()
        self._captured.clear()
        self._captured_chars = 0

    def _kind_of(self, char: str) -> str:
        if self._key in NAMES and not self.name:
            return "name"
        if self._key not in ARGUMENTS or self._begun:
            return "other"
        if char == "n":  # null: as if there were none
            return "other"
        self._begun = char != '"'
        if char not in '"{':
            self.problem = NO_OBJECT
        return "text" if char == '"' else "arguments"

    def _read(self, text: str, pos: int) -> int:
        out: list[str] = []
        in_key = self._state == _IN_KEY
        if in_key or self._kind in ("name", "text"):
            room = (MAX_KEY if in_key or self._kind == "name" else MAX_HELD) - self._captured_chars
            end = pos + self._reader.push(text[pos : pos + room], 0, out)
            self._captured.append("".join(out))
            self._captured_chars += end - pos
            if end == pos:
                self._state = _BAD
                return end
        else:
            end = self._reader.push(text, pos, out)
        if in_key or self._kind in ("name", "text"):
            pass
        elif self._kind == "arguments":
            self._out += out
        if self._reader.bad:
            self._state = _BAD
            if self._kind == "arguments" and not in_key:
                self.problem = NOT_JSON
        elif self._reader.done and in_key:
            self._key = json.loads(self._captured.take())
            self._state = _COLON
        elif self._reader.done:
            self._state = _NEXT
            self._end_value(self._captured.take())
        return end

    def _end_value(self, captured: str) -> None:
        if self._kind == "name":
            name = json.loads(captured)
            if isinstance(name, str) and is_name(name):
                self.name = name
            else:
                self._state = _BAD
        elif self._kind == "arguments":
            self.arguments_done = True
        elif self._kind == "text":  # arguments within a string
            inner = _text_of(json.loads(captured))
            reader = JsonReader()
            rest = reader.push(inner, 0, self._out)
            if inner[:1] != "{" or not reader.done or inner[rest:].strip():
                self._out, self.problem = [inner], NO_OBJECT
            self._begun = self.arguments_done = True

    def _finish(self) -> None:
        self._state = _DONE if self.name else _BAD
        if not self._begun:
            self._out.append("{}")
            self._begun = self.arguments_done = True


def _text_of(text: str) -> str:
    """The text with U+FFFD for each half of a surrogate pair: JSON can spell it, UTF-8 cannot."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
