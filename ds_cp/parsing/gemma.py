"""Gemma 4's calls, ``<|tool_call>call:name{key:<|"|>text<|"|>,n:5}<tool_call|>``, and those of
FunctionGemma, which has other marks. Arguments become JSON as they arrive."""

from __future__ import annotations

import json
from dataclasses import dataclass

from ds_cp.parsing.calls import (
    MAX_HELD,
    NOT_JSON,
    CallsMachine,
    Toolbox,
)
from ds_cp.parsing.convert import as_json
from ds_cp.parsing.held import HeldText
from ds_cp.parsing.json_reader import MAX_DEPTH, JsonReader
from ds_cp.parsing.machine import SPACE, WAIT, Markers

_WORDS = {"True": "true", "False": "false", "None": "null"}
_ANY = frozenset({"null", "boolean", "integer", "number"})


@dataclass(frozen=True)
class Style:
    """``begin`` and ``end`` of a call, and the ``quote`` around its texts."""

    begin: str
    end: str
    quote: str


GEMMA4 = Style("<|tool_call>", "<tool_call|>", '<|"|>')
FUNCTION_GEMMA = Style("<start_function_call>", "<end_function_call>", "<escape>")


class Gemma(CallsMachine):
    """The arguments are read by one state for each place within an object or a list."""

    def __init__(self, tools: Toolbox, style: Style) -> None:
        super().__init__(tools)
        self._style = style
        self._outside = Markers(style.begin)
        self._name_end = Markers("{", style.end)
        self._quote = Markers(style.quote)
        self._call_end = Markers(style.end)
        self._key_ends = Markers(":", ",", "{", "}", "[", "]", style.end)
        self._value_ends = Markers(",", "}", "]", style.end)
        self._closers: list[str] = []
        self._out: list[str] = []
        self._fresh = False  # nothing has come in the innermost container
        self._bare = HeldText()  # text without quotes
        self._is_key = False

    def _start(self) -> bool:
        before, marker = self._until(self._outside)
        self._say(before)
        if marker is None:
            return False
        self._hold(marker)
        self._header = ""
        self._state = self._in_name
        return True

    def _in_name(self) -> bool:
        marker = self._hold_header(self._name_end)
        if marker is None or marker == WAIT:
            return marker is None
        called, colon, name = self._header.strip().partition(":")
        if marker != "{" or called != "call" or not colon or not self._may_begin(name):
            return self._give_up(marker)
        self._begin(name)
        self._closers, self._fresh = ["}"], True
        self._argue("{")
        self._state = self._key
        return True

    # --- arguments

    def _key(self) -> bool:
        """Before a key, or the end of an empty object."""
        self._space()
        if self._at_end():
            return False
        if self._text[self._pos] == "}" and self._fresh:
            return self._pop()
        self._is_key = True
        return self._text_or_bare()

    def _item(self) -> bool:
        """Before a value, or the end of an empty list."""
        self._space()
        if self._at_end():
            return False
        char = self._text[self._pos]
        if char == "]" and self._fresh and self._closers[-1] == "]":
            return self._pop()
        if char in "{[" and len(self._closers) < MAX_DEPTH:
            self._pos += 1
            self._argue(char)
            self._closers.append("}" if char == "{" else "]")
            self._fresh = True
            self._state = self._key if char == "{" else self._item
            return True
        self._is_key = False
        return self._text_or_bare()

    def _text_or_bare(self) -> bool:
        quote = self._ahead((self._style.quote,))
        if quote == WAIT:
            return False
        self._fresh = False
        if quote is not None:
            self._pos += len(quote)
            self._argue('"')
            self._state = self._quoted
        elif self._text[self._pos] == '"':
            self._reader = JsonReader()
            self._state = self._json_text
        else:
            self._bare.clear()
            self._state = self._in_bare
        return True

    def _quoted(self) -> bool:
        before, marker = self._until(self._quote)
        self._argue(json.dumps(before, ensure_ascii=False)[1:-1])
        if marker is None:
            return False
        self._argue('"')
        self._after()
        return True

    def _json_text(self) -> bool:
        out: list[str] = []
        self._pos = self._reader.push(self._text, self._pos, out)
        self._argue("".join(out))
        if self._reader.done:
            self._after()
        elif self._reader.bad:
            self._fail()
        else:
            return False
        return True

    def _in_bare(self) -> bool:
        before, marker = self._until(self._key_ends if self._is_key else self._value_ends)
        self._bare.append(before)
        self._pos -= len(marker or "")
        if self._bare.chars > MAX_HELD:
            self._fail(self._bare.take())
            return True
        if marker is None:
            return False
        bare = self._bare.take()
        text = bare.strip(SPACE)
        if not text or marker == self._style.end or (self._is_key and marker != ":"):
            self._fail(bare)
            return True
        self._argue(json.dumps(text, ensure_ascii=False) if self._is_key else _value(text))
        self._after()
        return True

    def _after(self) -> None:
        self._state = self._colon if self._is_key else self._next

    def _colon(self) -> bool:
        self._space()
        if self._at_end():
            return False
        if self._text[self._pos] != ":":
            self._fail()
            return True
        self._pos += 1
        self._argue(":")
        self._state = self._item
        return True

    def _next(self) -> bool:
        """Behind a value."""
        self._space()
        if self._at_end():
            return False
        char = self._text[self._pos]
        if char == self._closers[-1]:
            return self._pop()
        if char != ",":
            self._fail()
            return True
        self._pos += 1
        self._argue(",")
        self._state = self._key if self._closers[-1] == "}" else self._item
        return True

    def _pop(self) -> bool:
        self._pos += 1
        self._argue(self._closers.pop())
        self._fresh = False
        if self._closers:
            self._state = self._next
        else:
            self._end()
            self._state = self._tail
        return True

    def _fail(self, text: str = "") -> None:
        self._ends = self._call_end
        self._spoil(NOT_JSON, text)

    def _tail(self) -> bool:
        """Behind the arguments: the end marker."""
        while not self._at_end() and self._text[self._pos] in SPACE + "}":
            self._pos += 1
        if self._at_end():
            return False
        marker = self._ahead((self._style.end,))
        if marker == WAIT:
            return False
        self._pos += len(marker or "")
        self._state = self._start
        return True

    def _after_arguments(self, marker: str | None) -> None:
        self._state = self._start


def _value(text: str) -> str:
    """The JSON of a value without quotes."""
    return _WORDS.get(text) or as_json(text, _ANY)
