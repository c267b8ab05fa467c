"""The request bodies of the OpenAI protocol.

A field is served (the models below), harmless (read and dropped), refused by name because it would
change the answer, or unknown (``Notes``); ``foreign_fields`` lists the middle two. A value of an
unsupported field that asks for nothing passes. ``best_of`` must equal ``n``.

From vLLM: ``top_k``, ``min_p``, ``min_tokens``, ``stop_token_ids``, ``ignore_eos``,
``repetition_penalty``, ``skip_special_tokens``, ``prompt_logprobs`` (answered where vLLM has it: in
each choice of a completion, beside the choices of a chat; not in streams), ``priority`` (lower
numbers first) and ``cache_salt`` (requests share cached prefixes only if their salts and API keys
are equal), ``return_token_ids``. ``response_format``, ``structured_outputs`` and ``guided_*`` are
in ``constraints``; what conversations have, in ``chat_body``.
"""

from __future__ import annotations

import re
from itertools import islice
from typing import Any, ClassVar

from pydantic import Field, field_validator, model_validator

from ds_cp.api.errors import FieldError, shown
from ds_cp.api.requests.constraints import ConstrainedRequest
from ds_cp.api.requests.engine_fields import MAX_MODEL_CHARS, EngineFields
from ds_cp.api.requests.foreign_fields import (
    BOTH,
    COMPLETION_ONLY,
    HARMLESS,
    STREAM_OPTIONS,
    Unsupported,
)
from ds_cp.api.requests.messages import plain_text
from ds_cp.api.requests.strict_model import StrictModel
from ds_cp.sampling_params import MAX_LOGIT_BIAS, MAX_N, MAX_STOPS

MAX_PROMPTS = 64  # prompts of one request
MAX_CHOICES = 128  # answers to one request: prompts times n
MAX_IDS = 1 << 24  # token ids of one list; a longer list is longer than any model


class StreamOptions(StrictModel):
    """``include_usage`` adds a last chunk with the token counts; with ``continuous_usage_stats``
    (vLLM's) every chunk has them, as far as they have come."""

    unsupported: ClassVar[dict[str, Unsupported]] = STREAM_OPTIONS
    harmless: ClassVar[frozenset[str]] = HARMLESS["stream_options"]

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class SamplingRequest(EngineFields, ConstrainedRequest):
    """The fields that both kinds of completion share; null means the default."""

    harmless: ClassVar[frozenset[str]] = HARMLESS["body"]

    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, description="new tokens at most")
    min_tokens: int | None = Field(None, description="new tokens before an end is allowed")
    n: int | None = Field(None, description=f"answers per prompt, 1 to {MAX_N}")
    stop: list[str] | None = Field(None, description="a string or a list of strings")
    stop_token_ids: list[int] | None = Field(None, max_length=MAX_LOGIT_BIAS, fail_fast=True)
    ignore_eos: bool | None = None
    logit_bias: dict[str, float] | None = Field(None, description="token id (string) -> bias")
    skip_special_tokens: bool | None = None
    prompt_logprobs: int | None = Field(None, description="of this many tokens per prompt token")
    return_progress: bool | None = Field(
        None, description="events with prompt_progress while the prompt is read; in streams"
    )
    timings_per_token: bool | None = Field(
        None, description="timings in the answer, and in each chunk of a stream"
    )
    return_token_ids: bool | None = Field(
        None, description="also the token ids of the prompt and of the answer"
    )

    @field_validator("stop", mode="plain", json_schema_input_type=str | list[str] | None)
    @classmethod
    def _stop(cls, value: Any) -> list[str] | None:
        texts = [value] if isinstance(value, str) else value
        if texts is None:
            return None
        if isinstance(texts, list) and len(texts) > MAX_STOPS:
            raise FieldError(f"stop has {len(texts)} strings; at most {MAX_STOPS}")
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise FieldError("stop must be a string or a list of strings")
        for text in texts:
            plain_text(text, "stop")
        return texts

    @field_validator("logit_bias", mode="plain", json_schema_input_type=dict[str, float] | None)
    @classmethod
    def _logit_bias(cls, value: Any) -> dict[str, Any] | None:
        """``SamplingParams`` checks and converts the entries, and finds one id spelt twice."""
        if value is None:
            return None
        if not isinstance(value, dict):
            raise FieldError("logit_bias must be an object of token ids and biases")
        if len(value) > MAX_LOGIT_BIAS:
            raise FieldError(f"logit_bias has {len(value)} entries; at most {MAX_LOGIT_BIAS}")
        for key in value:
            if not re.fullmatch(r"[0-9]{1,9}", key):
                raise FieldError(f"logit_bias: {shown(key)} is not a token id")
        return value

    @model_validator(mode="after")
    def _options_of_streams(self) -> SamplingRequest:
        if self.include_usage and not self.stream:
            raise FieldError("stream_options is only allowed with stream true", "stream_options")
        if self.stream and self.prompt_logprobs is not None:
            raise FieldError("prompt_logprobs is not given in streams", "prompt_logprobs")
        return self

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk of token counts."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        """Whether every chunk tells the usage so far; load generators count tokens by it."""
        return self.include_usage and bool(
            self.stream_options and self.stream_options.continuous_usage_stats
        )


class CompletionRequest(SamplingRequest):
    """POST /v1/completions. ``max_tokens`` is 16 unless given, as OpenAI has it; 0 is allowed with
    ``echo``. The answers to prompt p are the choices p * ``n`` to p * ``n`` + ``n`` - 1.
    """

    unsupported: ClassVar[dict[str, Unsupported]] = BOTH | COMPLETION_ONLY

    prompt: list[str | list[int]] = Field(
        description=f"text, token ids, or a list of at most {MAX_PROMPTS} of either"
    )
    best_of: int | None = Field(None, description="the same as n")
    echo: bool | None = Field(
        None, description="start the answer with the prompt, with its logprobs if they are asked"
    )
    logprobs: int | None = Field(None, description="log-probabilities of this many tokens")

    @field_validator(
        "prompt", mode="plain", json_schema_input_type=str | list[str] | list[int] | list[list[int]]
    )
    @classmethod
    def _prompt(cls, value: Any) -> list[str | list[int]]:
        return prompts_of(value)

    @model_validator(mode="after")
    def _number_of_choices(self) -> CompletionRequest:
        n, prompts = 1 if self.n is None else self.n, len(self.prompt)
        if n <= MAX_N and n * prompts > MAX_CHOICES:
            raise FieldError(
                f"n is {n} for {prompts} prompts: {n * prompts} answers; "
                f"at most {MAX_CHOICES} per request",
                "n",
            )
        if self.best_of is not None and self.best_of != n:
            raise FieldError(
                f"best_of is {self.best_of} and n is {n}: "
                "every answer is returned, so best_of must equal n; leave it out",
                "best_of",
            )
        return self

    @property
    def scores_prompt(self) -> bool:
        """Whether the answer has the log-probabilities of the echoed prompt."""
        return bool(self.echo) and self.logprobs is not None

    @property
    def only_prompt(self) -> bool:
        """Whether no new token is wanted, as when a harness asks for a prompt's scores."""
        return bool(self.echo) and self.max_tokens == 0


