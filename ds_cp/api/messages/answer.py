"""The answer to one request of /v1/messages, whole or as events."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from ds_cp.api.answers.json_pieces import json_object
from ds_cp.api.answers.named_events import CHAR_BYTES, named_event
from ds_cp.api.answers.respond import engine_failure
from ds_cp.api.answers.sse import Framing
from ds_cp.api.chat.answer import ChatAnswer
from ds_cp.api.chat.events import Finished, Step
from ds_cp.api.chat.start import Conversation
from ds_cp.api.context import AppContext
from ds_cp.api.error_shapes import messages_error
from ds_cp.api.errors import ApiError
from ds_cp.api.messages.output import Output
from ds_cp.api.messages.request import MessagesRequest
from ds_cp.api.messages.resource import end_event, new_message, stop_of, usage_of
from ds_cp.outputs import Delta

Json = dict[str, Any]

PING: Json = {"type": "ping"}


class MessageAnswer(ChatAnswer):
    """Builds one message."""

    def __init__(
        self,
        context: AppContext,
        body: MessagesRequest,
        conversation: Conversation,
        message_id: str,
        request_id: str,
    ) -> None:
        super().__init__(context, conversation)
        prompt = len(conversation.prompt_ids)
        self._message = new_message(message_id, context.model_name(body.model), prompt)
        self.framing = Framing(
            named_event,
            lambda error: _error_event(error, request_id),
            b"",
            keep_alive=named_event(PING),
        )
        self._clamped = body.max_tokens > context.room(prompt)
        self._output = Output(hide_thinking=body.hides_thinking)
        self._finished = Finished("stop")

    def record(self, prompt: int, delta: Delta) -> int:
        """Add a delta to the blocks; the bytes that it takes."""
        list(self.events_of(self._read(delta)))
        return CHAR_BYTES * len(delta.text)

    def whole(self) -> Iterator[bytes]:
        """The message."""
        stop, sequence = stop_of(self._finished, clamped=self._clamped)
        end = {"stop_reason": stop, "stop_sequence": sequence, "usage": usage_of(self.usage)}
        return json_object(self._message | {"content": self._output.blocks} | end)

    def opening(self) -> Iterable[Json]:
        """The message, of which nothing has come."""
        return [{"type": "message_start", "message": self._message}, PING]

    def closing(self) -> Iterable[Json]:
        """Why it ended, and the tokens."""
        stop, sequence = stop_of(self._finished, clamped=self._clamped)
        return [end_event(stop, sequence, self.usage), {"type": "message_stop"}]

    def events_of(self, step: Step) -> Iterator[Json]:
        """The events of a step."""
        yield from self._output.take(step.events)
        if step.finished is not None:
            if step.finished.reason == "abort":
                raise engine_failure()
            yield from self._output.close()
            self._finished = step.finished


def _error_event(error: ApiError, request_id: str) -> bytes:
    return named_event(messages_error(error.status_code, error.detail, request_id))
