"""POST /v1/chat/completions."""

from __future__ import annotations

from dataclasses import dataclass, field
from time import monotonic
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ds_cp.api.completions import CLIENT_LEFT
from ds_cp.api.context import (
    ADMISSION_S,
    AppContext,
    engine_failure,
    new_id,
    now,
    request_id_of,
    request_options,
    sampling_params,
    usage,
)
from ds_cp.api.generation import Generation, unless_disconnected
from ds_cp.api.logprobs import chat_entries, prompt_entries
from ds_cp.api.protocol import ChatRequest
from ds_cp.api.sse import EventStream, stream_events
from ds_cp.outputs import Delta, TokenLogprob


async def chat_completions(context: AppContext, body: ChatRequest, request: Request) -> Response:
    """Answer a chat request, whole or as a stream."""
    arrival = monotonic()
    context.check(body.model)
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
    answer = _Answer(context, body, len(ids), params.n)
    generation = context.start(
        answer.id,
        [ids],
        params,
        request_options(body, request),
        arrival,
        prompt_param="messages",
        max_param=max_param,
    )
    try:
        if not body.stream:
            whole = await unless_disconnected(request.receive, answer.collect(generation))
            return Response(status_code=CLIENT_LEFT) if whole is None else JSONResponse(whole)
        await generation.admitted(ADMISSION_S)
    except BaseException:
        await generation.close()
        raise
    events = stream_events(
        generation,
        opening=answer.opening(),
        chunks_of=answer.chunks_of,
        closing=answer.closing,
        keep_alive_s=context.server.keep_alive_s,
        request_id=request_id_of(request),
    )
    return EventStream(events, generation, write_timeout_s=context.server.write_timeout_s)


@dataclass
class _Choice:
    """One of the answers, so far."""

    text: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    last: Delta = field(default_factory=lambda: Delta(""))


class _Answer:
    """Builds the JSON of one chat request."""

    def __init__(self, context: AppContext, body: ChatRequest, prompt_tokens: int, n: int) -> None:
        self._context = context
        self._body = body
        self._prompt_tokens = prompt_tokens
        self._cached_tokens = 0
        self._tokens = 0
        self._n = n
        self.id = new_id("chatcmpl")
        self._created = now()

    async def collect(self, generation: Generation) -> dict[str, Any]:
        """The whole answer. Closes the generation on every way out."""
        choices = [_Choice() for _ in range(self._n)]
        scores: tuple[TokenLogprob | None, ...] = ()
        try:
            async for _, delta in generation.deltas():
                self._count(delta)
                choice = choices[delta.index]
                choice.text.append(delta.text)
                choice.logprobs.extend(delta.logprobs or ())
                choice.last = delta
                scores = delta.prompt_logprobs or scores
        finally:
            await generation.close()
        whole = self._head("chat.completion") | {
            "choices": [self._choice(index, choice) for index, choice in enumerate(choices)],
            "usage": self._usage(),
        }
        if self._body.prompt_logprobs is not None:
            if len(scores) != self._prompt_tokens:
                raise engine_failure()
            whole["prompt_logprobs"] = await prompt_entries(
                scores, self._context.texts, self._body.prompt_logprobs
            )
        return whole

    def opening(self) -> list[dict[str, Any]]:
        """The role of every answer."""
        return [self.chunk(index, {"role": "assistant", "content": ""}) for index in range(self._n)]

    def chunks_of(self, _: int, delta: Delta) -> list[dict[str, Any]]:
        """The chunks of one delta: its text, then the finish; none while its text is held back."""
        self._count(delta)
        chunks = []
        if delta.text or delta.logprobs:
            text, logprobs = {"content": delta.text}, list(delta.logprobs or ())
            chunks.append(self.chunk(delta.index, text, logprobs))
        if delta.finish_reason is not None:
            chunks.append(self.chunk(delta.index, {}, last=delta))
        return chunks

    def closing(self) -> list[dict[str, Any]]:
        """The usage chunk, if asked for."""
        if not self._body.include_usage:
            return []
        return [self._head("chat.completion.chunk") | {"choices": [], "usage": self._usage()}]

    def chunk(
        self,
        index: int,
        delta: dict[str, str],
        logprobs: list[TokenLogprob] | None = None,
        last: Delta | None = None,
    ) -> dict[str, Any]:
        """One chunk of a stream."""
        choice = {
            "index": index,
            "delta": delta,
            "logprobs": self._logprobs(logprobs) if logprobs else None,
            "finish_reason": last.finish_reason if last else None,
        }
        if last is not None:
            choice["stop_reason"] = last.stop_reason
        chunk = self._head("chat.completion.chunk") | {"choices": [choice]}
        return chunk | {"usage": None} if self._body.include_usage else chunk

    def _choice(self, index: int, choice: _Choice) -> dict[str, Any]:
        return {
            "index": index,
            "message": {"role": "assistant", "content": "".join(choice.text)},
            "logprobs": self._logprobs(choice.logprobs),
            "finish_reason": choice.last.finish_reason,
            "stop_reason": choice.last.stop_reason,
        }

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self._created,
            "model": self._context.model_name(),
        }

    def _count(self, delta: Delta) -> None:
        if delta.finish_reason == "error":
            raise engine_failure()
        self._tokens += len(delta.token_ids)
        self._cached_tokens += delta.cached_tokens or 0

    def _logprobs(self, logprobs: list[TokenLogprob]) -> dict[str, Any] | None:
        if not self._body.logprobs:
            return None
        top = self._body.top_logprobs or 0
        return {"content": chat_entries(logprobs, self._context.texts, top), "refusal": None}

    def _usage(self) -> dict[str, Any]:
        return usage(self._prompt_tokens, self._tokens, self._cached_tokens)
