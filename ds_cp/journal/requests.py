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


class Piece(msgspec.Struct, frozen=True, array_like=True, omit_defaults=True):
    """A delta: its token, -1 for none, its text and its log-probability."""

    id: int
    text: str = ""
    logprob: _Logprob | None = None


class Tokens(msgspec.Struct, tag="tokens", frozen=True, omit_defaults=True):
    """What came to one answer, delta by delta: usage and parsers depend on where one ends. The
    rest as ``Delta`` has it."""

    index: int
    pieces: tuple[Piece, ...]
    cached: int | None = None
    finish: str | None = None
    stop: int | str | None = None


_Record = Begun | Tokens
_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(_Record).decode


@dataclass
class _Answer:
    """What is known of an answer."""

    pieces: list[Piece] = field(default_factory=list)
    cached: int | None = None
    finish: str | None = None
    stop: int | str | None = None

    def add(self, got: Tokens) -> None:
        self.pieces += got.pieces
        self.cached = got.cached if self.cached is None else self.cached
        self.finish, self.stop = got.finish, got.stop

    @property
    def known(self) -> KnownAnswer:
        ids = tuple(piece.id for piece in self.pieces if piece.id >= 0)
        return KnownAnswer(ids, self.finish, self.stop)


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
        known = tuple(answer.known for answer in answers)
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
    return Tokens(
        index,
        tuple(piece for delta in deltas for piece in _pieces(delta)),
        next((d.cached_tokens for d in deltas if d.cached_tokens is not None), None),
        deltas[-1].finish_reason,
        deltas[-1].stop_reason,
    )


def _pieces(delta: Delta) -> Iterator[Piece]:
    """One for each token; the text is the last one's."""
    if not delta.token_ids:
        yield Piece(-1, delta.text)
        return
    last = len(delta.token_ids) - 1
    for n, token in enumerate(delta.token_ids):
        packed = None
        if delta.logprobs:
            one = delta.logprobs[n]
            packed = (one.token_id, one.logprob, one.top, one.text_offset)
        yield Piece(token, delta.text if n == last else "", packed)


def _deltas(answers: Sequence[_Answer]) -> Iterator[Delta]:
    for index, one in enumerate(answers):
        last = len(one.pieces) - 1
        for n, piece in enumerate(one.pieces):
            ends = n == last
            yield Delta(
                "",
                () if piece.id < 0 else (piece.id,),
                piece.text,
                None if piece.logprob is None else (TokenLogprob(*piece.logprob),),
                one.finish if ends else None,
                one.stop if ends else None,
                index,
                one.cached if n == 0 else None,
            )
