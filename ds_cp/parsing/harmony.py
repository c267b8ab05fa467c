"""gpt-oss: messages on channels. ``analysis`` is reasoning, ``final`` and ``commentary`` are
content, and a message to a function is a call."""

from __future__ import annotations

import re

from ds_cp.parsing.calls import CallsMachine, Toolbox
from ds_cp.parsing.events import Reasoning
from ds_cp.parsing.machine import Gate, Markers

START, CHANNEL, MESSAGE, CONSTRAIN = "<|start|>", "<|channel|>", "<|message|>", "<|constrain|>"
END, CALL, RETURN = "<|end|>", "<|call|>", "<|return|>"
MAX_HEADER = 512  # characters of a message's header
MAX_LEAD = 320  # characters before the first marker of a header: a role and a recipient
_BREAK = "\n\n"  # between messages of one kind
_ENDS = Markers(END, CALL, RETURN, START, CHANNEL)
_HEADER = Markers(START, CHANNEL, MESSAGE, CONSTRAIN, END, CALL, RETURN)
_TO = re.compile(r"\bto=(\S+)")


class Harmony(CallsMachine):
    """Reads reasoning, content and calls.

    ``channel``: of the message that the prompt has begun; None where the output begins with a
    header. ``calls``: without, a message to a function is content.
    """

    def __init__(self, tools: Toolbox, channel: str | None = None, calls: bool = True) -> None:
        super().__init__(tools)
        self._calls = calls
        self._lead = ""  # of the header, the text before its first marker
        self._header = ""
        self._marked = False  # the header has had a marker
        self._thought = Gate(trim_start=True)
        self._message = self._content
        self._broken = {"analysis": False, "content": False}  # a message of the kind has come
        if channel is not None:
            self._open_message(channel)

    def _start(self) -> bool:
        """In a header, or before it."""
        start = self._pos
        room = (MAX_HEADER if self._marked else MAX_LEAD) - len(self._header)
        before, marker = self._until(_HEADER)
        if len(before) > room:
            self._pos = start + room
            self._hold(before[:room])
            return self._no_header(None)
        self._header += before
        self._hold(before)
        if not self._marked and "\n" in self._header.lstrip("\n"):
            return self._no_header(marker)
        if marker is None:
            if self._final and not self._marked and self._header.strip() not in ("", "assistant"):
                return self._no_header(None)
            if self._final:
                self._held.clear()
            return False
        if marker == MESSAGE:
            self._held.clear()
            self._open_message(self._header)
        elif marker in (END, CALL, RETURN, START):
            if self._header.strip():
                return self._no_header(marker)
            self._held.clear()
            self._reset()
        else:
            self._hold(marker)
            self._header += " "
            if marker == CHANNEL:
                self._header += "channel="
            self._marked = True
        return True

    def _reset(self) -> None:
        self._header, self._marked = "", False
        self._state = self._start

    def _no_header(self, marker: str | None) -> bool:
        """Text without a header is content."""
        self._pos -= len(marker or "")
        text = self._held.take()
        self._header, self._marked = "", False
        self._next_content()
        self._say(text)
        return True

    def _open_message(self, header: str) -> None:
        """A message begins. ``header``: its text, with ``channel=`` before the channel."""
        self._header, self._marked = "", False
        found = _TO.search(header)
        recipient = found.group(1) if found else ""
        name = recipient.removeprefix("functions.")
        channel = header.partition("channel=")[2].split()[:1] or header.split()[:1]
        to_tool = name and name not in ("assistant", "user") and self._calls
        if to_tool and self._may_begin(name):
            self._begin(name)
            self._read_arguments(_ENDS)
        elif channel == ["analysis"]:
            if self._broken["analysis"]:
                self._thought.cut()
                self._events.append(Reasoning(_BREAK))
            self._broken["analysis"] = True
            self._state = self._analysis
        else:
            self._next_content()

    def _next_content(self) -> None:
        if self._gate.passed and self._broken["content"]:
            self._gate.cut()
            self._say(_BREAK)
        self._broken["content"] = True
        self._state = self._content

    def _analysis(self) -> bool:
        before, marker = self._until(_ENDS)
        self._events.append(Reasoning(self._thought.push(before)))
        if marker is None:
            return False
        self._thought.cut()
        self._end_message(marker)
        return True

    def _content(self) -> bool:
        before, marker = self._until(_ENDS)
        self._say(before)
        if marker is None:
            return False
        self._end_message(marker)
        return True

    def _end_message(self, marker: str) -> None:
        self._reset()
        if marker == CHANNEL:
            self._pos -= len(marker)

    def _after_arguments(self, marker: str | None) -> None:
        if marker is None:
            self._state = self._behind_call
        else:
            self._end_message(marker)

    def _behind_call(self) -> bool:
        """Behind a call's arguments nothing is said."""
        _, marker = self._until(_ENDS)
        if marker is None:
            return False
        self._end_message(marker)
        return True


def open_channel(prompt_end: str) -> str | None:
    """The header of the message that a prompt has begun, or None where it has begun none."""
    _, found, header = prompt_end.rpartition(START)
    header, message, text = header.partition(MESSAGE)
    if not found or not message or any(mark in text for mark in (END, CALL, RETURN)):
        return None
    return header.replace(CHANNEL, " channel=").replace(CONSTRAIN, " ")
