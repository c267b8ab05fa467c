"""Text of an answer as a continuation of its prompt, over several kinds of tokenizers.

The reference is the decode of prompt and answer together, less the text of the prompt alone. Where
a tokenizer falls back to bytes and the bytes are no text, its decode spoils the characters around
them too; the reference is then Python's own UTF-8 decoder over the tokens' bytes.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ds_cp.engine.detokenize import REPLACEMENT, Detokenizer

WORDS = ["▁The", "▁capital", "▁of", "▁France", "▁is", "▁Paris", ".", "▁a", "▁", "▁▁", "é", "日"]


def _fallback_vocab() -> dict[str, int]:
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *WORDS]
    return {name: number for number, name in enumerate(names)}


def _wrapped(core: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def llama2() -> PreTrainedTokenizerFast:
    """As Llama 2, Mistral 0.1 and TinyLlama: byte fallback, and the first blank is stripped."""
    core = Tokenizer(models.BPE(_fallback_vocab(), [], unk_token="<unk>", byte_fallback=True))
    core.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return _wrapped(core)


def gemma() -> PreTrainedTokenizerFast:
    """As Gemma: byte fallback, and every blank stays."""
    core = Tokenizer(models.BPE(_fallback_vocab(), [], unk_token="<unk>", byte_fallback=True))
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return _wrapped(core)


def metaspace() -> PreTrainedTokenizerFast:
    """As T5 and XLNet: words only, and the first blank is stripped."""
    vocab = {name: number for number, name in enumerate(["<unk>", "<s>", "</s>", *WORDS])}
    core = Tokenizer(models.BPE(vocab, [], unk_token="<unk>"))
    core.decoder = decoders.Metaspace(prepend_scheme="always")
    return _wrapped(core)


def single_bytes() -> PreTrainedTokenizerFast:
    """As GPT-2, without merges: a token a byte."""
    pieces = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    core = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, []))
    core.decoder = decoders.ByteLevel()
    return _wrapped(core)


def no_decoder() -> PreTrainedTokenizerFast:
    """Tokens joined by blanks."""
    vocab = {name: number for number, name in enumerate(["<unk>", "<s>", "</s>", *WORDS])}
    return _wrapped(Tokenizer(models.WordLevel(vocab, unk_token="<unk>")))


KINDS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    kind.__name__: kind for kind in (llama2, gemma, metaspace, single_bytes, no_decoder)
}


@pytest.fixture(scope="module")
def tokenizers(smollm2: Path) -> dict[str, Any]:
    return {name: kind() for name, kind in KINDS.items()} | {
        "smollm2": AutoTokenizer.from_pretrained(smollm2)
    }


def answer(
    tokenizer: Any, prompt: Sequence[int], ids: Sequence[int], skip: bool = True
) -> tuple[str, list[int]]:
    """The joined pieces, and the offset of each token."""
    text = Detokenizer(tokenizer).start(prompt, (), skip)
    pieces, offsets = [], []
    for token in ids:
        offsets.append(text.length)
        pieces.append(text.push(token))
    pieces.append(text.flush())
    assert text.length == len("".join(pieces))
    return "".join(pieces), offsets


def less(whole: str, base: str) -> str:
    """``whole`` without the text before it; a character that began there and is complete only in
    ``whole`` stays."""
    cut = len(base)
    if base.endswith(REPLACEMENT) and len(whole) >= cut and whole[cut - 1] != REPLACEMENT:
        cut -= 1
    return whole[cut:]


def by_bytes(tokenizer: Any, ids: Sequence[int], skip: bool, strip: bool) -> str:
    """Of a tokenizer that falls back to bytes: its tokens' bytes as UTF-8, by Python."""
    special = {0, 1, 2}
    data = b""
    for token in ids:
        name = tokenizer.convert_ids_to_tokens(token)
        if name is None or (skip and token in special):
            continue
        spelled = 3 <= token < 259
        data += bytes([token - 3]) if spelled else name.replace("▁", " ").encode()
    return (data.removeprefix(b" ") if strip else data).decode("utf-8", "replace")


