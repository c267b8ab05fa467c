"""What an engine returns for a request: deltas while it runs, one output at its end. No torch."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import overload

STEPS_FAIL = "steps_fail"  # the ``stop_reason`` of an answer that has ended for that


def prompt_digest(token_ids: Sequence[int]) -> str:
    """By which a prompt is named where it must not be shown: the beginning of the sha256 of its
    token ids, in hex."""
    return hashlib.sha256(",".join(map(str, token_ids)).encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability (natural log) of one token and of the most likely ones, best first.

    ``text_offset``: characters of the answer's text before this token, or before the character that
    it goes on with; 0 for a token of the prompt.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    text_offset: int = 0


class PackedLogprobs(Sequence["TokenLogprob | None"]):
    """Log-probabilities of many tokens; None for one that has none. They are kept packed, in 16
    bytes each and 64 a token, where objects take 120 each: a long prompt has a million."""

    __slots__ = ("_rows",)

    def __init__(self, rows: Sequence[bytes | None] = ()) -> None:
        self._rows = rows  # of ``pack_logprob``

    @classmethod
    def of(cls, items: Iterable[TokenLogprob | None]) -> PackedLogprobs:
        """Pack them one by one."""
        return cls([None if item is None else pack_logprob(item) for item in items])

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, at: int) -> TokenLogprob | None: ...

    @overload
    def __getitem__(self, at: slice) -> list[TokenLogprob | None]: ...

    def __getitem__(self, at: int | slice) -> TokenLogprob | None | list[TokenLogprob | None]:
        if isinstance(at, slice):
            return [_unpack(row) for row in self._rows[at]]
        return _unpack(self._rows[at])

    def __iter__(self) -> Iterator[TokenLogprob | None]:
        return map(_unpack, self._rows)


def pack_logprob(item: TokenLogprob) -> bytes:
    """A row of ``PackedLogprobs``: doubles, which are exact for ids and offsets too."""
    head = (item.token_id, item.text_offset, item.logprob)
    return array("d", chain(head, *item.top)).tobytes()


def _unpack(row: bytes | None) -> TokenLogprob | None:
    if row is None:
        return None
    token_id, text_offset, logprob, *rest = memoryview(row).cast("d").tolist()
    top = tuple(zip(map(int, rest[::2]), rest[1::2], strict=True))
    return TokenLogprob(int(token_id), logprob, top, int(text_offset))


@dataclass(frozen=True, slots=True)
class Delta:
    """What one engine step adds to one request. The last one of each ``index`` carries
    ``finish_reason``.

    ``index``: which of the ``n`` answers. ``cached_tokens``: prompt tokens whose KV was found in
    the prefix cache, in the first delta of index 0. ``prompt_logprobs``: one per prompt token, the
    first None, in the first delta of index 0 when they were asked for.
    """

    request_id: str
    token_ids: tuple[int, ...] = ()
    text: str = ""
    logprobs: tuple[TokenLogprob, ...] | None = None
    finish_reason: str | None = None  # "stop" | "length" | "abort" | "error"
    # The stop token or string that ended it; of an error, the field of the request at fault.
    stop_reason: int | str | None = None
    index: int = 0
    cached_tokens: int | None = None
    prompt_logprobs: Sequence[TokenLogprob | None] | None = None


@dataclass(frozen=True, slots=True)
class PromptProgress:
    """How far a prompt has come before its first token, in tokens. ``cached``: found in the prefix
    cache; ``processed``: those, and what steps have computed or compute now. ``seconds``: since its
    first step was planned."""

    total: int
    cached: int
    processed: int
    seconds: float


@dataclass(frozen=True)
class RequestMetrics:
    """Wall-clock times in seconds since the epoch, and how the request was run."""

    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    finished_time: float | None = None
    modes: tuple[str, ...] = ()  # attention modes used, in order of first use
    num_preemptions: int = 0
    cached_tokens: int = 0  # prompt tokens whose KV was found in the prefix cache


@dataclass(frozen=True)
class EndedRequest:
    """One answer that has ended, for metrics and logs: no text and no token of it.

    ``request_id``: the engine's; ``http_id``: of the HTTP request that it was part of, "" without
    one; ``ranks``: those that held its KV or computed its prompt. Seconds, None for what it did not
    come to: ``queue_s`` up to its first step, ``prefill_s`` from there to its first token,
    ``decode_s`` from there to its last one, ``tpot_s`` the mean between its tokens.
    """

    request_id: str
    index: int
    http_id: str
    finish_reason: str
    prompt_tokens: int
    cached_tokens: int
    new_tokens: int
    preemptions: int
    modes: tuple[str, ...]
    ranks: tuple[int, ...]
    queue_s: float | None
    ttft_s: float | None
    prefill_s: float | None
    decode_s: float | None
    tpot_s: float | None
    e2e_s: float


@dataclass(frozen=True)
class CompletionOutput:
    """One completion of a prompt."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str | None
    stop_reason: int | str | None = None
    logprobs: tuple[TokenLogprob, ...] | None = None


@dataclass(frozen=True)
class RequestOutput:
    """A finished request, as ``engine.generate`` returns it."""

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]
    finished: bool
    metrics: RequestMetrics
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
