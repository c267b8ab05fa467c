"""Which texts of a user are in a rendering."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_cp.errors import ChatTemplateError
from ds_cp.templates.shape import missing, mostly_there, shaped, texts_of
from tests.helpers.chat_templates import CHATML
from tests.unit.templates.test_chat import opened, render


def users(*texts: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text} for text in texts]


@given(st.lists(st.text(max_size=20), min_size=1, max_size=5))
@settings(max_examples=50)
def test_what_is_printed_is_there(texts: list[str]) -> None:
    said = users(*texts)
    assert missing(said, "".join(f"<{text.strip()}>" for text in texts)) is None
    marks = users(*(f"mark{i}." for i in range(len(texts))))
    for left_out in range(len(texts)):
        rest = "".join(m["content"] for i, m in enumerate(marks) if i != left_out)
        assert missing(marks, rest) == f"mark{left_out}."


def test_each_text_needs_a_place_of_its_own() -> None:
    assert missing(users("hello", "hello"), "<hello>") == "hello"
    assert missing(users("a", "b"), "<b><a>") == "b"
    others = [{"role": "system", "content": "no"}, {"role": "assistant", "content": "no"}]
    assert missing([*others, *users("yes")], "yes") is None


def test_words_may_be_changed_but_not_be_cut_off() -> None:
    assert mostly_there(users("a  b\n\nc"), "a b c")
    assert mostly_there(users("x < 1 && it's"), "x &lt; 1 &amp;&amp; it&#39;s")
    assert not mostly_there(users("one two three four five"), "one two")


@pytest.mark.parametrize(
    ("template", "text", "fine"),
    [
        ("{{ m.content | replace('/no_think', '') }}", "hello /no_think", True),
        ("{{ m.content | e }}", "if x < 1 && y: it's 'fine'", True),
        ("{{ m.content | replace('\n\n', '\n') }}", "one\n\ntwo", True),
        ("{{ m.content | lower }}", "Is ONE More than TWO?", True),
        ("{{ m.content | upper }}", "stra\xdfe, \ufb01ne, one two three four", True),
        ("{{ m.content | title | trim }}", "one  two three four \u0130 \u03a3\u03a3 ", True),
        ("{{ m.content.split() | join(' ') }}", "one  two \t three\n\nfour  ", True),
        ("{{ m.content | wordwrap(20) }}", "one two three four five six", True),
        ("{{ m.content | lower if loop.last else '' }} hi", "Hi", True),
        ("{{ m.content[:20] }}", "one two three four five six seven eight", False),
        ("{% if not loop.last %}{{ m.content }}{% endif %} hi", "hi there", False),
    ],
)
def test_a_changed_text_is_told_from_one_that_is_left_out(
    template: str, text: str, fine: bool
) -> None:
    whole = opened("{% for m in messages %}<{{ m.role }}>" + template + "{% endfor %}")
    if fine:
        assert render(whole, users(text))
    else:
        with pytest.raises(ChatTemplateError, match="leaves out what the user says"):
            render(whole, users(text))


def test_shapes_of_content() -> None:
    two = [{"type": "text", "text": t} for t in ("one", "two")]
    for content, shape, expected in (
        ("one", "text", "one"),
        (two, "text", "one\ntwo"),
        (None, "text", ""),
        ("one", "parts", two[:1]),
        (two, "parts", two),
        (two, "one_part", [{"type": "text", "text": "one\ntwo"}]),
        ("one", "as_sent", "one"),
        (two, "as_sent", two),
        (None, "as_sent", ""),
    ):
        [message] = shaped([{"role": "user", "content": content, "name": "ann"}], {"user": shape})
        assert message == {"role": "user", "content": expected, "name": "ann"}
    assert shaped(users("x"), {}) == users("x")
    assert texts_of(None) == [] and texts_of("a") == ["a"] and texts_of(two) == ["one", "two"]
    assert render(opened(CHATML), users("x")).startswith("<|im_start|>user\nx<|im_end|>")
