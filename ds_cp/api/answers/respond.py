"""What all routes that generate share: take deltas, answer whole or as a stream of events.

An ``Answer`` builds what is sent; its subclasses say how it looks in their protocol. A whole answer
is encoded as its deltas come, and sent in pieces.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from ds_cp.api.answers.budget import Held, held_by
from ds_cp.api.answers.generation import Generation, unless_disconnected
from ds_cp.api.answers.paced import PacedJson
from ds_cp.api.answers.sse import OPENAI, EventStream, Framing, stream_events
from ds_cp.api.answers.timings import Timings
from ds_cp.api.context import AppContext, request_id_of
from ds_cp.api.errors import ApiError
from ds_cp.grammar.constraint import StructuredOutputsParams
from ds_cp.outputs import STEPS_FAIL, Delta, PromptProgress, TokenLogprob, prompt_digest
from ds_cp.sampling_params import SamplingParams

ADMISSION_S = 1.0  # seconds that a stream waits for the engine's refusal before it answers 200
CLIENT_LEFT = 499  # the status of an answer whose client has disconnected

Json = dict[str, Any]


@dataclass
class Prompt:
    """One prompt, and what the engine has reported about it."""

    ids: list[int]
    cached_tokens: int = 0  # of the prefix cache
    logprobs: Sequence[TokenLogprob | None] = ()  # one per token once they are known


class Answer(ABC):
    """Builds what is sent for one request. The engine's answer i to prompt p is choice
    ``p * n + i``. ``params``: the engine's."""

    framing: Framing = OPENAI

    def __init__(
        self, context: AppContext, prompts: Sequence[list[int]], params: SamplingParams
    ) -> None:
        self.context = context
        self.n = params.n
        self.prompts = [Prompt(ids) for ids in prompts]
        self.completion_tokens = 0
        self.timings: Timings | None = None  # of the request, where the client asks for them
        self.shows_progress = False  # whether ``of_progress`` has events
        self._params = params

    # --- what the subclasses say

    async def prepare(self) -> None:
        """Read what the answer begins with. Called once the request is checked, before a delta."""
        return None

    def shown(self, delta: Delta) -> Delta:
        """The part of a delta that the client gets."""
        return delta

    @abstractmethod
    def record(self, prompt: int, delta: Delta) -> int:
        """Add a delta of the prompt with this index to the whole answer; the bytes it takes."""

    @abstractmethod
    def whole(self) -> Iterator[bytes]:
        """The whole answer as JSON in pieces. Called once every delta was taken."""

    @abstractmethod
    def opening(self) -> Iterable[Any]:
        """The events before the first delta, made as they are sent."""

    @abstractmethod
    def chunks_of(self, prompt: int, delta: Delta) -> Iterable[Any]:
        """The events of one delta of the prompt with this index; none while text is held back."""

    @abstractmethod
    def closing(self) -> Iterable[Any]:
        """The events after the last delta."""

    def of_progress(self, progress: PromptProgress) -> Any | None:
        """The event that says how far the prompt has come; None unless the client asked for it."""
        return None

    # --- what they share

    def take(self, prompt: int, delta: Delta) -> Delta:
        """Count a delta of the prompt with this index; returns what the client gets of it.

        Raises ``ApiError`` 500 when the engine failed, or left out the prompt's log-probabilities.
        """
        if self.timings is not None:
            self.timings.take(delta)
        if delta.finish_reason is not None:
            constrained = self._params.structured_outputs is not None
            self.context.metrics.answers.ended(delta, constrained)
        if delta.finish_reason == "error":
            if delta.stop_reason == STEPS_FAIL:
                raise steps_fail(self.prompts[prompt].ids)
            raise engine_failure(self._params.structured_outputs if delta.stop_reason else None)
        state = self.prompts[prompt]
        state.cached_tokens += delta.cached_tokens or 0
        state.logprobs = delta.prompt_logprobs or state.logprobs
        scored = len(state.logprobs) == len(state.ids)
        if self._params.prompt_logprobs is not None and delta.index == 0 and not scored:
            raise engine_failure()
        delta = self.shown(delta)
        self.completion_tokens += len(delta.token_ids)
        return delta

    def times(self) -> Json:
        """``timings`` of the prompts and answers so far, where the client asks for them."""
        if self.timings is None:
            return {}
        prompts = sum(len(prompt.ids) for prompt in self.prompts)
        cached = sum(prompt.cached_tokens for prompt in self.prompts)
        return {"timings": self.timings.shown(prompts, cached, self.completion_tokens)}

    async def collect(self, generation: Generation, held: Held) -> bool:
        """Take all deltas of a whole answer; true. Closes the generation on every way out."""
        try:
            async for prompt, delta in generation.deltas():
                held.spend(self.record(prompt, self.take(prompt, delta)))
        finally:
            await generation.close()
        return True


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
        progress=answer.of_progress if answer.shows_progress else None,
        turns=context.turns,
        keep_alive_s=context.server.keep_alive_s,
        request_id=request_id_of(request),
        framing=answer.framing,
    )
    return EventStream(events, generation, answer.framing)


def steps_fail(prompt: Sequence[int]) -> ApiError:
    """The answer to a request that has stopped the ranks twice. Clients that try again after every
    500 are told not to: it would stop them twice more."""
    return ApiError(
        500,
        "the steps of this request have failed on the ranks, or ended their workers, time and "
        f"again; it was given up, and the others go on (sha256 {prompt_digest(prompt)}; the "
        "server's log has the cause under it)",
        code="request_steps_fail",
        headers={"x-should-retry": "false"},
    )


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
