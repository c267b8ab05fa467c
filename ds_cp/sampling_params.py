"""How a caller asks for tokens, with vLLM's field names. No torch here."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from ds_cp.errors import RequestError

MAX_LOGPROBS = 20
MAX_STOPS = 16
MAX_STOP_CHARS = 256
MAX_LOGIT_BIAS = 300
MAX_N = 64
MAX_SALT_CHARS = 256


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to choose tokens for one request.

    Raises ``RequestError`` naming the field when a value is out of range.

    n: answers to the prompt, 1 to 64, drawn independently of each other.
    temperature: 0 to 2; 0 is greedy. At most 2 as in OpenAI's API.
    top_k: the k most likely tokens only; 0 or -1 for all.
    top_p: the fewest most likely tokens that have this probability together; above 0, 1 for all.
    min_p: tokens at least this fraction as likely as the best; 0 for all.
    seed: makes a sampled request reproducible whatever the batch, the ranks and the mode.
    stop: strings that end an answer, which stops short of them.
    stop_token_ids: tokens that end an answer, besides the model's own.
    max_tokens: new tokens at most; None means as many as the model length and the KV capacity
        allow.
    min_tokens: no end before this many new tokens.
    ignore_eos: the model's own end tokens are tokens as any other.
    logprobs: k, 0 to 20, returns each chosen token's log-probability and the k most likely ones
        (natural log, of the logits with ``logit_bias``, before penalties and filters).
    prompt_logprobs: the same for each token of the prompt but the first, of the plain logits.
    presence_penalty: -2 to 2, is taken from the logit of each token that the answer has already.
    frequency_penalty: -2 to 2, the same once for each time the answer has it.
    repetition_penalty: above 0, at most 10. The logit of each token that the prompt or the answer
        has already is divided by it when positive, else multiplied; 1 for none.
    logit_bias: is added to the logits, -100 to 100, by token id, before the penalties.
    skip_special_tokens: leave them out of the text.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    max_tokens: int | None = 16
    min_tokens: int = 0
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        _integer("n", self.n, 1, MAX_N)
        _number("temperature", self.temperature, 0.0, 2.0)
        _number("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _number("min_p", self.min_p, 0.0, 1.0)
        _integer("top_k", self.top_k, -1, 2**31 - 1)
        if self.seed is not None:
            _integer("seed", self.seed, -(2**63), 2**63 - 1)
        if self.max_tokens is not None:
            _integer("max_tokens", self.max_tokens, 1, 2**31 - 1)
        _integer("min_tokens", self.min_tokens, 0, 2**31 - 1)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(
                f"min_tokens is {self.min_tokens}, above max_tokens {self.max_tokens}",
                "min_tokens",
            )
        if self.logprobs is not None:
            _integer("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        if self.prompt_logprobs is not None:
            _integer("prompt_logprobs", self.prompt_logprobs, 0, MAX_LOGPROBS)
        _number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _number("repetition_penalty", self.repetition_penalty, 0.0, 10.0, open_low=True)
        _boolean("ignore_eos", self.ignore_eos)
        _boolean("skip_special_tokens", self.skip_special_tokens)
        self._check_stops()
        self._check_bias()

    def _check_stops(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        object.__setattr__(self, "stop", _members("stop", stop, "strings", MAX_STOPS))
        for text in self.stop:
            if not isinstance(text, str) or not 1 <= len(text) <= MAX_STOP_CHARS:
                raise RequestError(
                    f"stop strings must be 1 to {MAX_STOP_CHARS} characters long", "stop"
                )
        ids = _members("stop_token_ids", self.stop_token_ids, "ids", MAX_LOGIT_BIAS)
        object.__setattr__(self, "stop_token_ids", ids)
        for token in ids:
            _integer("stop_token_ids", token, 0, 2**31 - 1)

    def _check_bias(self) -> None:
        given = {} if self.logit_bias is None else self.logit_bias
        if not isinstance(given, Mapping):
            raise RequestError(
                f"logit_bias must map token ids to numbers, not {_shown(given)}", "logit_bias"
            )
        bias = {t: given[t] for t in _members("logit_bias", given, "entries", MAX_LOGIT_BIAS)}
        object.__setattr__(self, "logit_bias", bias)
        for token, value in bias.items():
            _integer("logit_bias", token, 0, 2**31 - 1)
            _number("logit_bias", value, -100.0, 100.0)


def _number(name: str, value: float, low: float, high: float, *, open_low: bool = False) -> None:
    finite = isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))
    if isinstance(value, bool) or not finite:
        raise RequestError(f"{name} must be a finite number, not {_shown(value)}", name)
    if value < low or value > high or (open_low and value == low):
        edge = "above" if open_low else "at least"
        raise RequestError(
            f"{name} is {_shown(value)}; it must be {edge} {low} and at most {high}", name
        )


def _integer(name: str, value: int, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise RequestError(f"{name} must be an integer, not {_shown(value)}", name)
    if not low <= value <= high:
        raise RequestError(f"{name} is {_shown(value)}; it must be from {low} to {high}", name)


def _boolean(name: str, value: bool) -> None:
    if not isinstance(value, bool):
        raise RequestError(f"{name} must be true or false, not {_shown(value)}", name)


def _members(name: str, value: Collection[Any] | None, things: str, most: int) -> tuple[Any, ...]:
    """The members of a collection of at most ``most``; None is an empty one."""
    if value is None:
        return ()
    if not isinstance(value, Collection) or isinstance(value, str | bytes | bytearray):
        raise RequestError(f"{name} must be a list, not {_shown(value)}", name)
    if len(value) > most:
        raise RequestError(f"{name} has {len(value)} {things}; at most {most}", name)
    return tuple(value)


def _shown(value: object) -> str:
    """A refused value in a few characters, whatever it is."""
    if isinstance(value, int) and value.bit_length() > 64:
        return f"an integer of {value.bit_length()} bits"  # thousands of digits have no str()
    if isinstance(value, str):
        return repr(value) if len(value) <= 32 else f"a string of {len(value)} characters"
    if value is None or isinstance(value, bool | int | float):
        return str(value)
    return f"a {type(value).__name__}"


@dataclass(frozen=True, kw_only=True)
class RequestOptions:
    """What a request says besides its prompt and sampling.

    ``priority``: lower numbers are served first; of equals the older. ``cache_salt``: requests
    share cached prefixes only with those of the same salt.
    """

    priority: int = 0
    cache_salt: str = ""

    def __post_init__(self) -> None:
        _integer("priority", self.priority, -(2**31), 2**31 - 1)
        if not isinstance(self.cache_salt, str) or len(self.cache_salt) > MAX_SALT_CHARS:
            raise RequestError(
                f"cache_salt must be a string of at most {MAX_SALT_CHARS} characters", "cache_salt"
            )
