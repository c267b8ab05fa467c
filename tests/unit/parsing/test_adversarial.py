"""Texts that are made to hurt: time stays linear in the text, and memory bounded."""

from __future__ import annotations

import time

import pytest

from ds_cp.parsing.calls import MAX_HELD
from ds_cp.parsing.formats import TaggedArguments
from ds_cp.parsing.registry import REASONING_FAMILIES, TOOL_FAMILIES, make_parser
from tests.unit.parsing.answers import SCHEMAS, TOOLS, events_of, read

HALF_MB = 1 << 19
# Seconds of computing for that much in one piece: 0.05 to 0.6 here. Quadratic time takes 25.
WHOLE_S = 8.0


def filled(unit: str, chars: int) -> str:
    return (unit * (chars // len(unit) + 1))[:chars]


def attacks(tool: str, chars: int) -> dict[str, str]:
    """Texts of about ``chars`` characters."""
    form = TOOL_FAMILIES[tool].format
    begin = form.triggers[0] if form.triggers else "{"
    opened = form.begin + form.before_arguments("get_weather")
    found = {
        "beginnings": filled(begin, chars),
        "half a mark": filled(begin[:-1] or "```", chars),
        "calls": filled(form.render([("get_weather", {"city": "x"})]) + "\n", chars),
        "white space": begin + " " * chars,
        "braces": begin + "{" * chars,
        "lists": opened + '{"a": ' + "[" * chars,
        "escapes": opened + '{"city": "' + filled('\\"', chars),
        "numbers": opened + '{"a": [' + filled("1,", chars),
        "arguments first": begin + '{"arguments": {"city": "' + "y" * chars,
        "a long name": form.begin + form.before_name + "x" * chars,
        "ends": filled(form.after_arguments or form.end or "]", chars),
        "<": "<" * chars,
    }
    if isinstance(kind := form.arguments, TaggedArguments):
        tagged = opened + kind.before_key
        found |= {
            "a held value": tagged + "where" + kind.after_key + "{" * chars,
            "half an end": tagged + "city" + kind.after_key + filled(kind.after_value[:-1], chars),
            "a long key": tagged + "k" * chars,
            "keys": opened + filled(f"{kind.before_key}k{kind.after_key}{kind.after_value}", chars),
        }
    return found


def seconds(tool: str, text: str, size: int) -> float:
    """Seconds of computing to read a text in pieces of ``size`` characters."""
    parser = make_parser(tool, "think", TOOLS)
    start = time.process_time()
    for at in range(0, len(text), size):
        parser.feed(text[at : at + size])
    parser.finish()
    return time.process_time() - start


@pytest.mark.usefixtures("settled_heap")
@pytest.mark.parametrize("tool", TOOL_FAMILIES)
def test_time_is_linear_in_pieces(tool: str) -> None:
    few, many = attacks(tool, 800), attacks(tool, 6_400)
    for name in few:
        short = min(seconds(tool, few[name], 4) for _ in range(2))
        long = seconds(tool, many[name], 4)
        assert long < 25 * short + 0.05, name  # 8 times as long; quadratic: 64


@pytest.mark.usefixtures("settled_heap")
@pytest.mark.parametrize("tool", ["hermes", "qwen3_coder", "gemma4"])
def test_half_a_megabyte_at_once(tool: str) -> None:
    texts = attacks(tool, HALF_MB)
    names = ["calls", "escapes", "<"]
    assert max(seconds(tool, texts[name], 1 << 30) for name in names) < WHOLE_S


@pytest.mark.parametrize("tool", TOOL_FAMILIES)
def test_what_is_held_back_is_bounded_and_given_up_at_the_same_place(tool: str) -> None:
    chars = MAX_HELD + 5_000
    texts = attacks(tool, chars)
    names = {"arguments first", "white space", "a held value"} & set(texts)
    for name in names:
        text = texts[name] + TOOL_FAMILIES[tool].format.render([("get_weather", {"city": "x"})])
        parser = make_parser(tool, None, TOOLS)
        given = 0
        events = []
        for at in range(0, len(text), 1000):
            new = parser.feed(text[at : at + 1000])
            events += new
            given += sum(len(getattr(event, "text", "")) for event in new)
            # A tag or a name may count as given without being text.
            if name != "white space":
                assert at - given < MAX_HELD + 2000, name
        read([*events, *parser.finish()])
        whole = events_of(make_parser(tool, None, TOOLS), [text])
        pieces = [text[at : at + 777] for at in range(0, len(text), 777)]
        assert events_of(make_parser(tool, None, TOOLS), pieces) == whole


@pytest.mark.usefixtures("settled_heap")
@pytest.mark.parametrize("reasoning", REASONING_FAMILIES)
def test_reasoning_that_has_no_end(reasoning: str) -> None:
    form = REASONING_FAMILIES[reasoning].format
    for unit in (form.end[:-1], " ", form.begin, "word "):
        parser = make_parser(None, reasoning, TOOLS)
        start = time.process_time()
        text = form.begin + filled(unit, HALF_MB // 8)
        for at in range(0, len(text), 64):
            parser.feed(text[at : at + 64])
        parser.finish()
        assert time.process_time() - start < WHOLE_S


def test_the_schemas_of_the_tests_are_of_the_tools() -> None:
    assert set(SCHEMAS) == set(TOOLS.schemas)
