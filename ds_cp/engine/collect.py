"""At the edge of the library: prompts as its callers give them, deltas gathered into outputs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar, cast

from ds_cp.engine.core import EngineCore
from ds_cp.errors import RequestError
from ds_cp.outputs import CompletionOutput, Delta, RequestOutput, TokenLogprob
from ds_cp.sampling_params import RequestOptions, SamplingParams
from ds_cp.scheduler.request import Request

Prompt = str | Sequence[int]
T = TypeVar("T")


@dataclass(frozen=True)
class PromptRequest:
    """One prompt, text or token ids. ``request_id``: any name, unique among those that run."""

    request_id: str
    prompt: Prompt
    params: SamplingParams = field(default_factory=SamplingParams)
    options: RequestOptions = field(default_factory=RequestOptions)


@dataclass(frozen=True)
class RequestFailure:
    """A request that was not acceptable, and why."""

    request_id: str
    error: RequestError


@dataclass(frozen=True)
class ReadyRequest:
    """A request whose prompt is token ids. ``text``: the prompt as it was given, if as text;
    ``grammar``: of ``params.structured_outputs``, once it was checked."""

    request_id: str
    text: str | None
    tokens: list[int]
    params: SamplingParams
    options: RequestOptions
    grammar: str = ""

    @classmethod
    def of(
        cls, request: PromptRequest, text: str | None, tokens: list[int], grammar: str
    ) -> ReadyRequest:
        """A request that was checked."""
        return cls(request.request_id, text, tokens, request.params, request.options, grammar)

    def add_to(self, core: EngineCore) -> list[Request]:
        """Queue it; returns and raises as ``core.add``."""
        return core.add(self.request_id, self.tokens, self.params, self.options, self.grammar)


class OutputCollector:
    """Gathers one request's deltas into its output."""

    def __init__(self, answers: Sequence[Request], prompt: str | None) -> None:
        self._answers = list(answers)
        self._prompt = prompt
        self._deltas: list[list[Delta]] = [[] for _ in answers]
        self._running = len(self._answers)

    @property
    def is_done(self) -> bool:
        """Whether every answer has ended."""
        return self._running == 0

    def add(self, delta: Delta) -> None:
        """One more delta of an answer."""
        self._deltas[delta.index].append(delta)
        self._running -= delta.finish_reason is not None

    def output(self) -> RequestOutput:
        """The output, once ``is_done``."""
        first = self._answers[0]
        return RequestOutput(
            first.request_id, self._prompt, first.prompt,
            tuple(self._completion(request) for request in self._answers),
            True, first.metrics(),
            next((tuple(d.prompt_logprobs) for d in self._deltas[0] if d.prompt_logprobs), None),
        )  # fmt: skip

    def _completion(self, request: Request) -> CompletionOutput:
        deltas = self._deltas[request.index]
        logprobs: list[TokenLogprob] = [each for d in deltas for each in d.logprobs or ()]
        return CompletionOutput(
            index=request.index,
            text="".join(d.text for d in deltas),
            token_ids=tuple(token for d in deltas for token in d.token_ids),
            finish_reason=request.finish_reason,
            stop_reason=request.stop_reason,
            logprobs=tuple(logprobs) if request.params.logprobs is not None else None,
        )


def as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt, or several, as a list."""
    if isinstance(prompts, str) or (prompts and isinstance(prompts[0], int)):
        return [cast(Prompt, prompts)]
    return list(cast(Sequence[Prompt], prompts))


def one_each(given: T | Sequence[T] | None, default: T, count: int, what: str) -> list[T]:
    """``given`` as a list of ``count``, one for each prompt: itself, or one value for all. Raises
    ``RequestError``, naming ``what``, for any other length."""
    if given is None or isinstance(given, type(default)):
        return [default if given is None else given] * count
    listed = list(cast(Sequence[T], given))
    if len(listed) != count:
        raise RequestError(f"{count} prompts but {len(listed)} {what}: give one or as many")
    return listed


def progress_line(total: int) -> Callable[[int], None]:
    """A function that shows on stderr how many of ``total`` requests are done."""

    def show(done: int) -> None:
        end = "\n" if done == total else ""
        print(f"\r{done}/{total} requests", end=end, file=sys.stderr, flush=True)

    return show
