"""The answer to a chat, before it is any protocol's JSON: what each choice has so far."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from ds_cp.api.answers.json_pieces import EncodedList, encode
from ds_cp.api.chat.events import (
    ArgumentsDelta,
    CallBegin,
    Content,
    Finished,
    Reasoning,
    Step,
)


@dataclass
class Call:
    """A tool call of a whole answer. ``arguments``: JSON text, as the text of a JSON string without
    its quotes."""

    id: str
    name: str
    arguments: bytearray = field(default_factory=bytearray)


@dataclass
class Message:
    """One answer as far as it has come. Texts are encoded as they come: each is the text of a JSON
    string without its quotes (``json_pieces.json_text``). ``lists``: for the log-probabilities."""

    reasoning: bytearray = field(default_factory=bytearray)
    content: bytearray = field(default_factory=bytearray)
    calls: list[Call] = field(default_factory=list)
    lists: defaultdict[str, EncodedList] = field(default_factory=lambda: defaultdict(EncodedList))
    finished: Finished | None = None

    def add(self, step: Step) -> int:
        """Take a step; the bytes that its texts need."""
        size = 0
        for event in step.events:
            match event:
                case CallBegin(_, id_, name):
                    self.calls.append(Call(id_, name))
                    size += len(id_) + len(name)
                case Reasoning(text):
                    size += _append(self.reasoning, text)
                case Content(text):
                    size += _append(self.content, text)
                case ArgumentsDelta(index, text):
                    size += _append(self.calls[index].arguments, text)
        self.finished = step.finished or self.finished
        return size


def _append(to: bytearray, text: str) -> int:
    encoded = encode(text)[1:-1]
    to += encoded
    return len(encoded)
