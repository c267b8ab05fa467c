"""What all routes share: the engine, the text codec, the metrics, and the checks of a request."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from starlette.requests import Request

from ds_cp.api.answers.budget import (
    DELTA_BYTES,
    ENTRY_BYTES,
    PACKED_BYTES,
    PACKED_TOKEN_BYTES,
    REQUEST_BYTES,
    TEXT_BYTES,
    Held,
)
from ds_cp.api.answers.generation import Generation, Job, in_client_names
from ds_cp.api.answers.logprobs import TokenTexts
from ds_cp.api.answers.paced import Turns
from ds_cp.api.chat.style import ChatStyles
from ds_cp.api.errors import ApiError, context_overflow, not_ready
from ds_cp.api.metrics import ServerMetrics
from ds_cp.api.requests.engine_fields import EngineFields
from ds_cp.api.requests.protocol import SamplingRequest
from ds_cp.api.requests.sampling import params_of
from ds_cp.api.tokenization import TextCodec
from ds_cp.config import Server
from ds_cp.engine.interface import EngineInterface
from ds_cp.errors import RequestError
from ds_cp.sampling_params import RequestOptions, SamplingParams

# Log-probabilities of one answer, one per token, alternative and choice, at most: of the prompts
# and of the new tokens together. A million are 50 to 100 MB of JSON.
MAX_LOGPROBS = 1_000_000
# Tokens of an answer without max_tokens that are reserved: few have more. What it has beyond is
# charged as it waits, and keeps out new requests, not this one.
OPEN_TOKENS = 1024
# Fields that the engine has by the same name.
_COPIED = (
    "n temperature top_p top_k min_p seed stop stop_token_ids min_tokens ignore_eos logit_bias "
    "skip_special_tokens presence_penalty frequency_penalty repetition_penalty"
).split()


@dataclass(frozen=True)
class AppContext:
    """The parts of one application. The engine's info and tokenizer are read once it is ready."""

    engine: EngineInterface
    server: Server
    metrics: ServerMetrics
    codec: TextCodec
    texts: TokenTexts
    turns: Turns
    styles: ChatStyles

    def model_names(self) -> tuple[str, ...]:
        """The names under which the model is served, one at least."""
        return self.server.model_names or (self.engine.info.model,)

    def model_name(self, asked: str | None = None) -> str:
        """The name that an answer gives: the one that its request ``asked`` for, else the first."""
        return self.model_names()[0] if asked is None else asked

    def check_ready(self) -> None:
        """Raises ``ApiError`` 503 while the engine is starting, stopping or dead. Requests wait for
        a stalled one, which may go on, and for ranks that meet again."""
        state = self.engine.state
        if state not in ("ready", "recovering", "stalled"):
            raise not_ready(state)

    def check(self, model: str | None) -> None:
        """Raises ``ApiError`` 503 when the engine is not ready, 404 for another model's name."""
        self.check_ready()
        names = self.model_names()
        if model is not None and model not in names:
            raise ApiError(
                404,
                f"the model {model[:200]!r} does not exist here; this server has "
                + ", ".join(map(repr, names)),
                param="model",
                code="model_not_found",
            )

    def check_ids(self, ids: Collection[int], param: str) -> None:
        """Raises ``RequestError`` for token ids outside the vocabulary."""
        size = self.engine.info.vocab_size
        if not ids or (min(ids) >= 0 and max(ids) < size):
            return
        wrong = next(token_id for token_id in ids if not 0 <= token_id < size)
        raise RequestError(
            f"{param}: token id {str(wrong)[:24]} is outside the vocabulary (0 to {size - 1})",
            param,
        )

    def start(
        self,
        answer_id: str,
        prompts: Sequence[list[int]],
        params: SamplingParams,
        options: RequestOptions,
        arrival: float,
        held: Held,
        *,
        stream: bool,
        prompt_param: str,
        max_param: str = "max_tokens",
        max_words: str = "",
        clamp: bool = False,
    ) -> Generation:
        """Hand the prompts to the engine. ``clamp`` lowers ``max_tokens`` to what fits.
        ``max_param``: the client's field for it; ``max_words``: what a message calls it instead.

        Raises ``ApiError`` 400 (``context_length_exceeded``) when a prompt and its new tokens are
        longer than the model or its log-probabilities too many, ``RequestError`` with the client's
        name of a field for what ``EngineInterface.check`` refuses, ``ApiError`` 503 while other
        requests hold the memory that this one may need (``held`` is charged for it).
        """
        names = {"prompt": prompt_param, "max_tokens": max_param}
        jobs = []
        for index, ids in enumerate(prompts):
            fitting = self.fit(len(ids), params, prompt_param, max_words or max_param, clamp)
            with in_client_names(names):
                self.engine.check(ids, fitting)
            name = f"{options.resumable}/{index}" if options.resumable else ""
            own = replace(options, resumable=name)
            jobs.append(Job(f"{answer_id}-{index}", ids, fitting, own))
        jobs = [self._within_logprobs(job, sum(map(len, prompts)), len(prompts)) for job in jobs]
        new = sum(self._most_new_tokens(job) for job in jobs) * params.n
        self._check_logprobs(sum(map(len, prompts)), new, params, names)
        if params.max_tokens is None:
            new = sum(min(self._most_new_tokens(job), OPEN_TOKENS) for job in jobs) * params.n
        self._reserve(held, sum(map(len, prompts)), new, params, stream)
        return Generation(self.engine, self.metrics, jobs, arrival, names, held)

    def _within_logprobs(self, job: Job, prompt: int, prompts: int) -> Job:
        """A job without ``max_tokens`` gets what fits, in the bound on log-probabilities too."""
        params = job.params
        if params.max_tokens is not None or params.logprobs is None:
            return job
        scored = 0 if params.prompt_logprobs is None else prompt * (params.prompt_logprobs + 1)
        left = MAX_LOGPROBS - scored * params.n
        most = left // ((params.logprobs + 1) * params.n * prompts)
        if not max(params.min_tokens, 1) <= most < self._most_new_tokens(job):
            return job
        return replace(job, params=replace(params, max_tokens=most))

    def _most_new_tokens(self, job: Job) -> int:
        """Tokens of one answer at most."""
        if job.params.max_tokens is not None:
            return job.params.max_tokens
        return max(self.room(len(job.prompt_token_ids)), 1)

    def room(self, prompt: int) -> int:
        """New tokens of one answer to a prompt of so many that the model and the KV cache hold."""
        info = self.engine.info
        return min(info.max_model_len, info.largest_request_tokens + 1) - prompt

    @staticmethod
    def _check_logprobs(
        prompt: int, new: int, params: SamplingParams, names: Mapping[str, str]
    ) -> None:
        """Check the log-probabilities of ``prompt`` and ``new`` tokens, of all answers together."""
        scored, drawn = _logprobs(prompt, new, params)
        count = scored * params.n + drawn
        if count > MAX_LOGPROBS:
            too_long = scored * params.n > MAX_LOGPROBS
            name = names["prompt" if too_long else "max_tokens"]
            raise RequestError(
                f"log-probabilities of {prompt if scored else 0} prompt tokens "
                f"in {params.n} choices and of up to {new if drawn else 0} new tokens "
                f"are {count} entries; at most {MAX_LOGPROBS} per request; "
                + ("shorten the prompt" if too_long else f"lower {name} (or set it)")
                + " or ask for fewer",
                name,
            )

    @staticmethod
    def _reserve(held: Held, prompt: int, new: int, params: SamplingParams, stream: bool) -> None:
        """Charge ``held`` for the log-probabilities of ``prompt`` and ``new`` tokens, of all
        answers together, and for the texts."""
        scored, drawn = _logprobs(prompt, new, params)
        fixed = PACKED_TOKEN_BYTES * prompt + PACKED_BYTES * scored if scored else 0
        if not stream:
            growing = TEXT_BYTES * new + ENTRY_BYTES * drawn
        else:
            each = DELTA_BYTES + (PACKED_TOKEN_BYTES if drawn else 0)
            growing = each * new + PACKED_BYTES * drawn
        held.reserve(REQUEST_BYTES + fixed + growing)
        held.spend(fixed)

    def fit(
        self, prompt: int, params: SamplingParams, prompt_param: str, max_param: str, clamp: bool
    ) -> SamplingParams:
        """``params`` for a prompt of so many tokens; ``clamp`` lowers ``max_tokens`` to what fits.

        Raises ``ApiError`` 400 when both together are longer than the model.
        """
        length = self.engine.info.max_model_len
        room = length - prompt
        least = max(params.min_tokens, 1)
        if params.max_tokens is not None and clamp and least <= room:
            fitting = max(self.room(prompt), least)
            return replace(params, max_tokens=min(params.max_tokens, fitting))
        if params.max_tokens is None or clamp:
            asked, name = least, "min_tokens" if params.min_tokens else max_param
        else:
            asked, name = params.max_tokens, max_param
        if asked > room:
            raise context_overflow(
                overflow_text(length, prompt, asked, prompt_param)
                + f": {name} asks for {asked}, need {prompt + asked}, have {length}; "
                "shorten the prompt" + (f" or lower {name}" if room > 0 else ""),
                prompt_param if room < 1 else name,
            )
        return params


