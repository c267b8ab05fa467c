"""Text of streamed tokens: the pieces joined are the decode of all, cut at a stop string."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ds_cp.engine.detokenize import REPLACEMENT, Detokenizer

TEXTS = [
    "plain words, twice: plain words.",
    "Grüße aus Köln — für 3 €",
    "日本語のテキスト、そして漢字",
    "emoji 🙂🙃👩‍👩‍👧‍👦 and flags 🇩🇪🇯🇵",
    "  two spaces, a\ttab and\n\nlines  ",
    "עברית و العربية ไทย",
    "x" * 60,
]


@pytest.fixture(scope="module")
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, so that every character beyond ASCII lies over several tokens."""
    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<end>"]
    core = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>")


@pytest.fixture(scope="module")
def real_tokenizer(smollm2: Path) -> Any:
    return AutoTokenizer.from_pretrained(smollm2)


@pytest.fixture(params=["byte", "real"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(f"{request.param}_tokenizer")


def encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def stream(
    tokenizer: Any,
    ids: list[int],
    stop: tuple[str, ...] = (),
    skip: bool = True,
    min_tokens: int = 0,
) -> tuple[list[str], str | None]:
    """Pieces up to the end or to a stop string, the flush last; and what stopped it. No stop string
    counts before the token number ``min_tokens``."""
    text = Detokenizer(tokenizer).start((), stop, skip)
    pieces = []
    may_stop = True
    for count, token in enumerate(ids, 1):
        may_stop = count >= min_tokens
        pieces.append(text.push(token, may_stop))
        if text.stopped_by is not None:
            break
    pieces.append(text.flush(may_stop))
    assert text.flush() == "", "a second flush has nothing"
    return pieces, text.stopped_by


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_are_the_text(tokenizer: Any, text: str) -> None:
    pieces, stopped = stream(tokenizer, encode(tokenizer, text))
    assert "".join(pieces) == text and stopped is None
    assert not any(REPLACEMENT in piece for piece in pieces)


def test_a_piece_comes_with_its_last_byte(byte_tokenizer: Any) -> None:
    pieces, _ = stream(byte_tokenizer, encode(byte_tokenizer, "a€b🙂"))
    assert pieces == ["a", "", "", "€", "b", "", "", "", "🙂", ""]


def test_flush_gives_the_unfinished_character(byte_tokenizer: Any) -> None:
    ids = encode(byte_tokenizer, "a🙂")[:-1]
    pieces, _ = stream(byte_tokenizer, ids)
    assert "".join(pieces) == byte_tokenizer.decode(ids)
    assert pieces[-1] and set(pieces[-1]) == {REPLACEMENT}


@given(st.data())
def test_any_tokens_join_to_their_decode(byte_tokenizer: Any, data: st.DataObject) -> None:
    """Random text, then a cut anywhere."""
    text = data.draw(st.text(max_size=12))
    ids = encode(byte_tokenizer, text)
    ids = ids[: data.draw(st.integers(0, len(ids)))]
    pieces, _ = stream(byte_tokenizer, ids)
    assert "".join(pieces) == byte_tokenizer.decode(ids)


def test_random_tokens_of_the_real_tokenizer(real_tokenizer: Any) -> None:
    """What a model at a high temperature says: broken bytes, words, special tokens."""
    rng = random.Random(8)
    for skip in (True, False):
        for _ in range(60):
            ids = [rng.randrange(len(real_tokenizer)) for _ in range(25)]
            pieces, _ = stream(real_tokenizer, ids, skip=skip)
            assert "".join(pieces) == real_tokenizer.decode(ids, skip_special_tokens=skip)


def test_special_tokens(byte_tokenizer: Any) -> None:
    end = byte_tokenizer.eos_token_id
    ids = [*encode(byte_tokenizer, "ab"), end, *encode(byte_tokenizer, "c")]
    assert "".join(stream(byte_tokenizer, ids)[0]) == "abc"
    assert "".join(stream(byte_tokenizer, ids, skip=False)[0]) == "ab<end>c"
    for kept, want in ((frozenset({end}), "ab<end>c"), (frozenset({end + 1}), "abc")):
        text = Detokenizer(byte_tokenizer).start((), kept=kept)
        assert "".join([*map(text.push, ids), text.flush()]) == want


# --- stop strings


@pytest.mark.parametrize(
    ("text", "stop", "want", "by"),
    [
        ("one STOP two", ("STOP",), "one ", "STOP"),
        ("one STO two", ("STOP",), "one STO two", None),
        ("aaab", ("aab",), "a", "aab"),  # the hold-back starts again inside itself
        ("xyxyz", ("xyz",), "xy", "xyz"),
        ("ab", ("b", "ab"), "", "ab"),  # the one that begins first, at equal end
        ("abc", ("abc", "ab"), "", "ab"),  # the one that is complete first
        ("abcd", ("bcd", "cd"), "a", "bcd"),
        ("", ("x",), "", None),
        ("x", ("x",), "", "x"),
        ("price €5", ("€",), "price ", "€"),
        ("say 🙂 now", ("🙂 n",), "say ", "🙂 n"),
        ("line\n\nnext", ("\n\n",), "line", "\n\n"),
        ("ends in ST", ("STOP",), "ends in ST", None),  # held back, then flushed
    ],
)
def test_stop_strings(
    byte_tokenizer: Any, text: str, stop: tuple[str, ...], want: str, by: str | None
) -> None:
    pieces, stopped = stream(byte_tokenizer, encode(byte_tokenizer, text), stop)
    assert ("".join(pieces), stopped) == (want, by)


def test_the_end_is_held_back_while_it_may_be_a_stop(byte_tokenizer: Any) -> None:
    pieces, _ = stream(byte_tokenizer, encode(byte_tokenizer, "aSTab"), ("STOP",))
    assert pieces == ["a", "", "", "STa", "b", ""]


@pytest.mark.parametrize("stop", ["words, tw", "e: pl", "ds.", "plain", " words"])
def test_stop_strings_across_real_tokens(real_tokenizer: Any, stop: str) -> None:
    text = TEXTS[0]
    pieces, stopped = stream(real_tokenizer, encode(real_tokenizer, text), (stop,))
    assert ("".join(pieces), stopped) == (text[: text.index(stop)], stop)


@given(
    st.text("ab€", max_size=20),
    st.lists(st.text("ab€", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_stop_strings_like_a_search_character_by_character(
    byte_tokenizer: Any, text: str, stops: list[str]
) -> None:
    """Independent: after each character, does the text so far hold a stop string?"""
    want, by = text, None
    for end in range(1, len(text) + 1):
        found = [(text[:end].index(s), s) for s in stops if s in text[:end]]
        if found:
            at, by = min(found)
            want = text[:at]
            break
    pieces, stopped = stream(byte_tokenizer, encode(byte_tokenizer, text), tuple(stops))
    assert ("".join(pieces), stopped) == (want, by)


def test_nothing_comes_after_a_stop(byte_tokenizer: Any) -> None:
    text = Detokenizer(byte_tokenizer).start((), ("b",), True)
    assert [text.push(t) for t in encode(byte_tokenizer, "abcd")] == ["a", "", "", ""]
    assert text.stopped_by == "b" and text.flush() == ""


# --- not before min_tokens


@pytest.mark.parametrize(
    ("text", "stop", "min_tokens", "want", "by"),
    [
        ("one STOP two", ("STOP",), 8, "one ", "STOP"),  # complete with the first that may stop
        ("one STOP two", ("STOP",), 9, "one STOP two", None),  # complete one token too early
        ("one STOP two STOP", ("STOP",), 9, "one STOP two ", "STOP"),  # the same one, later
        ("one STOP two", ("STOP",), 7, "one ", "STOP"),  # begun before, complete after
        ("aaaa", ("aa",), 3, "a", "aa"),  # overlaps one that came too early
        ("aSTOPSTOP", ("STOP",), 6, "aSTOP", "STOP"),
        ("abxcd", ("ab", "abcd"), 3, "abxcd", None),  # held for the longer one, but "ab" was early
        ("abcd!", ("ab", "abcd"), 3, "", "abcd"),
        ("abab", ("ab", "abcd"), 3, "ab", "ab"),
        ("xab", ("ab",), 99, "xab", None),  # ends before it may stop
        ("€5 €", ("€",), 3, "", "€"),  # whole with its third byte
        ("€5 €", ("€",), 4, "€5 ", "€"),
        ("STOP", ("STOP",), 0, "", "STOP"),
    ],
)
def test_stop_strings_wait_for_min_tokens(
    byte_tokenizer: Any,
    text: str,
    stop: tuple[str, ...],
    min_tokens: int,
    want: str,
    by: str | None,
) -> None:
    """A token is a byte here."""
    ids = encode(byte_tokenizer, text)
    pieces, stopped = stream(byte_tokenizer, ids, stop, min_tokens=min_tokens)
    assert ("".join(pieces), stopped) == (want, by)


def test_what_came_too_early_is_given_out_at_once(byte_tokenizer: Any) -> None:
    """Held back is only what may still become a stop string."""
    ids = encode(byte_tokenizer, "aSTOPbST")
    pieces, stopped = stream(byte_tokenizer, ids, ("STOP",), min_tokens=6)
    assert pieces == ["a", "", "", "", "STOP", "b", "", "", "ST"] and stopped is None


@pytest.mark.parametrize("stop", ["words, tw", "e: pl", "ds.", "plain", " words"])
def test_min_tokens_with_real_tokens(real_tokenizer: Any, stop: str) -> None:
    """The text twice: one place counts when the token that completes it may stop."""
    text = TEXTS[0] * 2
    ids = encode(real_tokenizer, text)
    for min_tokens in range(len(ids) + 2):
        want, by = text, None
        for count in range(max(min_tokens, 1), len(ids) + 1):
            before, now = (real_tokenizer.decode(ids[:n]) for n in (count - 1, count))
            at = now.find(stop, max(0, len(before) - len(stop) + 1))
            if at >= 0:
                want, by = text[:at], stop
                break
        pieces, stopped = stream(real_tokenizer, ids, (stop,), min_tokens=min_tokens)
        assert ("".join(pieces), stopped) == (want, by), min_tokens


@given(
    st.text("ab€", max_size=20),
    st.lists(st.text("ab€", min_size=1, max_size=4), min_size=1, max_size=3),
    st.integers(0, 30),
)
def test_min_tokens_like_a_search_character_by_character(
    byte_tokenizer: Any, text: str, stops: list[str], min_tokens: int
) -> None:
    """Independent: after each character that is not too early, does the text so far end in a stop
    string?"""
    want, by = text, None
    for end in range(1, len(text) + 1):
        found = [(end - len(s), s) for s in stops if text[:end].endswith(s)]
        if found and len(text[:end].encode()) >= min_tokens:
            at, by = min(found)
            want = text[:at]
            break
    ids = encode(byte_tokenizer, text)
    pieces, stopped = stream(byte_tokenizer, ids, tuple(stops), min_tokens=min_tokens)
    assert ("".join(pieces), stopped) == (want, by)
