"""The answer to a chat, before it is any protocol's JSON: what each choice has so far."""

from __future__ import annotations

from abc import abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ds_cp.api.answers.json_pieces import EncodedList, encode
from ds_cp.api.answers.respond import Answer
from ds_cp.api.chat.events import (
    ArgumentsDelta,
    CallBegin,
    Content,
    Finished,
    Reasoning,
    Step,
    Usage,
)
from ds_cp.api.chat.start import Conversation
from ds_cp.api.context import AppContext
from ds_cp.outputs import Delta


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


class ChatAnswer(Answer):
    """Builds what is sent for one chat: one prompt, ``n`` messages. A subclass says how its
    protocol writes them: ``whole`` from ``messages``, ``events_of`` a step, ``opening``,
    ``closing``."""

    def __init__(self, context: AppContext, conversation: Conversation) -> None:
        super().__init__(context, [conversation.prompt_ids], conversation.params)
        self._conversation = conversation
        self.messages = [Message() for _ in range(self.n)]

    @abstractmethod
    def events_of(self, step: Step) -> Iterable[Any]:
        """What the framing writes of a step; none while text is held back."""

    def lists_of(self, step: Step) -> Mapping[str, list[Any]]:
        """What ``Message.lists`` gets of a step: log-probabilities, ids; by name."""
        return {}

    def record(self, prompt: int, delta: Delta) -> int:
        """Add a delta to its message."""
        step = self._read(delta)
        message = self.messages[step.choice]
        size = message.add(step)
        for name, values in self.lists_of(step).items():
            size += message.lists[name].extend(values)
        return size

    def chunks_of(self, prompt: int, delta: Delta) -> Iterable[Any]:
        """The events of a delta."""
        return self.events_of(self._read(self.take(prompt, delta)))

    @property
    def usage(self) -> Usage:
        """Tokens so far."""
        prompt = self.prompts[0]
        thought = sum(reader.reasoning_tokens for reader in self._conversation.readers)
        return Usage(len(prompt.ids), self.completion_tokens, prompt.cached_tokens, thought)

    def _read(self, delta: Delta) -> Step:
        """The step of a delta; what its answer holds back then is charged to the request."""
        reader, metrics = self._conversation.readers[delta.index], self.context.metrics.answers
        before, thought, failed = reader.held_bytes, reader.reasoning_tokens, reader.failed
        step = reader.read(delta)
        metrics.read(step.events, reader.reasoning_tokens - thought)
        if reader.failed and not failed:
            metrics.parser_failed()
        more = reader.held_bytes - before
        if more > 0:
            self._conversation.held.spend(more)
        elif more < 0:
            self._conversation.held.unspend(-more)
        return step
