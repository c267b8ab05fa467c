"""The content of a message as it comes: its blocks, and the protocol's events of each."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator
from io import StringIO
from typing import Any

from ds_cp.api.chat.events import (
    ArgumentsDelta,
    CallBegin,
    CallEnd,
    Content,
    Event,
    Reasoning,
)
from ds_cp.parsing.history import RAW, as_object
from ds_cp.parsing.json_reader import NUMBER, JsonReader

Json = dict[str, Any]

SIGNATURE = "ds_cp"  # of thinking: clients send a block back only with one; it proves nothing


class Output:
    """Turns the events of one answer into blocks and into events of blocks. At most one is open.

    ``hide_thinking``: blocks of thinking have no text.
    """

    def __init__(self, *, hide_thinking: bool = False) -> None:
        self.blocks: list[Json] = []  # the last one may be open
        self._hides = hide_thinking
        self._open: str | None = None  # the type of the open block
        self._text = StringIO()
        self._input = _Input()  # of the open call

    def take(self, events: Iterable[Event]) -> Iterator[Json]:
        """The events of one step."""
        for event in events:
            match event:
                case Content(text):
                    yield from self._begin({"type": "text", "text": ""})
                    self._text.write(text)
                    yield self._delta({"type": "text_delta", "text": text})
                case Reasoning(text):
                    yield from self._begin({"type": "thinking", "thinking": "", "signature": ""})
                    if not self._hides:
                        self._text.write(text)
                        yield self._delta({"type": "thinking_delta", "thinking": text})
                case CallBegin(_, id_, name):
                    yield from self.close()
                    self._input = _Input()
                    yield from self._begin(
                        {"type": "tool_use", "id": id_, "name": name, "input": {}}
                    )
                case ArgumentsDelta(_, text):
                    self._text.write(text)
                    if sound := self._input.take(text):
                        yield self._of_input(sound)
                case CallEnd():
                    yield from self.close()

    def close(self) -> Iterator[Json]:
        """End the open block, if there is one."""
        kind, text = self._open, self._text.getvalue()
        if kind is None:
            return
        self._open, self._text = None, StringIO()
        block = self.blocks[-1]
        match kind:
            case "text":
                block["text"] = text
            case "thinking":
                block |= {"thinking": text, "signature": SIGNATURE}
                yield self._delta({"type": "signature_delta", "signature": SIGNATURE})
            case _:
                block["input"], rest = self._input.end(text)
                if rest:
                    yield self._of_input(rest)
        yield {"type": "content_block_stop", "index": len(self.blocks) - 1}

    def _begin(self, block: Json) -> Iterator[Json]:
        """Open a block, unless one of its kind is open."""
        if self._open == block["type"]:
            return
        yield from self.close()
        self._open = block["type"]
        self.blocks.append(block)
        index = len(self.blocks) - 1
        yield {"type": "content_block_start", "index": index, "content_block": dict(block)}

    def _of_input(self, text: str) -> Json:
        return self._delta({"type": "input_json_delta", "partial_json": text})

    def _delta(self, delta: Json) -> Json:
        return {"type": "content_block_delta", "index": len(self.blocks) - 1, "delta": delta}


class _Strict(JsonReader):
    """JSON that every client can read and that can be written again: no number is infinite."""

    max_depth = 128  # the anthropic client's reader takes 200

    def _admits(self, word: str) -> bool:
        number = NUMBER.fullmatch(word) is not None
        return math.isfinite(float(word)) if number else super()._admits(word)


# Text whose escapes are whole; half a surrogate pair is none.
_WHOLE = re.compile(
    r"""(?:[^\\]+|\\["\\/bfnrt]|\\u(?![dD][89a-fA-F])[0-9a-fA-F]{4}"""
    r"""|\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2})*"""
)
_MAX_ESCAPE = 11  # characters of one that is not whole


class _Input:
    """The arguments of one call as they come. A client reads the JSON that it has after each delta,
    and its stream ends with an exception where that is no JSON: what a model writes wrong is not
    sent, nor what follows. At the end the object is closed, and has the whole text of the arguments
    as its last member, ``RAW``, so that a client can tell it from a call that may run; so has the
    input of a whole answer. Arguments that do not begin as an object are ``RAW`` alone."""

    def __init__(self) -> None:
        self._reader = _Strict()
        self._begun = False
        self._sent = False  # whether anything was
        self._escape = ""  # an escape that is not whole
        self._word = ""  # a number or literal that has not ended

    def take(self, text: str) -> str:
        """What can be sent of ``text``."""
        if not self._begun:
            text = text.lstrip(" \t\r\n")
            if not text.startswith("{"):  # nothing yet, or no object: all is sent at the end
                self._begun = bool(text)
                return ""
            self._begun = self._sent = True
        if not self._sent or len(self._escape) > _MAX_ESCAPE:
            return ""
        text = self._escape + text
        found = _WHOLE.match(text)
        end = found.end() if found else 0
        whole, self._escape = text[:end], text[end:]
        out = [self._word]
        self._reader.push(whole, 0, out)
        sound = "".join(out)
        end = len(sound) - self._reader.loose
        self._word = sound[end:]
        return sound[:end]

    def end(self, text: str) -> tuple[Json, str]:
        """The input, and what is to be sent of it. ``text``: all of the arguments."""
        if self._sent and self._reader.done:
            return as_object(_Input().take(text)), ""
        if not self._sent:
            alone = as_object(text or "{}")
            return alone, json.dumps(alone, ensure_ascii=False) if text else ""
        raw = json.dumps(text, ensure_ascii=False)
        rest = self._reader.closing(f'"{RAW}": {raw}')
        found = as_object(_Input().take(text) + rest)
        return found | {RAW: text}, rest
