"""What both completion routes share: count tokens, answer whole or as a stream of events.

An ``Answer`` builds the JSON; its subclasses say how a choice looks in a whole answer and in a
chunk of a stream. A whole answer is encoded as its deltas come, and sent in pieces.
"""

from __future__ import annotations

import uuid
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from time import time
from typing import Any, ClassVar

from starlette.requests import Request
from starlette.responses import Response

from ds_cp.api.answers.budget import Held, held_by
from ds_cp.api.answers.generation import Generation, unless_disconnected
from ds_cp.api.answers.json_pieces import EncodedList, encode, json_array, json_object
from ds_cp.api.answers.logprobs import prompt_items
from ds_cp.api.answers.paced import PacedJson
from ds_cp.api.answers.sse import EventStream, stream_events
from ds_cp.api.context import AppContext, request_id_of
from ds_cp.api.errors import ApiError
from ds_cp.api.requests.protocol import SamplingRequest
from ds_cp.grammar.constraint import StructuredOutputsParams
from ds_cp.outputs import Delta, TokenLogprob

ADMISSION_S = 1.0  # seconds that a stream waits for the engine's refusal before it answers 200
CLIENT_LEFT = 499  # the status of an answer whose client has disconnected

Json = dict[str, Any]


@dataclass
class Prompt:
    """One prompt, and what the engine has reported about it."""

    ids: list[int]
    cached_tokens: int = 0  # of the prefix cache
    logprobs: Sequence[TokenLogprob | None] = ()  # one per token once they are known


@dataclass
class Choice:
    """One answer to a prompt, as far as it has come; text and log-probabilities are JSON already.

    ``text``: without its quotes. ``lists``: the lists of ``logprobs``, by name.
    """

    prompt: Prompt
    text: bytearray = field(default_factory=bytearray)
    lists: defaultdict[str, EncodedList] = field(default_factory=lambda: defaultdict(EncodedList))
    last: Delta = field(default_factory=lambda: Delta(""))


