"""POST /v1/completions."""

from __future__ import annotations

from dataclasses import dataclass, field
from time import monotonic
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ds_cp.engine.params import Delta, TokenLogprob
from ds_cp.serve.front import (
    ADMISSION_S,
    Front,
    engine_failure,
    new_id,
    now,
    request_id_of,
    sampling_params,
    usage,
)
from ds_cp.serve.generation import Generation, unless_disconnected
from ds_cp.serve.logprobs import legacy_block
from ds_cp.serve.protocol import CompletionRequest
from ds_cp.serve.sse import EventStream, stream_events

DEFAULT_MAX_TOKENS = 16
CLIENT_LEFT = 499  # never seen by a client: there is none any more


@dataclass
class _Choice:
    """What is known of one prompt's completion so far."""

    echo: str = ""
    text: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    tokens: int = 0
    offset: int = 0  # characters before the next token, for text_offset
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    def add(self, delta: Delta) -> None:
        if delta.finish_reason == "error":
            raise engine_failure()
        self.tokens += len(delta.token_ids)
        self.text.append(delta.text)
        self.logprobs.extend(delta.logprobs or ())
        self.finish_reason = delta.finish_reason
        self.stop_reason = delta.stop_reason


async def completions(front: Front, body: CompletionRequest, request: Request) -> Response:
    """Answer a completion request, whole or as a stream."""
    arrival = monotonic()
    front.check(body.model)
    given = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    params = sampling_params(body, max_tokens=given, logprobs=body.logprobs)
    prompts = [
        await front.codec.encode(item) if isinstance(item, str) else item for item in body.prompt
    ]
    answer = _Answer(front, body, [len(ids) for ids in prompts])
    generation = front.start(
        answer.head["id"],
        prompts,
        params,
        arrival,
        prompt_param="prompt",
        clamp=body.max_tokens is None,
    )
    try:
        await answer.read_echoes(prompts)
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
        keep_alive_s=front.settings.keep_alive_s,
        request_id=request_id_of(request),
    )
    return EventStream(events, generation, write_timeout_s=front.settings.write_timeout_s)


class _Answer:
    """Builds the JSON of one completion request."""

    def __init__(self, front: Front, body: CompletionRequest, prompt_lengths: list[int]) -> None:
        self._front = front
        self._body = body
        self._prompt_tokens = sum(prompt_lengths)
        self._choices = [_Choice() for _ in prompt_lengths]
        self.head: dict[str, Any] = {
            "id": new_id("cmpl"),
            "object": "text_completion",
            "created": now(),
            "model": front.model_name(),
        }

    async def read_echoes(self, prompts: list[list[int]]) -> None:
        """With ``echo``, note each prompt's text; of token ids, what they spell."""
        if not self._body.echo:
            return
        for choice, item, ids in zip(self._choices, self._body.prompt, prompts, strict=True):
            choice.echo = item if isinstance(item, str) else await self._front.codec.decode(ids)
            choice.offset = len(choice.echo)

    async def collect(self, generation: Generation) -> dict[str, Any]:
        """The whole answer. Closes the generation on every way out."""
        try:
            async for index, delta in generation.deltas():
                self._choices[index].add(delta)
        finally:
            await generation.close()
        choices = [
            self._choice(index, choice.echo + "".join(choice.text), choice.logprobs)
            for index, choice in enumerate(self._choices)
        ]
        return self.head | {"choices": choices, "usage": self._usage()}

    def opening(self) -> list[dict[str, Any]]:
        """The prompts, with ``echo``."""
        echoes = [(index, choice.echo) for index, choice in enumerate(self._choices)]
        return [self._chunk([self._choice(index, echo, [])]) for index, echo in echoes if echo]

    def chunks_of(self, index: int, delta: Delta) -> list[dict[str, Any]]:
        """The chunks of one delta: none while its text is held back."""
        self._choices[index].add(delta)
        if not (delta.text or delta.logprobs or delta.finish_reason):
            return []
        return [self._chunk([self._choice(index, delta.text, list(delta.logprobs or ()))])]

    def closing(self) -> list[dict[str, Any]]:
        """The usage chunk, if asked for."""
        return [self._chunk([], self._usage())] if self._body.include_usage else []

    def _choice(self, index: int, text: str, logprobs: list[TokenLogprob]) -> dict[str, Any]:
        choice = self._choices[index]
        block = None
        if self._body.logprobs is not None:
            block, choice.offset = legacy_block(
                logprobs, self._front.texts, self._body.logprobs, choice.offset
            )
        return {
            "index": index,
            "text": text,
            "logprobs": block,
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
        }

    def _chunk(
        self, choices: list[dict[str, Any]], counts: dict[str, int] | None = None
    ) -> dict[str, Any]:
        chunk = self.head | {"choices": choices}
        return chunk | {"usage": counts} if self._body.include_usage else chunk

    def _usage(self) -> dict[str, int]:
        return usage(self._prompt_tokens, sum(choice.tokens for choice in self._choices))
