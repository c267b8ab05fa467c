"""Log-probabilities in OpenAI's two shapes, and the text of a single token."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any

from ds_cp.api.answers.json_pieces import items_of
from ds_cp.engine.interface import EngineInterface
from ds_cp.outputs import TokenLogprob

LOWEST = -9999.0  # stands for -infinity, which JSON does not have
CHAT_ENTRY_BYTES = 320  # of memory that an entry of ``chat_entries``, or of its top, takes
PIECE = 512  # log-probabilities of a prompt in one chunk of a stream: about a millisecond of work
_SLICE = 64  # log-probabilities of a prompt that are encoded at once in a whole answer
BLOCK_LISTS = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
_CACHED_PIECES = 65536  # tokens whose text is cached
_NEAR = 16  # bytes that a tokenizer's normalization may have dropped before a token


class TokenTexts:
    """The text and the bytes of single tokens of an engine's tokenizer."""

    def __init__(self, engine: EngineInterface) -> None:
        self._engine = engine  # asked late: a starting engine may have no tokenizer yet
        self._piece = lru_cache(_CACHED_PIECES)(self._look_up)

    def piece(self, token_id: int) -> tuple[str, bytes]:
        """Text and UTF-8 bytes of one token; the bytes may be a part of a character."""
        return self._piece(token_id)

    def label(self, token_id: int) -> str:
        """A text that differs between tokens: part of a character is ``bytes:\\xe2``."""
        text, data = self.piece(token_id)
        if "\ufffd" not in text:
            return text
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def _look_up(self, token_id: int) -> tuple[str, bytes]:
        tokenizer = self._engine.tokenizer
        raw = tokenizer.convert_ids_to_tokens(token_id)
        if raw is None:  # a row of the head beyond the tokenizer's vocabulary
            return "", b""
        text = tokenizer.decode(
            [token_id], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        if raw.startswith("\u2581") and not text.startswith(" "):
            text = " " + text  # sentencepiece decoders drop the blank of a first word
        return text, text.encode() if "\ufffd" not in text else _bytes_of(raw)


def chat_entries(
    logprobs: Sequence[TokenLogprob], texts: TokenTexts, top: int
) -> list[dict[str, Any]]:
    """Entries of ``choices[].logprobs.content`` of a chat completion."""
    return [
        _chat_entry(item.token_id, item.logprob, texts)
        | {
            "top_logprobs": [
                _chat_entry(token_id, logprob, texts) for token_id, logprob in item.top[:top]
            ]
        }
        for item in logprobs
    ]


def legacy_block(
    logprobs: Sequence[TokenLogprob], texts: TokenTexts, top: int, offset: int
) -> dict[str, Any]:
    """``choices[].logprobs`` of a completion whose new text begins at character ``offset``.

    The chosen token is always among ``top_logprobs``, so there are up to ``top`` + 1 entries.
    """
    ids = [item.token_id for item in logprobs]
    offsets = [offset + item.text_offset for item in logprobs]
    return _legacy(ids, logprobs, offsets, texts, top)


def echo_blocks(
    ids: Sequence[int],
    logprobs: Sequence[TokenLogprob | None],
    text: str,
    texts: TokenTexts,
    top: int,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """A prompt's text and ``choices[].logprobs``, in pieces of ``PIECE`` log-probabilities. ``ids``
    and ``logprobs`` are of the same length; the first token has none."""
    walk = _Walk(text)
    for part in _parts(len(ids), top, PIECE):
        begun = walk.offset
        offsets = [walk.step(texts.piece(token_id)[1]) for token_id in ids[part]]
        end = walk.offset if part.stop < len(ids) else len(text)
        yield text[begun:end], _legacy(ids[part], logprobs[part], offsets, texts, top)


def echo_lists(
    ids: Sequence[int],
    logprobs: Sequence[TokenLogprob | None],
    text: str,
    texts: TokenTexts,
    top: int,
) -> dict[str, Iterator[bytes]]:
    """The same as ``echo_blocks`` for ``json_array``: the items of each of the ``BLOCK_LISTS``."""
    walk = _Walk(text)
    columns: dict[str, Callable[[slice], list[Any]]] = {
        "tokens": lambda part: _labels(ids[part], texts),
        "token_logprobs": lambda part: _chosen(logprobs[part]),
        "top_logprobs": lambda part: _tops(logprobs[part], texts, top),
        "text_offset": lambda part: [walk.step(texts.piece(each)[1]) for each in ids[part]],
    }

    def items(column: Callable[[slice], list[Any]]) -> Iterator[bytes]:
        return (items_of(column(part)) for part in _parts(len(ids), top, _SLICE))

    return {name: items(columns[name]) for name in BLOCK_LISTS}


def prompt_items(
    logprobs: Sequence[TokenLogprob | None], texts: TokenTexts, top: int
) -> Iterator[bytes]:
    """vLLM's ``prompt_logprobs`` for ``json_array``: per token, by token id, the token itself
    first. ``rank`` counts from 1; it is null for a token that is not among the ``top`` ones."""
    for part in _parts(len(logprobs), top, _SLICE):
        items = logprobs[part]
        yield items_of([None if it is None else _prompt_entry(it, texts, top) for it in items])


def _parts(tokens: int, top: int, entries: int) -> Iterator[slice]:
    """Slices of so many tokens that have ``entries`` log-probabilities, one at least."""
    step = max(1, entries // (top + 1))
    return (slice(start, start + step) for start in range(0, tokens, step))


def _prompt_entry(item: TokenLogprob, texts: TokenTexts, top: int) -> dict[str, dict[str, Any]]:
    best = item.top[:top]
    ranks = {token_id: rank for rank, (token_id, _) in enumerate(best, 1)}
    return {
        str(token_id): {
            "logprob": _finite(logprob),
            "rank": ranks.get(token_id),
            "decoded_token": texts.piece(token_id)[0],
        }
        for token_id, logprob in ({item.token_id: item.logprob} | dict(best)).items()
    }


def _legacy(
    ids: Sequence[int],
    logprobs: Sequence[TokenLogprob | None],
    offsets: list[int],
    texts: TokenTexts,
    top: int,
) -> dict[str, Any]:
    return {
        "tokens": _labels(ids, texts),
        "token_logprobs": _chosen(logprobs),
        "top_logprobs": _tops(logprobs, texts, top),
        "text_offset": offsets,
    }


def _labels(ids: Sequence[int], texts: TokenTexts) -> list[str]:
    return [texts.label(token_id) for token_id in ids]


def _chosen(logprobs: Sequence[TokenLogprob | None]) -> list[float | None]:
    return [None if item is None else _finite(item.logprob) for item in logprobs]


def _tops(
    logprobs: Sequence[TokenLogprob | None], texts: TokenTexts, top: int
) -> list[dict[str, float] | None]:
    return [
        None
        if item is None
        else {texts.label(token_id): _finite(logprob) for token_id, logprob in item.top[:top]}
        | {texts.label(item.token_id): _finite(item.logprob)}
        for item in logprobs
    ]


class _Walk:
    """Finds tokens, one after the other, in the text that they spell.

    ``offset``: characters before the next token. A token that the text does not have, such as one
    that begins every prompt of a model, has no width.
    """

    def __init__(self, text: str) -> None:
        self._data = text.encode()
        self._at = 0
        self.offset = 0

    def step(self, token: bytes) -> int:
        """The offset where a token begins."""
        begun, bare = self.offset, token.removeprefix(b" ")
        if self._data.startswith(token, self._at):
            end = self._at + len(token)
        elif bare and self._data.startswith(bare, self._at):  # the blank of a first word is added
            end = self._at + len(bare)
        else:
            found = self._data.find(token, self._at, self._at + len(token) + _NEAR)
            end = self._at if found < 0 else found + len(token)
        self.offset += sum(byte & 0xC0 != 0x80 for byte in self._data[self._at : end])
        self._at = end
        return begun


def _chat_entry(token_id: int, logprob: float, texts: TokenTexts) -> dict[str, Any]:
    text, data = texts.piece(token_id)
    return {"token": text, "logprob": _finite(logprob), "bytes": list(data)}


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST)


def _bytes_of(raw: str) -> bytes:
    """Bytes of a token that is no whole text: byte-level BPE's alphabet, or ``<0xE2>``."""
    if match := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", raw):
        return bytes([int(match[1], 16)])
    alphabet = _byte_alphabet()
    if all(char in alphabet for char in raw):
        return bytes(alphabet[char] for char in raw)
    return raw.encode()


@lru_cache(1)
def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in of every byte: itself if printable, else the next from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    rest = [byte for byte in range(256) if byte not in set(printable)]
    return table | {chr(0x100 + index): byte for index, byte in enumerate(rest)}
