"""POST /v1/completions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from time import monotonic
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from ds_cp.api.answers.budget import ID_BYTES, held_by
from ds_cp.api.answers.json_pieces import (
    EncodedList,
    encode,
    json_array,
    json_integers,
    json_object,
    json_text,
)
from ds_cp.api.answers.logprobs import BLOCK_LISTS, echo_blocks, echo_lists, legacy_block
from ds_cp.api.answers.openai_shape import Envelope, ending, prompt_logprobs, usage_of
from ds_cp.api.answers.respond import Answer, Json, respond
from ds_cp.api.answers.timings import Timings, prompt_progress
from ds_cp.api.context import AppContext, request_options, sampling_params
from ds_cp.api.requests.protocol import CompletionRequest
from ds_cp.outputs import Delta, PromptProgress, TokenLogprob
from ds_cp.sampling_params import SamplingParams

DEFAULT_MAX_TOKENS = 16  # new tokens, as in OpenAI's API
ECHO_CHARS = 16384  # characters of a prompt in one chunk of a stream


async def completions(context: AppContext, body: CompletionRequest, request: Request) -> Response:
    """Answer a completion request, whole or as a stream."""
    arrival = monotonic()
    context.check(body.model)
    params = _params(body)
    held, clamp = held_by(request.scope), body.max_tokens is None
    max_words = "max_tokens 0 with echo" if body.only_prompt else "max_tokens"
    prompts = []
    options = request_options(body, request)
    context.engine.check_room(options, params.n)  # before a prompt is tokenized
    for item in body.prompt:
        if isinstance(item, str):
            ids = await context.codec.encode(item)
            held.take(ID_BYTES * len(ids))
        else:
            ids = item
        context.fit(len(ids), params, "prompt", max_words, clamp)  # before the next one is encoded
        prompts.append(ids)
    answer = _CompletionAnswer(context, body, prompts, params, arrival)
    generation = context.start(
        answer.envelope.id,
        prompts,
        params,
        options,
        arrival,
        held,
        stream=bool(body.stream),
        prompt_param="prompt",
        max_words=max_words,
        clamp=clamp,
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


@dataclass
class _Choice:
    """One answer to a prompt, as far as it has come; text, ids and log-probabilities are JSON
    already. ``text``: without its quotes. ``lists``: the lists of ``logprobs``, by name."""

    prompt: int
    text: bytearray = field(default_factory=bytearray)
    ids: EncodedList = field(default_factory=EncodedList)
    lists: defaultdict[str, EncodedList] = field(default_factory=lambda: defaultdict(EncodedList))
    last: Delta = field(default_factory=lambda: Delta(""))


class _CompletionAnswer(Answer):
    """The JSON of one completion request: ``n`` choices for each prompt."""

    def __init__(
        self,
        context: AppContext,
        body: CompletionRequest,
        prompts: list[list[int]],
        params: SamplingParams,
        arrival: float,
    ) -> None:
        super().__init__(context, prompts, params)
        self.timings = Timings(arrival) if body.timings_per_token else None
        self.shows_progress = bool(body.return_progress)
        self.envelope = Envelope("cmpl", context.model_name(body.model))
        self._body = body
        self._choices = [_Choice(p) for p in range(len(prompts)) for _ in range(self.n)]
        self._told = set[int]()  # prompts whose token ids a stream has given
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

    def of_progress(self, progress: PromptProgress) -> Json:
        """A chunk without choices; of several prompts, the first one that is not read."""
        return self._envelop([]) | {"prompt_progress": prompt_progress(progress)}

    def shown(self, delta: Delta) -> Delta:
        """Nothing but the end of an answer that has only the prompt."""
        if not self._body.only_prompt:
            return delta
        reason = "length" if delta.finish_reason == "stop" else delta.finish_reason
        return Delta(delta.request_id, finish_reason=reason, index=delta.index)

    def record(self, prompt: int, delta: Delta) -> int:
        """Text, ids and the four lists of ``logprobs``."""
        index = prompt * self.n + delta.index
        choice = self._choices[index]
        text = encode(delta.text)[1:-1]
        choice.text += text
        choice.last = replace(delta, text="", token_ids=(), logprobs=None, prompt_logprobs=None)
        size = len(text)
        if self._body.return_token_ids:
            size += choice.ids.extend(delta.token_ids)
        if delta.logprobs:
            for name, values in (self._block(index, delta.logprobs) or {}).items():
                size += choice.lists[name].extend(values)
        return size

    def whole(self) -> Iterator[bytes]:
        """The choices, each with the log-probabilities of its prompt where asked for."""
        choices = json_array(map(self._finished, range(len(self._choices))))
        fields = {"choices": choices, "usage": usage_of(self.prompts, self.completion_tokens)}
        return json_object(self.envelope.head("text_completion") | fields | self.times())

    def opening(self) -> Iterator[Json]:
        """The prompts, with ``echo``, unless their log-probabilities come first."""
        if self._body.scores_prompt or not self._body.echo:
            return
        for index, text in enumerate(self._echoes):
            for choice in self._choices_of(index):
                for start in range(0, len(text), ECHO_CHARS):
                    yield self._chunk(choice, text[start : start + ECHO_CHARS], None)

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
            ids = part.token_ids if self._body.return_token_ids else ()
            if part.text or part.logprobs or part.finish_reason or ids:
                choice = prompt * self.n + part.index
                block_of_part = self._block(choice, part.logprobs or ())
                yield self._chunk(choice, part.text, block_of_part, part)

    def closing(self) -> list[Json]:
        """The token counts, if the client asked for them."""
        if not self._body.include_usage:
            return []
        return [self._envelop([], usage_of(self.prompts, self.completion_tokens))]

    def _choices_of(self, prompt: int) -> range:
        return range(prompt * self.n, (prompt + 1) * self.n)

    def _echo_blocks(self, prompt: int) -> Iterator[tuple[str, Json]]:
        ids, logprobs = self.prompts[prompt].ids, self.prompts[prompt].logprobs
        top = self._body.logprobs or 0
        return echo_blocks(ids, logprobs, self._echoes[prompt], self.context.texts, top)

    def _finished(self, index: int) -> Iterator[bytes]:
        choice = self._choices[index]
        text = json_text(self._echoes[index // self.n], choice.text)
        fields = self._choice(index, text, self._joined(index), choice.last)
        prompt = self.prompts[choice.prompt]
        if self._body.return_token_ids:
            fields["token_ids"] = json_array([choice.ids.items()])
            fields["prompt_token_ids"] = json_integers(prompt.ids)
        scores = prompt_logprobs(prompt, self.context.texts, self._body.prompt_logprobs)
        return json_object(fields | scores)

    def _joined(self, index: int) -> Iterator[bytes] | None:
        """``logprobs`` of a whole choice: the echoed prompt's, then its own."""
        if self._body.logprobs is None:
            return None
        prompt, own = index // self.n, self._choices[index].lists
        echo: dict[str, Iterator[bytes]] = {}
        if self._body.scores_prompt:
            ids, logprobs = self.prompts[prompt].ids, self.prompts[prompt].logprobs
            top = self._body.logprobs
            echo = echo_lists(ids, logprobs, self._echoes[prompt], self.context.texts, top)
        return json_object(
            {key: json_array(chain(echo.get(key, ()), [own[key].items()])) for key in BLOCK_LISTS}
        )

    def _block(self, choice: int, logprobs: Sequence[TokenLogprob]) -> Json | None:
        if self._body.logprobs is None:
            return None
        begins = len(self._echoes[choice // self.n])
        return legacy_block(logprobs, self.context.texts, self._body.logprobs, begins)

    def _chunk(self, choice: int, text: str, block: Json | None, last: Delta | None = None) -> Json:
        fields = self._choice(choice, text, block, last)
        if self._body.return_token_ids and last is not None:
            fields["token_ids"] = list(last.token_ids)
            prompt = choice // self.n
            if prompt not in self._told:
                self._told.add(prompt)
                fields["prompt_token_ids"] = self.prompts[prompt].ids
        return self._envelop([fields])

    def _envelop(self, choices: list[Json], usage: Json | None = None) -> Json:
        chunk = self.envelope.head("text_completion") | {"choices": choices} | self.times()
        if not self._body.include_usage:
            return chunk
        if self._body.continuous_usage:
            usage = usage or usage_of(self.prompts, self.completion_tokens)
        return chunk | {"usage": usage}

    def _choice(self, index: int, text: Any, block: Any, last: Delta | None) -> Json:
        ended = ending() if last is None else ending(last.finish_reason, last.stop_reason)
        return {"index": index, "text": text, "logprobs": block} | ended