class Answer(ABC):
    """Builds the JSON of one request. Answer i to prompt p is choice ``p * n + i``."""

    id_prefix: ClassVar[str]
    whole_kind: ClassVar[str]  # ``object`` of a whole answer
    chunk_kind: ClassVar[str]  # ``object`` of a chunk

    def __init__(
        self, context: AppContext, body: SamplingRequest, prompts: Sequence[list[int]], n: int
    ) -> None:
        self.context = context
        self.n = n
        self.id = f"{self.id_prefix}-{uuid.uuid4().hex}"
        self.prompts = [Prompt(ids) for ids in prompts]
        self.choices = [Choice(prompt) for prompt in self.prompts for _ in range(n)]
        self._sampling = body
        self._created = int(time())  # seconds since the epoch
        self._completion_tokens = 0

    # --- what the subclasses say

    async def prepare(self) -> None:
        """Read what the answer begins with. Called once the request is checked, before a delta."""
        return None

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether the engine must score the prompt."""
        return self._sampling.prompt_logprobs is not None

    def shown(self, delta: Delta) -> Delta:
        """The part of a delta that the client gets."""
        return delta

    @abstractmethod
    def logprob_lists(self, choice: int, logprobs: Sequence[TokenLogprob]) -> Mapping[str, Any]:
        """The lists of ``logprobs`` of new tokens, by name; none unless the client asked."""

    @abstractmethod
    def fields(self) -> dict[str, Any]:
        """What a whole answer has: ``choices``, each finished, and what the route adds; as
        ``json_object`` takes them. Called once every delta was taken."""

    @abstractmethod
    def opening(self) -> Iterable[Json]:
        """The chunks before the first delta, made as they are sent."""

    @abstractmethod
    def chunks_of(self, prompt: int, delta: Delta) -> Iterable[Json]:
        """The chunks of one delta of the prompt with this index; none while text is held back."""

    # --- what they share

    def take(self, prompt: int, delta: Delta) -> Delta:
        """Count a delta of the prompt with this index; returns what the client gets of it.

        Raises ``ApiError`` 500 when the engine failed, or left out the prompt's log-probabilities.
        """
        if delta.finish_reason == "error":
            raise engine_failure(self._sampling.constraint if delta.stop_reason else None)
        state = self.prompts[prompt]
        state.cached_tokens += delta.cached_tokens or 0
        state.logprobs = delta.prompt_logprobs or state.logprobs
        scored = len(state.logprobs) == len(state.ids)
        if self.wants_prompt_logprobs and delta.index == 0 and not scored:
            raise engine_failure()
        delta = self.shown(delta)
        self._completion_tokens += len(delta.token_ids)
        return delta

    async def collect(self, generation: Generation, held: Held) -> bool:
        """Take all deltas of a whole answer; true. Closes the generation on every way out."""
        try:
            async for prompt, delta in generation.deltas():
                held.spend(self._record(prompt, self.take(prompt, delta)))
        finally:
            await generation.close()
        return True

    def _record(self, prompt: int, delta: Delta) -> int:
        """Encode what a delta adds to its choice; the bytes that this takes."""
        index = prompt * self.n + delta.index
        choice = self.choices[index]
        text = encode(delta.text)[1:-1]
        choice.text += text
        choice.last = replace(delta, text="", token_ids=(), logprobs=None, prompt_logprobs=None)
        size = len(text)
        if delta.logprobs:
            for name, values in self.logprob_lists(index, delta.logprobs).items():
                size += choice.lists[name].extend(values)
        return size

    def whole(self) -> Iterator[bytes]:
        """The whole answer as JSON in pieces, once it was collected."""
        return json_object(self._head(self.whole_kind) | self.fields() | {"usage": self._usage()})

    def chunk(self, choices: list[Json], usage: Json | None = None) -> Json:
        """One chunk of a stream; it has a usage only where the client asked for one: null, or
        with ``continuous_usage_stats`` what has come so far."""
        chunk = self._head(self.chunk_kind) | {"choices": choices}
        if not self._sampling.include_usage:
            return chunk
        if self._sampling.continuous_usage:
            usage = usage or self._usage()
        return chunk | {"usage": usage}

    def closing(self) -> list[Json]:
        """The chunks after the last delta: the usage, if the client asked for it."""
        return [self.chunk([], self._usage())] if self._sampling.include_usage else []

    def prompt_logprobs(self, prompt: Prompt) -> Json:
        """vLLM's field ``prompt_logprobs``, or nothing when the client did not ask for it."""
        top = self._sampling.prompt_logprobs
        if top is None:
            return {}
        items = prompt_items(prompt.logprobs, self.context.texts, top)
        return {"prompt_logprobs": json_array(items)}

    def _head(self, kind: str) -> Json:
        return {
            "id": self.id,
            "object": kind,
            "created": self._created,
            "model": self.context.model_name(),
        }

    def _usage(self) -> Json:
        """OpenAI's token counts; cached tokens are those found in the prefix cache."""
        tokens = sum(len(prompt.ids) for prompt in self.prompts)
        cached = sum(prompt.cached_tokens for prompt in self.prompts)
        return {
            "prompt_tokens": tokens,
            "completion_tokens": self._completion_tokens,
            "total_tokens": tokens + self._completion_tokens,
            "prompt_tokens_details": {"cached_tokens": cached},
        }


async def respond(
    context: AppContext, request: Request, answer: Answer, generation: Generation, *, stream: bool
) -> Response:
    """The response of a started generation, whole or as a stream of events.

    The generation is closed on every way out: an error, a client that leaves, the end.
    """
    try:
        await answer.prepare()
        if not stream:
            collecting = answer.collect(generation, held_by(request.scope))
            if await unless_disconnected(request.receive, collecting) is None:
                return Response(status_code=CLIENT_LEFT)
            return PacedJson(answer.whole(), context.turns)
        await generation.admitted(ADMISSION_S)
    except BaseException:
        await generation.close()
        raise
    events = stream_events(
        generation,
        opening=answer.opening(),
        chunks_of=answer.chunks_of,
        closing=answer.closing,
        turns=context.turns,
        keep_alive_s=context.server.keep_alive_s,
        request_id=request_id_of(request),
    )
    return EventStream(events, generation)


def ending(last: Delta | None) -> Json:
    """Why a choice ended, from its last delta; both fields are null before that."""
    if last is None:
        return {"finish_reason": None, "stop_reason": None}
    return {"finish_reason": last.finish_reason, "stop_reason": last.stop_reason}


def engine_failure(constraint: StructuredOutputsParams | None = None) -> ApiError:
    """The answer when the engine ends a request with ``error``; where its own ``constraint`` is at
    fault, that is the client's."""
    if constraint is not None:
        return ApiError(
            400,
            f"{constraint.asked_as}: the grammar of this request needed more than one step may "
            "take, or allowed no token; make it simpler",
            param=constraint.asked_as,
            code="grammar_failed",
        )
    return ApiError(500, "the engine could not finish this request", code="engine_error")
