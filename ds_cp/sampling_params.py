"""How a caller asks for tokens, with vLLM's field names. No torch here."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

from ds_cp.errors import RequestError
from ds_cp.grammar.constraint import FIELD, StructuredOutputsParams, as_params

MAX_LOGPROBS = 20  # alternatives a token
MAX_STOPS = 16  # stop strings of one request
MAX_STOP_CHARS = 256  # characters of one stop string
MAX_LOGIT_BIAS = 300  # token ids with a bias, and stop token ids, of one request
MAX_N = 64  # answers to one prompt
MAX_SALT_CHARS = 256  # characters of a cache salt
MAX_INT32 = 2**31 - 1  # largest value of an integer field without another bound
# Lowest and highest value, both allowed.
_INTEGERS = {"n": (1, MAX_N), "top_k": (-1, MAX_INT32), "min_tokens": (0, MAX_INT32)}
_OPTIONAL_INTEGERS = {
    "seed": (-(2**63), 2**63 - 1),
    "max_tokens": (1, MAX_INT32),
    "logprobs": (0, MAX_LOGPROBS),
    "prompt_logprobs": (0, MAX_LOGPROBS),
}
_NUMBERS = {
    "temperature": ("at least", 0.0, 2.0),
    "top_p": ("above", 0.0, 1.0),
    "min_p": ("at least", 0.0, 1.0),
    "presence_penalty": ("at least", -2.0, 2.0),
    "frequency_penalty": ("at least", -2.0, 2.0),
    "repetition_penalty": ("above", 0.0, 10.0),
}
_TOKEN_ID = re.compile(r"[0-9]{1,10}", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to choose tokens for one request.

    Each field holds exactly the type that it declares: integers given for numbers, numpy's scalars,
    lists and the string keys of a JSON ``logit_bias`` are converted here, once. Raises
    ``RequestError`` naming the field when a value is of another kind or out of range.

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
    min_tokens: at least this many new tokens before an end: until then neither an end token nor a
        stop string counts.
    ignore_eos: the model's own end tokens are tokens as any other.
    logprobs: k, 0 to 20, returns each chosen token's log-probability and the k most likely ones
        (natural log, of the logits with ``logit_bias``, before penalties and filters; under
        ``structured_outputs`` of the tokens that the grammar allows, as vLLM: fewer than k where it
        allows fewer).
    prompt_logprobs: the same for each token of the prompt but the first, of the plain logits.
    presence_penalty: -2 to 2, subtracted from the logit of each token that the answer has already.
    frequency_penalty: -2 to 2, the same once for each time the answer has it.
    repetition_penalty: above 0, at most 10. The logit of each token that the prompt or the answer
        has already is divided by it when positive, else multiplied; 1 for none.
    logit_bias: is added to the logits, -100 to 100, by token id, before the penalties.
    skip_special_tokens: leave them out of the text.
    kept_special_tokens: the server's own: ids that are text all the same, as a parser needs them.
    structured_outputs: what the answer must look like (``StructuredOutputsParams``, or its fields
        as a mapping). The model's end tokens and ``stop_token_ids`` may come only where the answer
        is complete; ``max_tokens`` may still cut it. Excludes ``min_tokens`` and ``ignore_eos``,
        which say where an answer must not end.
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
    kept_special_tokens: frozenset[int] = frozenset()
    structured_outputs: StructuredOutputsParams | None = None

    def __post_init__(self) -> None:
        # The one place where values are converted: from here on a field holds exactly the type that
        # it declares, whichever way the request came.
        for name, (low, high) in _INTEGERS.items():
            self._set(name, _integer(name, getattr(self, name), low, high))
        for name, (low, high) in _OPTIONAL_INTEGERS.items():
            if getattr(self, name) is not None:
                self._set(name, _integer(name, getattr(self, name), low, high))
        for name, (edge, least, most) in _NUMBERS.items():
            self._set(name, _number(name, getattr(self, name), edge, least, most))
        for name in ("ignore_eos", "skip_special_tokens"):
            self._set(name, _boolean(name, getattr(self, name)))
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(
                f"min_tokens is {self.min_tokens}, above max_tokens {self.max_tokens}",
                "min_tokens",
            )
        self._set("stop", _stops(self.stop))
        ids = _members("stop_token_ids", self.stop_token_ids, "ids", MAX_LOGIT_BIAS)
        self._set(
            "stop_token_ids", tuple(_integer("stop_token_ids", id_, 0, MAX_INT32) for id_ in ids)
        )
        name = "kept_special_tokens"
        kept = _members(name, getattr(self, name), "ids", MAX_LOGIT_BIAS)
        self._set(name, frozenset(_integer(name, id_, 0, MAX_INT32) for id_ in kept))
        self._set("logit_bias", _biases(self.logit_bias))
        self._set(FIELD, as_params(self.structured_outputs))
        if self.structured_outputs is not None:
            for name in ("min_tokens", "ignore_eos"):
                if getattr(self, name):
                    raise RequestError(
                        f"{name} cannot be kept under {self.structured_outputs.asked_as}, "
                        "whose grammar says where an answer ends; leave it out",
                        name,
                    )

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)  # the dataclass is frozen


def _number(name: str, value: object, edge: str, low: float, high: float) -> float:
    """A real number of any type, numpy's included, as a float. ``edge`` "above": not ``low``."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise RequestError(f"{name} must be a finite number, not {_shown(value)}", name)
    try:
        number = float(value)
    except OverflowError:  # an integer beyond every float, of either sign
        number = math.inf
    shown = _shown(value if isinstance(value, int) else number)
    if not math.isfinite(number) and not isinstance(value, int):
        raise RequestError(f"{name} must be a finite number, not {shown}", name)
    if not low <= number <= high or (edge == "above" and number == low):
        raise RequestError(f"{name} is {shown}; it must be {edge} {low} and at most {high}", name)
    return number


