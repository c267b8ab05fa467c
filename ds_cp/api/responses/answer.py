"""The answer to one request of /v1/responses, whole or as events."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import count
from typing import Any

from ds_cp.api.answers.budget import Held
from ds_cp.api.answers.logprobs import CHAT_ENTRY_BYTES, chat_entries
from ds_cp.api.answers.named_events import CHAR_BYTES, named_event, named_pieces
from ds_cp.api.answers.respond import engine_failure
from ds_cp.api.answers.sse import Framing
from ds_cp.api.chat.answer import ChatAnswer
from ds_cp.api.chat.events import Step
from ds_cp.api.chat.start import Conversation
from ds_cp.api.context import AppContext
from ds_cp.api.errors import ApiError
from ds_cp.api.responses.output import Output
from ds_cp.api.responses.request import ResponseRequest
from ds_cp.api.responses.resource import Pieces, failed, finished, in_pieces
from ds_cp.outputs import Delta

Json = dict[str, Any]
# Events that may have all log-probabilities of an answer in them.
_LARGE = frozenset(
    f"response.{name}"
    for name in ("output_text.done", "content_part.done", "output_item.done", "completed",
                 "incomplete")
)  # fmt: skip


class ResponseAnswer(ChatAnswer):
    """Builds a response from its ``new_response``. ``done`` is told of the finished one before it
    is sent. A stream keeps its whole answer too, which ``held`` is charged for."""

    def __init__(
        self,
        context: AppContext,
        body: ResponseRequest,
        conversation: Conversation,
        response: Json,
        done: Callable[[Json], None],
        held: Held,
    ) -> None:
        super().__init__(context, conversation)
        self.response = response
        self.framing = Framing(self._event, self._error_event, b"")
        self._pieces = Pieces(held.spend)
        self._top = (body.top_logprobs or 0) if body.wants_logprobs else None
        self._output = Output(seal=body.wants_sealed)
        self._done = done
        self._held = held
        self._numbers = count()

    def record(self, prompt: int, delta: Delta) -> int:
        """Add a delta to the output; the bytes that it takes."""
        list(self.events_of(self._read(delta)))
        return _kept_bytes(delta)

    def chunks_of(self, prompt: int, delta: Delta) -> Iterable[Json]:
        """The events of a delta, which is kept for those at the end."""
        shown = self.take(prompt, delta)
        self._held.spend(_kept_bytes(shown))
        return self.events_of(self._read(shown))

    def whole(self) -> Iterator[bytes]:
        """The finished response."""
        self.finish()
        return in_pieces(self.response)

    def opening(self) -> Iterable[Json]:
        """The response, of which nothing has come."""
        for state in ("created", "in_progress"):
            yield self._numbered({"type": f"response.{state}", "response": self.response})

    def closing(self) -> Iterable[Json]:
        """The finished response."""
        self.finish()
        kind = f"response.{self.response['status']}"
        yield self._numbered({"type": kind, "response": self.response})

    def finish(self) -> None:
        """Hand over the finished response, once every delta was taken."""
        self._done(self.response)

    def failure(self, error: ApiError) -> Json:
        """The response as far as it came, with an error."""
        list(self._output.close("incomplete"))  # the text of an open item is part of it
        return failed(self.response, self._output.items, error)

    def events_of(self, step: Step) -> Iterable[Json]:
        """The events of a step; one that ends the answer finishes the response."""
        return map(self._numbered, self._take(step))

    def _take(self, step: Step) -> Iterator[Json]:
        entries: list[Json] = []
        if self._top is not None and step.logprobs:
            entries = chat_entries(step.logprobs, self.context.texts, self._top)
        yield from self._output.take(step.events, entries)
        if step.finished is None:
            return
        if step.finished.reason == "abort":
            raise engine_failure()
        yield from self._output.finish(step.finished.reason)
        self.response = finished(
            self.response, self._output.items, step.finished.reason, self.usage
        )

    def _numbered(self, event: Json) -> Json:
        return event | {"sequence_number": next(self._numbers)}

    def _event(self, event: Json) -> bytes | Iterator[bytes]:
        if event["type"] in _LARGE:
            return named_pieces(event["type"], self._pieces.of_event(event))
        return named_event(event)

    def _error_event(self, error: ApiError) -> bytes:
        """What a stream ends with that has begun and fails."""
        event: Json = {"type": "response.failed", "response": self.failure(error)}
        pieces = self._pieces.of_event(self._numbered(event))
        return b"".join(named_pieces(event["type"], pieces))


def _kept_bytes(delta: Delta) -> int:
    entries = sum(1 + len(one.top) for one in delta.logprobs or ())
    return CHAR_BYTES * len(delta.text) + CHAT_ENTRY_BYTES * entries
