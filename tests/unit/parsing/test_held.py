"""Text that is held back: all of it, in little more memory than its characters."""

from __future__ import annotations

import tracemalloc
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_cp.parsing.calls import MAX_CALLS
from ds_cp.parsing.held import BYTES, HeldText
from ds_cp.parsing.history import read_calls
from ds_cp.parsing.registry import TOOL_FAMILIES, make_parser
from tests.unit.parsing.answers import TOOLS, events_of, parsed, read


@given(st.lists(st.text("aé\U0001f600", max_size=5), max_size=300), st.integers(1, 200))
def test_pieces_are_one_text(pieces: list[str], most: int) -> None:
    held, bounded = HeldText(), HeldText(most)
    for piece in pieces:
        held.append(piece)
        bounded.append(piece)
    whole = "".join(pieces)
    assert held.chars == len(whole) and bool(held) == bool(whole)
    kept = bounded.chars
    end = bounded.take()
    assert len(end) == kept and whole.endswith(end) and kept >= min(most, len(whole))
    assert kept <= most + 64 * 5 * 2  # what is not one piece yet, and one that is cut
    assert held.take() == whole and not held and held.take() == ""


@pytest.mark.parametrize("char", ["a", "é", "\u4e2d", "\U0001f600"])
def test_a_character_takes_what_it_is_charged(char: str) -> None:
    held = HeldText()
    tracemalloc.start()
    try:
        for number in range(20_000):  # tokens, each a string of its own
            held.append(char * (2 + number % 3))
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert taken <= 1.15 * BYTES * held.chars + 16_384


PARALLEL = [name for name, family in TOOL_FAMILIES.items() if family.format.parallel]


@pytest.mark.parametrize("tool", [*PARALLEL, "harmony"])
def test_an_answer_has_as_many_calls_as_can_be_sent_back(tool: str) -> None:
    """What would be one more is content, with all that follows."""
    form = TOOL_FAMILIES[tool].format
    calls: list[Any] = [("get_weather", {"city": f"c{i}"}) for i in range(MAX_CALLS + 3)]
    if tool == "harmony":
        text = "<|start|>assistant".join(form.render([call]) for call in calls)
    else:
        text = form.render(calls)
    found = parsed(text, tool)
    assert found.calls == calls[:MAX_CALLS]
    for number in range(3):
        assert f"c{MAX_CALLS + number}" in found.content, "text is lost"
    pieces = [text[at : at + 7] for at in range(0, len(text), 7)]
    assert read(events_of(make_parser(tool, None, TOOLS), pieces)) == found
    back = [
        {"id": id_, "function": {"name": name, "arguments": arguments}}
        for id_, name, arguments in zip(found.ids, found.names, found.arguments, strict=True)
    ]
    assert len(read_calls(back, "tool_calls")) == MAX_CALLS


CUT = [
    ("<parameter=city>\nParis\n</function>\n</tool_call>", "Paris"),
    ("<parameter=city>\nParis\n</function>", "Paris"),
    ("<parameter=city>\nParis</tool_call>\n", "Paris"),
    ("<parameter=city>\nParis\n</function>\n<function=get_time>\n</function></tool_call>", "Paris"),
    ("<parameter=city>\na</function>b\n</parameter>\n</function>\n</tool_call>", "a</function>b"),
    (
        "<parameter=city>\n</function> </tool_cal\n</parameter>\n</function>\n</tool_call>",
        "</function> </tool_cal",
    ),
    (
        f"<parameter=city>\n</function>{' ' * 65}</tool_call>\n</parameter>\n</function>",
        f"</function>{' ' * 65}</tool_call>",
    ),
]


@pytest.mark.parametrize(("text", "city"), CUT)
def test_an_argument_without_its_end_ends_with_its_call(text: str, city: str) -> None:
    """But not where the end of a call is text of an argument that goes on."""
    text = f"<tool_call>\n<function=get_weather>\n{text}"
    found = parsed(text, "qwen3_coder")
    assert found.calls[0] == ("get_weather", {"city": city})
    assert len(found.calls) == 1 + ("get_time" in text) and found.content == ""
    for size in (1, 3):
        pieces = [text[at : at + size] for at in range(0, len(text), size)]
        assert parsed(text, "qwen3_coder", pieces=pieces) == found