def reference(kind: str, tokenizer: Any, prompt: list[int], ids: list[int], skip: bool) -> str:
    base = tokenizer.decode(prompt, skip_special_tokens=skip)
    whole = tokenizer.decode(prompt + ids, skip_special_tokens=skip)
    if kind in ("llama2", "gemma"):
        ours, theirs = (
            by_bytes(tokenizer, i, skip, kind == "llama2") for i in (prompt + ids, prompt)
        )
        if REPLACEMENT not in whole + base:
            assert (ours, theirs) == (whole, base), "the reference itself"
        return less(ours, theirs)
    return less(whole, base)


# --- the blank after the prompt


@pytest.mark.parametrize("kind", ["llama2", "metaspace", "gemma"])
def test_the_blank_after_the_prompt(tokenizers: dict[str, Any], kind: str) -> None:
    tokenizer = tokenizers[kind]
    ids = tokenizer.convert_tokens_to_ids
    prompt = [1, *ids(["▁The", "▁capital", "▁of", "▁France", "▁is"])]
    assert tokenizer.decode(prompt, skip_special_tokens=True).strip() == "The capital of France is"
    assert answer(tokenizer, prompt, ids(["▁Paris", "."])) == (" Paris.", [0, 6])
    # Without a text before it the answer begins as the tokenizer has it.
    first = "Paris." if kind != "gemma" else " Paris."
    assert answer(tokenizer, [1], ids(["▁Paris", "."]))[0] == first
    assert answer(tokenizer, [], ids(["▁Paris", "."]))[0] == first


def test_a_character_that_begins_in_the_prompt(tokenizers: dict[str, Any]) -> None:
    for kind in ("llama2", "gemma", "single_bytes"):
        tokenizer = tokenizers[kind]
        if kind == "single_bytes":
            euro = tokenizer.convert_tokens_to_ids(["â", "Ĥ", "¬"])
            dot = tokenizer.convert_tokens_to_ids(["."])
        else:
            euro = tokenizer.convert_tokens_to_ids(["<0xE2>", "<0x82>", "<0xAC>"])
            dot = tokenizer.convert_tokens_to_ids(["."])
        assert tokenizer.decode(euro) == "€"
        assert answer(tokenizer, euro[:1], [*euro[1:], *dot])[0] == "€."
        assert answer(tokenizer, euro[:2], [*euro[2:], *dot])[0] == "€."
        assert answer(tokenizer, euro, dot)[0] == "."
        # What the prompt left unfinished is the prompt's.
        assert answer(tokenizer, euro[:2], dot)[0] == "."
        assert answer(tokenizer, [*dot, *euro[:2]], [])[0] == ""


# --- any tokens


@given(st.data())
@pytest.mark.parametrize("kind", [*KINDS, "smollm2"])
def test_any_tokens_continue_any_prompt(
    tokenizers: dict[str, Any], kind: str, data: st.DataObject
) -> None:
    tokenizer = tokenizers[kind]
    top = len(tokenizer) + 2  # the head of a model may have rows beyond the tokenizer's tokens
    some = st.integers(0, top)
    if kind in ("llama2", "gemma"):  # words and bytes alike, and bytes that are text
        some |= st.integers(259, 258 + len(WORDS)) | st.integers(3, 258)
    tokens: st.SearchStrategy[list[int]] = st.lists(some, max_size=40)
    if kind in ("llama2", "gemma", "single_bytes"):
        spelled = st.text("€é🙂x ", max_size=12).map(lambda text: _spell(tokenizer, kind, text))
        tokens |= st.tuples(tokens, spelled, tokens).map(lambda parts: sum(parts, []))
    prompt, ids = data.draw(tokens), data.draw(tokens)
    skip = data.draw(st.booleans())
    got, offsets = answer(tokenizer, prompt, ids, skip)
    assert got == reference(kind, tokenizer, prompt, ids, skip)
    assert offsets == sorted(offsets)


def _spell(tokenizer: Any, kind: str, text: str) -> list[int]:
    alphabet = dict(zip(range(256), _byte_level(), strict=True))
    names = [
        alphabet[byte] if kind == "single_bytes" else f"<0x{byte:02X}>" for byte in text.encode()
    ]
    ids: list[int] = tokenizer.convert_tokens_to_ids(names)
    return ids