def _logprobs(prompt: int, new: int, params: SamplingParams) -> tuple[int, int]:
    """Log-probabilities of the prompts, and of the new tokens."""
    return (
        0 if params.prompt_logprobs is None else prompt * (params.prompt_logprobs + 1),
        0 if params.logprobs is None else new * (params.logprobs + 1),
    )


def sampling_params(
    body: SamplingRequest,
    *,
    max_tokens: int | None,
    logprobs: int | None,
    prompt_logprobs: int | None,
    names: Mapping[str, str] = {},
) -> SamplingParams:
    """The engine's parameters of a request, by ``params_of``."""
    given: dict[str, Any] = {name: getattr(body, name) for name in _COPIED} | {
        "max_tokens": max_tokens,
        "logprobs": logprobs,
        "prompt_logprobs": prompt_logprobs,
        "structured_outputs": body.constraint,
    }
    return params_of(given, names)


def overflow_text(length: int, prompt: int, new: int, prompt_param: str) -> str:
    """How OpenAI's message for a request that is longer than the model begins: clients look for
    its words. All numbers are tokens."""
    return (
        f"This model's maximum context length is {length} tokens. However, you requested "
        f"{prompt + new} tokens ({prompt} in the {prompt_param}, {new} in the completion). "
        f"Please reduce the length of the {prompt_param} or completion"
    )


