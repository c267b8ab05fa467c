"""POST /v1/completions."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

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
from ds_cp.api.logprobs import echo_blocks, legacy_block, prompt_entries
from ds_cp.api.protocol import CompletionRequest
from ds_cp.api.sse import EventStream, stream_events
from ds_cp.outputs import Delta, TokenLogprob
from ds_cp.sampling_params import SamplingParams

DEFAULT_MAX_TOKENS = 16
CLIENT_LEFT = 499  # never seen by a client: there is none any more


@dataclass
class _Prompt:
    """One prompt, and what the engine says of it."""

    ids: list[int]
    text: str = ""  # what the answers begin with
    cached_tokens: int = 0
    logprobs: tuple[TokenLogprob | None, ...] = ()
    held: list[Delta] | None = None  # of a stream that must begin with the prompt's logprobs


@dataclass
class _Choice:
    """One answer to a prompt, so far."""

    prompt: _Prompt
    text: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    last: Delta = field(default_factory=lambda: Delta(""))
    offset: int = 0  # characters before the next token, for text_offset


async def completions(context: AppContext, body: CompletionRequest, request: Request) -> Response:
    """Answer a completion request, whole or as a stream."""
    arrival = monotonic()
    context.check(body.model)
    params, max_param = _params(body)
    prompts = [
        await context.codec.encode(item) if isinstance(item, str) else item for item in body.prompt
    ]
    answer = _Answer(context, body, prompts, params.n)
    generation = context.start(
        answer.head["id"],
        prompts,
        params,
        request_options(body, request),
        arrival,
        prompt_param="prompt",
        max_param=max_param,
        clamp=body.max_tokens is None,
    )
    try:
        await answer.read_echoes()
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


def _params(body: CompletionRequest) -> tuple[SamplingParams, str]:
    """The engine's parameters, and what ``max_tokens`` is called in errors. The engine makes one
    token at least: when only the prompt is wanted, it is thrown away."""
    given, name = body.max_tokens, "max_tokens"
    if body.only_prompt:
        given, name = 1, "max_tokens 0 with echo"
    elif given is None:
        given = DEFAULT_MAX_TOKENS
    scores = [body.prompt_logprobs, body.logprobs if body.scores_prompt else None]
    params = sampling_params(
        body,
        max_tokens=given,
        logprobs=body.logprobs,
        prompt_logprobs=max((k for k in scores if k is not None), default=None),
    )
    return params, name


class _Answer:
    """Builds the JSON of one completion request."""

    def __init__(
        self, context: AppContext, body: CompletionRequest, prompts: list[list[int]], n: int
    ) -> None:
        self._context = context
        self._body = body
        self._n = n
        self._tokens = 0
        self._prompts = [_Prompt(ids, held=[] if body.scores_prompt else None) for ids in prompts]
        self._choices = [_Choice(prompt) for prompt in self._prompts for _ in range(n)]
        self.head: dict[str, Any] = {
            "id": new_id("cmpl"),
            "object": "text_completion",
            "created": now(),
            "model": context.model_name(),
        }

    async def read_echoes(self) -> None:
        """With ``echo``, note each prompt's text; of token ids, what they spell."""
        if not self._body.echo:
            return
        for prompt, item in zip(self._prompts, self._body.prompt, strict=True):
            if isinstance(item, str):
                prompt.text = item
            else:
                prompt.text = await self._context.codec.decode(prompt.ids)
        for choice in self._choices:
            choice.offset = len(choice.prompt.text)

    async def collect(self, generation: Generation) -> dict[str, Any]:
        """The whole answer. Closes the generation on every way out."""
        try:
            async for job, delta in generation.deltas():
                delta = self._take(job, delta)
                choice = self._choices[job * self._n + delta.index]
                choice.text.append(delta.text)
                choice.logprobs.extend(delta.logprobs or ())
                choice.last = delta
        finally:
            await generation.close()
        choices = []
        for job, prompt in enumerate(self._prompts):
            echo, scores = await self._echo(prompt), await self._prompt_entries(prompt)
            for index in range(job * self._n, (job + 1) * self._n):
                choices.append(self._whole(index, echo) | scores)
        return self.head | {"choices": choices, "usage": self._usage()}

    def opening(self) -> list[dict[str, Any]]:
        """The prompts, with ``echo``, unless their log-probabilities come first."""
        if self._body.scores_prompt:
            return []
        texts = [(index, choice.prompt.text) for index, choice in enumerate(self._choices)]
        return [self._chunk([self._choice(index, text, None)]) for index, text in texts if text]

    def chunks_of(self, job: int, delta: Delta) -> Iterator[dict[str, Any]]:
        """The chunks of one delta: none while its text is held back. They are made as they are
        sent, since those of a long prompt with its log-probabilities are many."""
        ready = [self._take(job, delta)]
        prompt = self._prompts[job]
        if prompt.held is not None:
            prompt.held += ready
            if not prompt.logprobs:
                return
            ready, prompt.held = prompt.held, None
            for index in range(job * self._n, (job + 1) * self._n):
                for text, scores in self._echo_blocks(prompt):
                    yield self._chunk([self._choice(index, text, scores)])
        for part in ready:
            if part.text or part.logprobs or part.finish_reason:
                index = job * self._n + part.index
                block = self._block(self._choices[index], part.logprobs or ())
                yield self._chunk([self._choice(index, part.text, block, part)])

    def closing(self) -> list[dict[str, Any]]:
        """The usage chunk, if asked for."""
        return [self._chunk([], self._usage())] if self._body.include_usage else []

    def _take(self, job: int, delta: Delta) -> Delta:
        """Count a delta and keep what it says of the prompt; the delta as the client gets it."""
        if delta.finish_reason == "error":
            raise engine_failure()
        prompt = self._prompts[job]
        prompt.cached_tokens += delta.cached_tokens or 0
        prompt.logprobs = delta.prompt_logprobs or prompt.logprobs
        wanted = self._body.scores_prompt or self._body.prompt_logprobs is not None
        if wanted and delta.index == 0 and len(prompt.logprobs) != len(prompt.ids):
            raise engine_failure()
        if self._body.only_prompt:
            reason = "length" if delta.finish_reason == "stop" else delta.finish_reason
            delta = Delta(delta.request_id, finish_reason=reason, index=delta.index)
        self._tokens += len(delta.token_ids)
        return delta

    def _echo_blocks(self, prompt: _Prompt) -> Iterator[tuple[str, dict[str, Any]]]:
        texts, top = self._context.texts, self._body.logprobs or 0
        return echo_blocks(prompt.ids, prompt.logprobs, prompt.text, texts, top)

    async def _echo(self, prompt: _Prompt) -> dict[str, list[Any]]:
        """The logprobs of an echoed prompt, all pieces joined; nothing unless asked for."""
        whole: dict[str, list[Any]] = {}
        if self._body.scores_prompt:
            for _, block in self._echo_blocks(prompt):
                for key, values in block.items():
                    whole.setdefault(key, []).extend(values)
                await asyncio.sleep(0)  # let other requests go on
        return whole

    async def _prompt_entries(self, prompt: _Prompt) -> dict[str, Any]:
        top = self._body.prompt_logprobs
        if top is None:
            return {}
        entries = await prompt_entries(prompt.logprobs, self._context.texts, top)
        return {"prompt_logprobs": entries}

    def _whole(self, index: int, echo: dict[str, list[Any]]) -> dict[str, Any]:
        choice = self._choices[index]
        block = self._block(choice, choice.logprobs)
        if block is not None:
            block = {key: echo.get(key, []) + values for key, values in block.items()}
        text = choice.prompt.text + "".join(choice.text)
        return self._choice(index, text, block, choice.last)

    def _block(self, choice: _Choice, logprobs: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if self._body.logprobs is None:
            return None
        block, choice.offset = legacy_block(
            logprobs, self._context.texts, self._body.logprobs, choice.offset
        )
        return block

    def _choice(
        self, index: int, text: str, block: dict[str, Any] | None, last: Delta | None = None
    ) -> dict[str, Any]:
        return {
            "index": index,
            "text": text,
            "logprobs": block,
            "finish_reason": last.finish_reason if last else None,
            "stop_reason": last.stop_reason if last else None,
        }

    def _chunk(
        self, choices: list[dict[str, Any]], counts: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        chunk = self.head | {"choices": choices}
        return chunk | {"usage": counts} if self._body.include_usage else chunk

    def _usage(self) -> dict[str, Any]:
        return usage(
            sum(len(prompt.ids) for prompt in self._prompts),
            self._tokens,
            sum(prompt.cached_tokens for prompt in self._prompts),
        )
