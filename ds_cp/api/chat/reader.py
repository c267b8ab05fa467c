"""Reads one answer of the engine: deltas of text become steps of events."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Iterator
from typing import cast

from ds_cp.api.chat.events import (
    CallBegin,
    CallEnd,
    Content,
    Event,
    Finished,
    FinishReason,
    Reasoning,
    Step,
)
from ds_cp.outputs import Delta
from ds_cp.parsing.calls import MAX_HELD
from ds_cp.parsing.chain import Plain
from ds_cp.parsing.events import Parser, joined
from ds_cp.parsing.held import BYTES, HeldText

logger = logging.getLogger("ds_cp.api")
BROKEN = "the parser of this model's answers failed"


class AnswerReader:
    """Reads the deltas of one answer, in their order.

    ``parser``: of the answer. ``marks``: special tokens that the text has for the parser alone:
    what is left of them in content and reasoning is no text. ``piece``: the text of one token.
    A parser that fails is a fault of ds_cp; from there on all is content, and nothing ends.
    """

    def __init__(
        self, parser: Parser, marks: Collection[str], piece: Callable[[int], str], choice: int = 0
    ) -> None:
        self._parser = parser
        self._piece = piece
        self._choice = choice
        self._plain = isinstance(parser, Plain)
        marks = sorted(marks, key=len, reverse=True)
        self._marks = re.compile("|".join(map(re.escape, marks))) if marks else None
        self._unread = HeldText(MAX_HELD)  # fed since something came of it
        self._open: int | None = None  # the call that has not ended
        self._called = False
        self._cut = False  # the last call that ended is not complete
        self._pending = 0  # tokens since something came of them
        self.reasoning_tokens = 0
        self.failed = False  # the parser has

    @property
    def held_bytes(self) -> int:
        """Bytes of memory that text takes of which nothing has come: the parser may have it, and it
        is kept beside for the case that the parser fails."""
        return 2 * BYTES * self._unread.chars

    def read(self, delta: Delta) -> Step:
        """What a delta adds."""
        events: list[Event] = []
        for text, tokens in self._split(delta):
            found = self._feed(text)
            self._count(found, tokens)
            events += found
        finished = None
        if delta.finish_reason is not None:
            events += self._finish()
            finished = Finished(self._reason(delta), delta.stop_reason)
        events = self._cleaned(joined(events)) if events else events
        return Step(self._choice, events, delta.token_ids, delta.logprobs, finished)

    def _split(self, delta: Delta) -> Iterator[tuple[str, int]]:
        """The text by tokens, so that these are counted as what they are: a delta has several where
        its client was slow."""
        if len(delta.token_ids) < 2 or self._plain:
            yield delta.text, len(delta.token_ids)
            return
        at = 0
        for number, token in enumerate(delta.token_ids, 1):
            piece = self._piece(token)
            here = delta.text[at : at + len(piece)] if delta.text.startswith(piece, at) else ""
            if number == len(delta.token_ids):
                here = delta.text[at:]
            at += len(here)
            yield here, 1

    def _feed(self, text: str) -> list[Event]:
        if not text:
            return []
        try:
            found = self._parser.feed(text)
        except Exception:
            return self._give_up(text)
        if found:
            self._unread.clear()
        else:
            self._unread.append(text)
        return self._noted(found)

    def _finish(self) -> list[Event]:
        try:
            found = self._noted(self._parser.finish())
        except Exception:
            found = self._give_up("")
        self._unread.clear()
        if self._open is not None:
            found += self._noted([CallEnd(self._open, False, BROKEN)])
        return found

    def _give_up(self, text: str) -> list[Event]:
        logger.exception("%s; the rest of the answer is content", BROKEN)
        self.failed = True
        self._parser, text = Plain(), self._unread.take() + text
        found: list[Event] = []
        if self._open is not None:
            found = self._noted([CallEnd(self._open, False, BROKEN)])
        return [*found, Content(text)] if text else found

    def _noted(self, events: list[Event]) -> list[Event]:
        for event in events:
            if isinstance(event, CallBegin):
                self._open, self._called = event.index, True
            elif isinstance(event, CallEnd):
                self._open, self._cut = None, not event.complete
        return events

    def _count(self, events: list[Event], tokens: int) -> None:
        """Tokens are reasoning if that is the next that comes of them; its marks are, too."""
        self._pending += tokens
        for event in events:
            if isinstance(event, Reasoning):
                self.reasoning_tokens += self._pending
            self._pending = 0

    def _cleaned(self, events: list[Event]) -> list[Event]:
        if self._marks is None:
            return events
        found: list[Event] = []
        for event in events:
            if isinstance(event, Content | Reasoning):
                event = type(event)(self._marks.sub("", event.text))
                if not event.text:
                    continue
            found.append(event)
        return found

    def _reason(self, delta: Delta) -> FinishReason:
        """A call that the client's own stop cuts is nothing that the client should run."""
        stopped_within = self._cut and delta.stop_reason is not None
        if delta.finish_reason == "stop" and self._called and not stopped_within:
            return "tool_calls"
        return cast("FinishReason", delta.finish_reason)
