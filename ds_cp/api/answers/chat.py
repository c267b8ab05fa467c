"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from time import monotonic
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from ds_cp.api.answers.budget import ID_BYTES, held_by
from ds_cp.api.answers.json_pieces import json_array, json_object, json_text
from ds_cp.api.answers.logprobs import chat_entries
from ds_cp.api.answers.respond import Answer, Choice, Json, ending, respond
from ds_cp.api.context import AppContext, request_options, sampling_params
from ds_cp.api.requests.protocol import ChatRequest
from ds_cp.outputs import Delta, TokenLogprob


async def chat_completions(context: AppContext, body: ChatRequest, request: Request) -> Response:
    """Answer a chat request, whole or as a stream."""
    arrival = monotonic()
    context.check(body.model)
    context.check_template_kwargs(body.chat_template_kwargs)
    newer = body.max_completion_tokens is not None
    max_param = "max_completion_tokens" if newer else "max_tokens"
    params = sampling_params(
        body,
        max_tokens=body.max_completion_tokens if newer else body.max_tokens,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        prompt_logprobs=body.prompt_logprobs,
        names={"max_tokens": max_param, "logprobs": "top_logprobs"},
    )
    ids = await context.codec.encode_chat([message.for_template() for message in body.messages])
    held = held_by(request.scope)
    held.take(ID_BYTES * len(ids))
    answer = _ChatAnswer(context, body, ids, params.n)
    generation = context.start(
        answer.id,
        [ids],
        params,
        request_options(body, request),
        arrival,
        held,
        stream=bool(body.stream),
        prompt_param="messages",
        max_param=max_param,
    )
    return await respond(context, request, answer, generation, stream=bool(body.stream))


class _ChatAnswer(Answer):
    """The JSON of one chat request: one prompt, ``n`` messages."""

    id_prefix = "chatcmpl"
    whole_kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"

    def __init__(self, context: AppContext, body: ChatRequest, ids: list[int], n: int) -> None:
        super().__init__(context, body, [ids], n)
        self._top_logprobs = (body.top_logprobs or 0) if body.logprobs else None

    def logprob_lists(self, choice: int, logprobs: Sequence[TokenLogprob]) -> Json:
        """``logprobs.content``."""
        return {} if self._top_logprobs is None else {"content": self._entries(logprobs)}

    def fields(self) -> Json:
        """The messages, and the prompt's log-probabilities beside them."""
        choices = (self._message(index, choice) for index, choice in enumerate(self.choices))
        return {"choices": json_array(choices)} | self.prompt_logprobs(self.prompts[0])

    def opening(self) -> Iterator[Json]:
        """The role of every message."""
        role = {"role": "assistant", "content": ""}
        return (self._chunk(index, role) for index in range(self.n))

    def chunks_of(self, prompt: int, delta: Delta) -> list[Json]:
        """The text of a delta, then the finish."""
        delta = self.take(prompt, delta)
        chunks = []
        if delta.text or delta.logprobs:
            chunks.append(self._chunk(delta.index, {"content": delta.text}, delta.logprobs))
        if delta.finish_reason is not None:
            chunks.append(self._chunk(delta.index, {}, last=delta))
        return chunks

    def _message(self, index: int, choice: Choice) -> Iterator[bytes]:
        logprobs: Any = None
        if self._top_logprobs is not None:
            content = json_array([choice.lists["content"].items()])
            logprobs = json_object({"content": content, "refusal": None})
        message = {"role": "assistant", "content": json_text(choice.text)}
        fields = {"index": index, "message": json_object(message), "logprobs": logprobs}
        return json_object(fields | ending(choice.last))

    def _chunk(
        self,
        index: int,
        delta: dict[str, str],
        logprobs: Sequence[TokenLogprob] | None = None,
        last: Delta | None = None,
    ) -> Json:
        choice: Json = {
            "index": index,
            "delta": delta,
            "logprobs": self._logprobs(logprobs) if logprobs else None,
            "finish_reason": None,
        }
        return self.chunk([choice if last is None else choice | ending(last)])

    def _logprobs(self, logprobs: Sequence[TokenLogprob]) -> Json | None:
        if self._top_logprobs is None:
            return None
        return {"content": self._entries(logprobs), "refusal": None}

    def _entries(self, logprobs: Sequence[TokenLogprob]) -> list[Json]:
        return chat_entries(logprobs, self.context.texts, self._top_logprobs or 0)