def _integer(name: str, value: object, low: int, high: int) -> int:
    """An integer of any type, numpy's included, as an int."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise RequestError(f"{name} must be an integer, not {_shown(value)}", name)
    number = int(value)
    if not low <= number <= high:
        raise RequestError(f"{name} is {_shown(number)}; it must be from {low} to {high}", name)
    return number


def _boolean(name: str, value: object) -> bool:
    """A bool, or numpy's."""
    if isinstance(value, bool):
        return value
    if getattr(value, "dtype", None) == "bool" and getattr(value, "ndim", None) == 0:
        return bool(value)
    raise RequestError(f"{name} must be true or false, not {_shown(value)}", name)


def _stops(given: object) -> tuple[str, ...]:
    texts = _members("stop", (given,) if isinstance(given, str) else given, "strings", MAX_STOPS)
    for text in texts:
        if not isinstance(text, str) or not 1 <= len(text) <= MAX_STOP_CHARS:
            raise RequestError(
                f"stop strings must be 1 to {MAX_STOP_CHARS} characters long", "stop"
            )
    return tuple(str(text) for text in texts)


def _biases(given: object) -> dict[int, float]:
    """``logit_bias`` with the ids of JSON, whose keys are strings, as integers."""
    wrong = "logit_bias must be an object from token ids to numbers"
    if given is not None and not isinstance(given, Mapping):
        raise RequestError(f"{wrong}, not {_shown(given)}", "logit_bias")
    biases: dict[int, float] = {}
    for key in _members("logit_bias", given, "entries", MAX_LOGIT_BIAS):
        assert given is not None
        if isinstance(key, str) and not _TOKEN_ID.fullmatch(key):
            raise RequestError(f"{wrong}; {_shown(key)} is not a token id", "logit_bias")
        token = _integer("logit_bias", int(key) if isinstance(key, str) else key, 0, MAX_INT32)
        if token in biases:
            raise RequestError(f"logit_bias has token id {token} twice", "logit_bias")
        biases[token] = _number("logit_bias", given[key], "at least", -100.0, 100.0)
    return biases


def _members(name: str, value: object, things: str, most: int) -> tuple[Any, ...]:
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


@dataclass(frozen=True)
class KnownAnswer:
    """One answer as far as it came before a restart; with a ``finish_reason`` it had ended."""

    token_ids: tuple[int, ...] = ()
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass(frozen=True, kw_only=True)
class RequestOptions:
    """What a request says besides its prompt and sampling.

    ``priority``: lower numbers are served first; of equals the older. ``cache_salt``: requests
    share cached prefixes only with those of the same salt; ``http_id``: of the HTTP request that it
    is part of, for logs; ``client``: who sends it, clients of one priority have equal shares;
    ``resumable``: its name in the journal, "" where it is in none; ``known``: its answers, where it
    goes on after a restart: their tokens count as drawn, and no delta has them again.
    Raises ``RequestError`` naming the field when a value is of another kind or out of range.
    """

    priority: int = 0
    cache_salt: str = ""
    http_id: str = field(default="", compare=False)
    client: str = field(default="", compare=False)
    resumable: str = field(default="", compare=False)
    known: tuple[KnownAnswer, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        priority = _integer("priority", self.priority, -(2**31), MAX_INT32)
        object.__setattr__(self, "priority", priority)
        if not isinstance(self.cache_salt, str) or len(self.cache_salt) > MAX_SALT_CHARS:
            raise RequestError(
                f"cache_salt must be a string of at most {MAX_SALT_CHARS} characters", "cache_salt"
            )

    @property
    def num_ended(self) -> int:
        """Its answers that had ended before a restart."""
        return sum(one.finish_reason is not None for one in self.known)