class DetokenizeRequest(StrictModel):
    """POST /detokenize."""

    model: str | None = Field(None, max_length=MAX_MODEL_CHARS)
    tokens: list[int] = Field(max_length=MAX_IDS)

    @field_validator("tokens", mode="plain", json_schema_input_type=list[int])
    @classmethod
    def _tokens(cls, value: Any) -> list[int]:
        if not _is_ids(value):
            raise FieldError("tokens must be a list of token ids")
        ids: list[int] = value
        return ids


def prompts_of(value: Any) -> list[str | list[int]]:
    """OpenAI's four spellings of ``prompt`` as one list of texts or of token-id lists. Raises
    ``FieldError`` for any other value, an empty prompt, or more than ``MAX_PROMPTS``."""
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list):
        raise FieldError("prompt must be a string, a list of strings, or (lists of) token ids")
    if not value:
        raise FieldError("prompt is empty; send at least one token of text")
    if type(value[0]) is int and _is_ids(value):
        value = [value]
    if len(value) > MAX_PROMPTS:
        raise FieldError(f"prompt has {len(value)} prompts; at most {MAX_PROMPTS} per request")
    if not (all(isinstance(item, str) for item in value) or all(map(_is_ids, value))):
        raise FieldError("prompt must be a string, a list of strings, or (lists of) token ids")
    for item in value:
        if not item:
            raise FieldError("prompt is empty; send at least one token of text")
        if isinstance(item, str):
            plain_text(item, "prompt")
    prompts: list[str | list[int]] = value
    return prompts


def _is_ids(value: Any) -> bool:
    """Whether a value is a list of integers. It is looked at in pieces, each by one call that holds
    up other threads for microseconds, because a prompt may have a million."""
    if not isinstance(value, list):
        return False
    rest = iter(value)
    while kinds := set(map(type, islice(rest, 4096))):
        if kinds != {int}:
            return False
    return True
