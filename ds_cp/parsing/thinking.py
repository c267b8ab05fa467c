"""Reasoning between marks at the beginning of an answer, or anywhere where the marks are tokens
that nothing else can spell."""

from __future__ import annotations

from dataclasses import dataclass

from ds_cp.parsing.events import Content, Reasoning
from ds_cp.parsing.machine import MAX_SPACE, SPACE, WAIT, Gate, Machine, Markers

# Where an answer begins; ``WITHIN``: behind the beginning of its content.
INSIDE, OUTSIDE, UNKNOWN, WITHIN = "inside", "outside", "unknown", "within"
TAIL_CHARS = 512  # characters at the end of a prompt that say where its answer begins

_BREAK = "\n\n"  # between two pieces of reasoning


@dataclass(frozen=True)
class Style:
    """``opens`` and ``closes``: the marks; spellings of the same. ``anywhere``: reasoning may come
    again later. ``assumed``: an answer is reasoning from its beginning on, whether or not the first
    mark is there. ``ends``: what ends reasoning without being a mark: the beginning of a call."""

    opens: tuple[str, ...]
    closes: tuple[str, ...]
    anywhere: bool = False
    assumed: bool = False
    ends: tuple[str, ...] = ()

    def begins(self, prompt: str, continues: bool = False) -> str:
        """Where an answer to the prompt begins: inside of reasoning, outside, or unknown. The last
        ``TAIL_CHARS`` characters of the prompt are enough, unless the answer ``continues`` one that
        the prompt has begun: then all of that."""
        if continues:
            opened = max(prompt.rfind(mark) for mark in self.opens)
            return INSIDE if opened > max(prompt.rfind(mark) for mark in self.closes) else WITHIN
        tail = prompt[-TAIL_CHARS:].rstrip(SPACE)
        if tail.endswith(tuple(mark.rstrip(SPACE) for mark in self.closes)):
            return OUTSIDE
        if tail.endswith(tuple(mark.rstrip(SPACE) for mark in self.opens)):
            return INSIDE
        return UNKNOWN


THINK = Style(("<think>",), ("</think>",))
DEEPSEEK_R1 = Style(("<think>",), ("</think>",), assumed=True)
SEED = Style(("<seed:think>",), ("</seed:think>",))
MAGISTRAL = Style(("[THINK]",), ("[/THINK]",), anywhere=True)
GEMMA4 = Style(("<|channel>thought\n",), ("<channel|>",), anywhere=True)
COHERE = Style(("<|START_THINKING|>",), ("<|END_THINKING|>",))
GRANITE = Style(
    ("Here is my thought process:", "Here's my thought process:"),
    ("Here is my response:", "Here's my response:"),
)


class Thinking(Machine):
    """Splits reasoning from what follows it. White space at both ends of either is dropped."""

    def __init__(self, style: Style, begins: str = UNKNOWN) -> None:
        self._style = style
        self._begins = begins
        self._first = (*style.opens, *style.closes)
        self._closing = Markers(*style.closes, *style.ends)
        self._opening = Markers(*(style.opens if style.anywhere else ()))
        self._thought = Gate(trim_start=True)
        self._thoughts = False  # reasoning has come and ended
        self._trims = False  # reasoning was the last that came
        self._space_before = ""
        super().__init__()

    def _start(self) -> bool:
        """At the beginning of the answer."""
        if self._begins in (INSIDE, WITHIN):
            self._state = self._inside if self._begins == INSIDE else self._outside
            return True
        self._space_before += self._space(MAX_SPACE - len(self._space_before))
        if self._at_end():
            return False
        mark = self._ahead(self._first)
        if mark == WAIT:
            return False
        if mark is not None:
            self._pos += len(mark)
            self._space_before = ""
        if mark in self._style.opens or (
            mark is None and self._style.assumed and self._begins == UNKNOWN
        ):
            self._state = self._inside
        else:
            self._trims = mark is not None or self._begins == OUTSIDE
            self._state = self._outside
            if not self._trims:
                self._events.append(Content(self._space_before))
        self._space_before = ""
        return True

    def _inside(self) -> bool:
        before, mark = self._until(self._closing)
        self._events.append(Reasoning(self._thought.push(before)))
        if mark is None:
            return False
        if mark in self._style.ends:
            self._pos -= len(mark)
        self._thoughts = self._thoughts or self._thought.passed
        self._thought = Gate(trim_start=True)
        self._trims = True
        self._state = self._outside
        return True

    def _outside(self) -> bool:
        if self._trims:
            self._space()
            if self._at_end():
                return False
            self._trims = False
        before, mark = self._until(self._opening)
        self._events.append(Content(before))
        if mark is None:
            return False
        self._state = self._inside
        if self._thoughts:
            self._events.append(Reasoning(_BREAK))
        return True

    def _close(self) -> None:
        if not self._style.assumed:
            self._events.append(Content(self._space_before))
        if self._state != self._outside:
            self._events.append(Reasoning(self._thought.flush()))
