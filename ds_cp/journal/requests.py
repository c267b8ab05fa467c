"""The engine's requests that are resumable: what a restart needs to go on with the same tokens."""

from __future__ import annotations

import secrets
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import msgspec

from ds_cp.journal.file import Change
from ds_cp.journal.format import Kind
from ds_cp.outputs import Delta, TokenLogprob
from ds_cp.sampling_params import KnownAnswer, SamplingParams

PREFIX = "request:"  # of the keys

_Logprob: TypeAlias = tuple[int, float, tuple[tuple[int, float], ...], int]


class Begun(msgspec.Struct, tag="begun", frozen=True):
    """A request: its prompt as 32-bit ids, its parameters as they were asked for (``_plain``), with
    its grammar and its stop strings, and the seed that it has."""

    prompt: bytes
    params: bytes
    seed: int


class Tokens(msgspec.Struct, tag="tokens", frozen=True, omit_defaults=True):
    """What came to one answer. The rest as ``Delta`` has it."""

    index: int
    ids: tuple[int, ...]
    text: str = ""
    logprobs: tuple[_Logprob, ...] | None = None
    cached: int | None = None
    finish: str | None = None
    stop: int | str | None = None


_Record = Begun | Tokens
_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(_Record).decode


@dataclass
class _Answer:
    """What is known of an answer."""

    ids: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    logprobs: list[_Logprob] | None = None
    cached: int | None = None
    finish: str | None = None
    stop: int | str | None = None

    def add(self, got: Tokens) -> None:
        self.ids += got.ids
        self.texts.append(got.text)
        if got.logprobs is not None:
            self.logprobs = [*(self.logprobs or ()), *got.logprobs]
        self.cached = got.cached if self.cached is None else self.cached
        self.finish, self.stop = got.finish, got.stop


@dataclass(frozen=True)
class Resumed:
    """A request that goes on. ``deltas``: what its answers have so far, to be given again;
    ``known``: the same for the engine."""

    prompt: list[int]
    params: SamplingParams
    deltas: tuple[Delta, ...]
    known: tuple[KnownAnswer, ...]


class RequestJournal:
    """Records requests by their key; for one thread, the event loop's.

    What comes to a request is kept up to the next ``flush``, which the caller calls every few
    milliseconds while ``is_dirty``.
    """

    def __init__(
        self, submit: Callable[[Sequence[Change]], None], found: Mapping[str, Sequence[bytes]]
    ) -> None:
        """``found``: what a journal holds of requests, by key."""
        self._submit = submit
        self._found = dict(found)
        self._open: dict[str, set[str]] = {}  # keys that are in the journal, by their group
        for key in found:
            self._open.setdefault(group_of(key), set()).add(key)
        self._news: dict[str, dict[int, list[Delta]]] = {}

    @property
    def is_dirty(self) -> bool:
        """Whether something waits for ``flush``."""
        return bool(self._news)

    @property
    def groups(self) -> list[str]:
        """The groups of which something is in the journal."""
        return list(self._open)

    def resume(self, name: str, params: SamplingParams) -> Resumed | None:
        """What a journal that was found has of a request, until something comes to it. None where
        it has nothing, or had other parameters for it."""
        data = self._found.get(PREFIX + name)
        if data is None:
            return None
        try:
            begun, *news = map(_decode, data)
        except ValueError:  # of a version that wrote other records
            return None
        if not isinstance(begun, Begun) or begun.params != _plain(params):
            return None
        params = replace(params, seed=begun.seed)
        answers = [_Answer() for _ in range(params.n)]
        if params.prompt_logprobs is None:  # these only come with the prompt's computation
            for got in news:
                assert isinstance(got, Tokens)
                answers[got.index].add(got)
        prompt = array("I", begun.prompt).tolist()
        known = tuple(KnownAnswer(tuple(a.ids), a.finish, a.stop) for a in answers)
        return Resumed(prompt, params, tuple(_deltas(answers)), known)

    def begin(self, name: str, prompt: Sequence[int], params: SamplingParams) -> SamplingParams:
        """A request begins; its parameters, with a seed."""
        seed = secrets.randbits(62) if params.seed is None else params.seed
        key = PREFIX + name
        record = Begun(array("I", prompt).tobytes(), _plain(params), seed)
        self._open.setdefault(group_of(key), set()).add(key)
        self._news.pop(key, None)
        self._found.pop(key, None)
        self._submit([Change(Kind.PUT, key, _encode(record))])
        return replace(params, seed=seed)

    def record(self, name: str, delta: Delta) -> None:
        """Something came to an answer. An abort is no end: it may go on after a restart."""
        if delta.finish_reason != "abort":
            if self._found:
                self._found.pop(PREFIX + name, None)
            news = self._news.setdefault(PREFIX + name, {})
            news.setdefault(delta.index, []).append(delta)

    def flush(self) -> None:
        """Submit what came since the last time."""
        news, self._news = self._news, {}
        changes = [
            Change(Kind.ADD, key, _encode(_tokens(index, deltas)))
            for key, answers in news.items()
            for index, deltas in answers.items()
        ]
        if changes:
            self._submit(changes)

    def forget(self, group: str) -> list[Change]:
        """The changes that forget all requests of a group, which the caller submits."""
        keys = self._open.pop(group, set())
        for key in keys:
            self._news.pop(key, None)
            self._found.pop(key, None)
        return [Change(Kind.DROP, key) for key in sorted(keys)]


def group_of(key: str) -> str:
    """The group of a request's key: what stands before the number of the prompt."""
    return key.removeprefix(PREFIX).rpartition("/")[0]


def _plain(params: SamplingParams) -> bytes:
    """Parameters as bytes, the same for the same ones."""
    return msgspec.msgpack.encode(msgspec.to_builtins(params, order="sorted"))


def _tokens(index: int, deltas: Sequence[Delta]) -> Tokens:
    scored = [d.logprobs for d in deltas if d.logprobs is not None]
    return Tokens(
        index,
        tuple(token for d in deltas for token in d.token_ids),
        "".join(d.text for d in deltas),
        tuple(_packed(one) for some in scored for one in some) if scored else None,
        next((d.cached_tokens for d in deltas if d.cached_tokens is not None), None),
        deltas[-1].finish_reason,
        deltas[-1].stop_reason,
    )


def _packed(one: TokenLogprob) -> _Logprob:
    return one.token_id, one.logprob, one.top, one.text_offset


def _deltas(answers: Sequence[_Answer]) -> Iterator[Delta]:
    for index, one in enumerate(answers):
        if not one.ids and one.finish is None:
            continue
        logprobs = (
            None if one.logprobs is None else tuple(TokenLogprob(*row) for row in one.logprobs)
        )
        yield Delta(
            "", tuple(one.ids), "".join(one.texts), logprobs, one.finish, one.stop, index,
            one.cached,
        )  # fmt: skip
