"""Log-probabilities in OpenAI's two shapes, and the text of a single token."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from ds_cp.engine.handle import EngineHandle
from ds_cp.engine.params import TokenLogprob

LOWEST = -9999.0  # JSON has no infinity
_CACHED_PIECES = 65536


class TokenTexts:
    """The text and the bytes of single tokens of an engine's tokenizer."""

    def __init__(self, engine: EngineHandle) -> None:
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
) -> tuple[dict[str, Any], int]:
    """``choices[].logprobs`` of a completion, and the text offset after it (characters).

    The chosen token is always among ``top_logprobs``, so there are up to ``top`` + 1 entries.
    """
    offsets = []
    for item in logprobs:
        offsets.append(offset)
        offset += len(texts.piece(item.token_id)[0])
    block = {
        "tokens": [texts.label(item.token_id) for item in logprobs],
        "token_logprobs": [_finite(item.logprob) for item in logprobs],
        "top_logprobs": [
            {texts.label(token_id): _finite(logprob) for token_id, logprob in item.top[:top]}
            | {texts.label(item.token_id): _finite(item.logprob)}
            for item in logprobs
        ],
        "text_offset": offsets,
    }
    return block, offset


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
