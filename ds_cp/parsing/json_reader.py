"""Strict JSON, one value at a time, in pieces: where it ends, and whether it is JSON."""

from __future__ import annotations

import json
import re

MAX_DEPTH = 256  # containers within each other
MAX_NUMBER = 1024  # characters of a number
NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_LITERALS = frozenset({"true", "false", "null"})
_PLAIN = re.compile(r'[^"\\\x00-\x1f]*')  # of a string
_WORD = re.compile(r"[-+.0-9A-Za-z]*")
_SPACE = re.compile(r"[ \t\r\n]*")
_HEX = frozenset("0123456789abcdefABCDEF")

(_VALUE, _FIRST_ITEM, _FIRST_KEY, _KEY, _COLON, _NEXT, _STRING, _ESCAPE, _UNICODE, _IN_WORD,
 _DONE, _BAD) = range(12)  # fmt: skip


class JsonReader:
    """Reads one JSON value. ``done``: it has ended; ``bad``: it is none. Control characters in
    strings, which models write and JSON forbids, are escaped on the way. ``loose``: how many of the
    last characters that were read are a word that has not ended, or is none."""

    max_depth = MAX_DEPTH

    def __init__(self) -> None:
        self.loose = 0
        self._state = _VALUE
        self._stuck = _VALUE  # the state in which it was found to be none
        self._closers: list[str] = []
        self._is_key = False
        self._word: list[str] = []
        self._word_chars = 0
        self._digits = 0

    @property
    def done(self) -> bool:
        """Whether the value has ended."""
        return self._state == _DONE

    @property
    def bad(self) -> bool:
        """Whether the text is no JSON."""
        return self._state == _BAD

    def push(self, text: str, pos: int, out: list[str]) -> int:
        """Read ``text`` from ``pos`` on; returns where it stopped: at the end of the text, behind
        the value, or at the character that is no JSON. What was read is appended to ``out``."""
        start, end = pos, len(text)
        while pos < end and self._state < _DONE:
            if self._state == _STRING:
                found = _PLAIN.match(text, pos)
                pos = found.end() if found else pos
                if pos == end:
                    break
                char = text[pos]
                if char < " ":
                    out += (text[start:pos], json.dumps(char)[1:-1])
                    start = pos + 1
                elif char == '"':
                    self._state = _COLON if self._is_key else self._after_value()
                else:
                    self._state = _ESCAPE
                pos += 1
            elif self._state == _IN_WORD:
                pos = self._read_word(text, pos)
            elif self._state in (_ESCAPE, _UNICODE):
                pos = self._read_escape(text, pos)
            else:
                found = _SPACE.match(text, pos)
                pos = found.end() if found else pos
                if pos < end:
                    pos = self._read_sign(text, pos)
        if pos > start:
            out.append(text[start:pos])
        return pos

    def end(self) -> None:
        """No text follows: a number that is the whole value has ended."""
        if self._state == _IN_WORD:
            self._end_word()
        if self._state != _DONE:
            self._state = _BAD

    def _after_value(self) -> int:
        return _NEXT if self._closers else _DONE

    def _read_sign(self, text: str, pos: int) -> int:
        char, state = text[pos], self._state
        if state == _NEXT and char == ",":
            self._state = _KEY if self._closers[-1] == "}" else _VALUE
        elif state in (_NEXT, _FIRST_KEY, _FIRST_ITEM) and char == self._closers[-1]:
            self._closers.pop()
            self._state = self._after_value()
        elif state in (_FIRST_KEY, _KEY) and char == '"':
            self._state, self._is_key = _STRING, True
        elif state == _COLON and char == ":":
            self._state = _VALUE
        elif state in (_VALUE, _FIRST_ITEM) and char in '"{[':
            if char == '"':
                self._state, self._is_key = _STRING, False
            elif len(self._closers) == self.max_depth:
                return self._fail(pos)
            else:
                self._closers.append("}" if char == "{" else "]")
                self._state = _FIRST_KEY if char == "{" else _FIRST_ITEM
        elif state in (_VALUE, _FIRST_ITEM) and (char == "-" or char.isalnum()):
            self._state, self._word, self._word_chars = _IN_WORD, [], 0
            return pos
        else:
            return self._fail(pos)
        return pos + 1

    def _fail(self, pos: int) -> int:
        self._stuck, self._state = self._state, _BAD
        return pos

    def _read_escape(self, text: str, pos: int) -> int:
        char = text[pos]
        if self._state == _UNICODE:
            self._digits += 1
            good = char in _HEX
            next_state = _STRING if self._digits == 4 else _UNICODE
        else:
            self._digits = 0
            good = char in '"\\/bfnrtu'
            next_state = _UNICODE if char == "u" else _STRING
        self._state = next_state if good else _BAD
        return pos + good

    def _read_word(self, text: str, pos: int) -> int:
        found = _WORD.match(text, pos)
        end = found.end() if found else pos
        room = MAX_NUMBER - self._word_chars
        if end - pos > room:
            self.loose = self._word_chars + room
            return self._fail(pos + room)
        self._word_chars += end - pos
        self.loose = self._word_chars
        self._word.append(text[pos:end])
        if end < len(text):
            self._end_word()
        return end

    def _end_word(self) -> None:
        word = "".join(self._word)
        if self._admits(word):
            self._state, self.loose = self._after_value(), 0
        else:
            self._fail(0)

    def _admits(self, word: str) -> bool:
        """Whether a word is a value."""
        return word in _LITERALS or NUMBER.fullmatch(word) is not None

    def closing(self, member: str) -> str:
        """What makes an object of one that has not ended, read up to its ``loose`` end and not
        within an escape: values that are missing are null, and ``member`` is its last one."""
        state = self._stuck if self._state == _BAD else self._state
        within = len(self._closers) > 1
        rest = {
            _STRING: '": null' if self._is_key else '"',
            _COLON: ": null",
            _VALUE: "null",
            _IN_WORD: "null",
            _KEY: '"": null' if within else "",
        }.get(state, "")
        first = not within and state in (_FIRST_KEY, _KEY)
        nested = "".join(reversed(self._closers[1:]))
        return f"{rest}{nested}{'' if first else ', '}{member}}}"


def is_json(text: str, begins: str) -> bool:
    """Whether a text is one JSON value and nothing else, of which the first character is one of
    ``begins``."""
    if text[:1] not in tuple(begins):
        return False
    reader = JsonReader()
    end = reader.push(text, 0, [])
    reader.end()
    return reader.done and end == len(text)