def request_options(body: EngineFields, request: Request) -> RequestOptions:
    """Priority and cache salt of a request. Raises ``RequestError``."""
    key_digest = key_digest_of(request)
    return RequestOptions(
        priority=0 if body.priority is None else body.priority,
        cache_salt=engine_salt(key_digest, body.cache_salt or ""),
        http_id=request_id_of(request),
        client=client_of(request),
        resumable=request.scope["state"].get("resumable", ""),  # no client can say this
    )


def engine_salt(key_digest: str | None, cache_salt: str) -> str:
    """The engine's cache salt: requests share prefixes if both API key and ``cache_salt`` agree.

    It is the sha256 (hex) of both, from which neither can be read; "" without either.
    """
    if key_digest is None and not cache_salt:
        return ""
    return hashlib.sha256(json.dumps([key_digest, cache_salt]).encode()).hexdigest()


def request_id_of(request: Request) -> str:
    """The id that ``RequestIds`` gave this request."""
    request_id: str = request.scope["state"]["request_id"]
    return request_id


def client_of(request: Request) -> str:
    """Who gets a share of its own of the engine: an API key, or where none is asked an address."""
    digest = key_digest_of(request)
    if digest is not None:
        return f"key {digest}"
    return f"host {request.client.host}" if request.client is not None else ""


def key_digest_of(request: Request) -> str | None:
    """The digest of the API key that a request was sent with; None where none is asked."""
    digest: str | None = request.scope["state"].get("key_digest")
    return digest
