"""POST /v1/completions."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from time import monotonic
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from ds_cp.api.context import AppContext, request_options, sampling_params
from ds_cp.api.logprobs import echo_blocks, legacy_block
from ds_cp.api.protocol import CompletionRequest
from ds_cp.api.respond import Answer, Json, ending, respond
from ds_cp.outputs import Delta, TokenLogprob
from ds_cp.sampling_params import SamplingParams

DEFAULT_MAX_TOKENS = 16  # new tokens, as in OpenAI's API


async def completions(context: AppContext, body: CompletionRequest, request: Request) -> Response:
    """Answer a completion request, whole or as a stream."""
    arrival = monotonic()
    context.check(body.model)
    params = _params(body)
    prompts = [
        await context.codec.encode(item) if isinstance(item, str) else item for item in body.prompt
    ]
    answer = _CompletionAnswer(context, body, prompts, params.n)
    generation = context.start(
        answer.id,
        prompts,
        params,
        request_options(body, request),
        arrival,
        prompt_param="prompt",
        max_words="max_tokens 0 with echo" if body.only_prompt else "",
        clamp=body.max_tokens is None,
    )
    return await respond(context, request, answer, generation, stream=bool(body.stream))


def _params(body: CompletionRequest) -> SamplingParams:
    """The engine's parameters. It generates at least one token: where only the prompt is wanted,
    the answer drops it."""
    given = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    scores = [body.prompt_logprobs, body.logprobs if body.scores_prompt else None]
    return sampling_params(
        body,
        max_tokens=1 if body.only_prompt else given,
        logprobs=body.logprobs,
        prompt_logprobs=max((k for k in scores if k is not None), default=None),
    )


class _CompletionAnswer(Answer):
    """The JSON of one completion request: ``n`` choices for each prompt."""

    id_prefix = "cmpl"
    whole_kind = chunk_kind = "text_completion"

    def __init__(
        self, context: AppContext, body: CompletionRequest, prompts: list[list[int]], n: int
    ) -> None:
        super().__init__(context, body, prompts, n)
        self._body = body
        self._echoes = [""] * len(prompts)  # the text that the choices of a prompt begin with
        # Deltas of a stream that must wait for the log-probabilities of their prompt.
        self._held: list[list[Delta] | None] = [[] if body.scores_prompt else None for _ in prompts]

    async def prepare(self) -> None:
        """With ``echo``, find each prompt's text; for token ids, what they spell."""
        if not self._body.echo:
            return
        for index, item in enumerate(self._body.prompt):
            text = item if isinstance(item, str) else await self.context.codec.decode(item)
            self._echoes[index] = text

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Also with ``echo`` and ``logprobs``."""
        return self._body.scores_prompt or super().wants_prompt_logprobs

    def shown(self, delta: Delta) -> Delta:
        """Nothing but the end of an answer that has only the prompt."""
        if not self._body.only_prompt:
            return delta
        reason = "length" if delta.finish_reason == "stop" else delta.finish_reason
        return Delta(delta.request_id, finish_reason=reason, index=delta.index)

    async def whole(self) -> Json:
        """The choices, each with the log-probabilities of its prompt where asked for."""
        choices = []
        for index, prompt in enumerate(self.prompts):
            echo, scores = await self._echo_logprobs(index), await self.prompt_logprobs(prompt)
            choices += [self._finished(choice, echo) | scores for choice in self._choices_of(index)]
        return {"choices": choices}

    def opening(self) -> list[Json]:
        """The prompts, with ``echo``, unless their log-probabilities come first."""
        if self._body.scores_prompt or not self._body.echo:
            return []
        return [
            self._chunk(choice, text, None)
            for index, text in enumerate(self._echoes)
            for choice in self._choices_of(index)
            if text
        ]

    def chunks_of(self, prompt: int, delta: Delta) -> Iterator[Json]:
        """The chunks of one delta, made as they are sent: those of a long prompt with its
        log-probabilities are many."""
        ready, held = [self.take(prompt, delta)], self._held[prompt]
        if held is not None:
            held += ready
            if not self.prompts[prompt].logprobs:
                return
            ready, self._held[prompt] = held, None
            for choice in self._choices_of(prompt):
                for text, block in self._echo_blocks(prompt):
                    yield self._chunk(choice, text, block)
        for part in ready:
            if part.text or part.logprobs or part.finish_reason:
                choice = prompt * self.n + part.index
                block_of_part = self._block(choice, part.logprobs or ())
                yield self._chunk(choice, part.text, block_of_part, part)

    def _choices_of(self, prompt: int) -> range:
        return range(prompt * self.n, (prompt + 1) * self.n)

    def _echo_blocks(self, prompt: int) -> Iterator[tuple[str, Json]]:
        ids, logprobs = self.prompts[prompt].ids, self.prompts[prompt].logprobs
        top = self._body.logprobs or 0
        return echo_blocks(ids, logprobs, self._echoes[prompt], self.context.texts, top)

    async def _echo_logprobs(self, prompt: int) -> dict[str, list[Any]]:
        """The logprobs of an echoed prompt, all pieces joined; nothing unless asked for."""
        joined: dict[str, list[Any]] = {}
        if self._body.scores_prompt:
            for _, block in self._echo_blocks(prompt):
                for key, values in block.items():
                    joined.setdefault(key, []).extend(values)
                await asyncio.sleep(0)  # let other requests go on
        return joined

    def _finished(self, index: int, echo: dict[str, list[Any]]) -> Json:
        choice = self.choices[index]
        block = self._block(index, choice.logprobs)
        if block is not None:
            block = {key: echo.get(key, []) + values for key, values in block.items()}
        text = self._echoes[index // self.n] + "".join(choice.text)
        return self._choice(index, text, block, choice.last)

    def _block(self, choice: int, logprobs: Sequence[TokenLogprob]) -> Json | None:
        if self._body.logprobs is None:
            return None
        begins = len(self._echoes[choice // self.n])
        return legacy_block(logprobs, self.context.texts, self._body.logprobs, begins)

    def _chunk(self, choice: int, text: str, block: Json | None, last: Delta | None = None) -> Json:
        return self.chunk([self._choice(choice, text, block, last)])

    def _choice(self, index: int, text: str, block: Json | None, last: Delta | None) -> Json:
        return {"index": index, "text": text, "logprobs": block} | ending(last)