def _byte_level() -> list[str]:
    """GPT-2's stand-in of each byte, as published with the model."""
    plain = {*range(33, 127), *range(161, 173), *range(174, 256)}
    rest = iter(range(256, 512))
    return [chr(byte) if byte in plain else chr(next(rest)) for byte in range(256)]


@pytest.mark.parametrize("kind", [*KINDS, "smollm2"])
def test_long_answers(tokenizers: dict[str, Any], kind: str) -> None:
    """Far beyond the window, of random tokens and of the same one again and again."""
    tokenizer, rng = tokenizers[kind], random.Random(5)
    for skip in (True, False):
        for length in (40, 300):
            prompt = [rng.randrange(len(tokenizer)) for _ in range(length)]
            ids = [rng.randrange(len(tokenizer)) for _ in range(length)]
            got, _ = answer(tokenizer, prompt, ids, skip)
            assert got == reference(kind, tokenizer, prompt, ids, skip)
        for token in (0, 2, len(tokenizer) // 2, len(tokenizer) - 1, len(tokenizer) + 1):
            ids = [token] * 100
            got, _ = answer(tokenizer, ids[:3], ids, skip)
            assert got == reference(kind, tokenizer, ids[:3], ids, skip)


# --- the work per token


class Counting:
    """A tokenizer that counts the tokens it decodes."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.decoded = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def decode(self, ids: list[int], **rest: Any) -> str:
        self.decoded += len(ids)
        text: str = self._tokenizer.decode(ids, **rest)
        return text


FLOODS: dict[str, list[str]] = {
    "llama2": ["<0x80>", "<0xE2>", "</s>", "▁", "▁of"],
    "gemma": ["<0x80>", "<0xE2>", "</s>", "▁", "▁of"],
    "metaspace": ["</s>", "▁", "▁of"],
    "single_bytes": [_byte_level()[0x80], _byte_level()[0xE2], "</s>", "Ġ", "a"],
    "no_decoder": ["</s>", "▁", "▁of"],
    "smollm2": [_byte_level()[0xE2], "<|im_end|>", "Ġ", "Ġof"],
}


@pytest.mark.parametrize(
    ("kind", "name"),
    [(kind, name) for kind, names in FLOODS.items() for name in [*names, "unknown", "any"]],
)
def test_the_work_per_token_is_bounded(tokenizers: dict[str, Any], kind: str, name: str) -> None:
    """While text is held back or left out as well: a logit_bias can force any token for ever."""
    tokenizer, rng = Counting(tokenizers[kind]), random.Random(1)
    size = len(tokenizers[kind])
    if name == "any":
        ids = [rng.randrange(size) for _ in range(2000)]
    else:
        token = size + 7 if name == "unknown" else tokenizer.convert_tokens_to_ids(name)
        assert token, "the tokenizer has it"
        ids = [token] * 2000
    text = Detokenizer(tokenizer).start(ids[:100])
    before = tokenizer.decoded
    for token in ids:
        text.push(token)
    assert tokenizer.decoded - before <= 40 * len(ids)


# --- where tokens stand in the text


def test_offsets_of_characters_that_span_tokens(tokenizers: dict[str, Any]) -> None:
    tokenizer = tokenizers["smollm2"]
    ids = tokenizer("🎉 party 🎉 party €5 é日本語 end", add_special_tokens=False)["input_ids"]
    got, offsets = answer(tokenizer, tokenizer("🎉 party")["input_ids"], ids)
    assert got == "🎉 party 🎉 party €5 é日本語 end"
    spans = 0
    for count, (token, offset) in enumerate(zip(ids, offsets, strict=True)):
        piece = tokenizer.decode([token])
        spans += REPLACEMENT in piece
        if REPLACEMENT not in piece:
            assert got.startswith(piece, offset)
        whole = tokenizer.decode(ids[:count])
        assert offset == len(whole) - whole.endswith(REPLACEMENT)
    assert spans >= 6


def test_tokens_without_text_have_no_width(tokenizers: dict[str, Any]) -> None:
    tokenizer = tokenizers["llama2"]
    ids = tokenizer.convert_tokens_to_ids(
        ["▁of", "</s>", "<0xE2>", "<0x82>", "</s>", "<0xAC>", "."]
    )
    assert answer(tokenizer, [], ids) == ("of€.", [0, 2, 2, 2, 2, 2, 3])
