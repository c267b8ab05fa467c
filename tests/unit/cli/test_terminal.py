"""What a terminal would act on is shown instead."""

from __future__ import annotations

import unicodedata

from hypothesis import given
from hypothesis import strategies as st

from ds_cp.cli.terminal import harmless

JOINERS = "\u200c\u200d"  # within words and emoji; a terminal does nothing for them


@given(st.text(st.characters(exclude_categories=[]), max_size=200))
def test_nothing_is_left_that_a_terminal_acts_on(text: str) -> None:
    shown = harmless(text)
    for c in shown:
        kind = unicodedata.category(c)
        assert c in "\n\t" or kind != "Cc", repr(c)
        assert kind not in ("Cs", "Zl", "Zp"), repr(c)
        assert unicodedata.bidirectional(c) not in (
            "LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI",
        )  # fmt: skip
    assert harmless(shown) == shown
    assert len(shown) == len(text.replace("\r", ""))
    assert shown.count("\n") == text.count("\n")


def test_plain_text_is_as_it_was() -> None:
    for text in (
        "two\nlines\tand a tab",
        "grüße, 你好, नमस्ते",
        "a👩‍👩‍👧b",
        f"x{JOINERS}y",
        "\u00a0\u3000",
    ):
        assert harmless(text) == text


def test_what_is_shown() -> None:
    assert harmless("\x1b[31mred\x07") == "\u241b[31mred\u2407"
    assert harmless("\x9b2J \x7f") == "\ufffd2J \u2421"
    assert harmless("a\r\nb\rc") == "a\nbc"
    assert harmless("pay\u202eload\ud800") == "pay\ufffdload\ufffd"
    assert harmless("\x1b]52;c;aGk=\x07") == "\u241b]52;c;aGk=\u2407"  # the clipboard
