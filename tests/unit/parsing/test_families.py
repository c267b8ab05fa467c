"""Answers of every family: what is found in them, however they are split."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_cp.parsing.calls import NO_OBJECT, NOT_JSON, UNFINISHED
from ds_cp.parsing.formats import QuotedArguments, TaggedArguments
from ds_cp.parsing.registry import (
    REASONING_FAMILIES,
    TOOL_FAMILIES,
    make_parser,
    markers,
)
from ds_cp.parsing.thinking import DEEPSEEK_R1
from tests.unit.parsing.answers import (
    ANSWERS,
    SCHEMAS,
    TOOLS,
    Answer,
    cut,
    events_of,
    parsed,
    read,
)

CUTS = st.lists(st.integers(0, 2000), max_size=12)


@pytest.mark.parametrize("answer", ANSWERS, ids=lambda answer: answer.name)
def test_an_answer_is_read_whole_and_by_character(answer: Answer) -> None:
    for pieces in ([answer.text], list(answer.text)):
        found = parsed(
            answer.text,
            answer.tool,
            answer.reasoning_parser,
            prompt=answer.prompt,
            pieces=pieces,
        )
        assert found.calls == answer.calls
        assert (found.content, found.reasoning) == (answer.content, answer.reasoning)


def test_every_family_has_an_answer() -> None:
    tools = {answer.tool for answer in ANSWERS} | {"mistral_args"}  # the same parser as mistral
    assert tools == set(TOOL_FAMILIES)
    thinking = {answer.reasoning_parser for answer in ANSWERS} - {None}
    assert thinking == set(REASONING_FAMILIES)


@given(st.sampled_from(ANSWERS), CUTS, st.integers(0, 2000), st.integers(0, 2000))
@settings(max_examples=250)
def test_any_split_of_any_part_gives_the_same(
    answer: Answer, places: list[int], a: int, b: int
) -> None:
    low, high = sorted((a % (len(answer.text) + 1), b % (len(answer.text) + 1)))
    for text in (answer.text, answer.text[:high], answer.text[:low] + answer.text[high:]):
        names = answer.tool, answer.reasoning_parser, TOOLS, answer.prompt
        whole = events_of(make_parser(*names), [text])
        assert events_of(make_parser(*names), cut(text, places)) == whole
        read(whole)


def fragments(tool: str) -> st.SearchStrategy[str]:
    """Texts that are made of what the family's calls, and reasoning, are made of."""
    form = TOOL_FAMILIES[tool].format
    calls: list[tuple[str, dict[str, Any]]] = [("get_time", {}), ("get_weather", {"city": "x"})]
    texts = [form.render(calls), form.begin, form.end, form.before_arguments("get_weather")]
    texts += [*form.markers, *form.triggers, form.written(calls[1][1]), form.after_arguments]
    texts += [text[: len(text) // 2] for text in texts]
    texts += [text for f in REASONING_FAMILIES.values() for text in (f.format.begin, f.format.end)]
    return st.one_of(st.sampled_from(texts), st.text('<>|{}[]":,` \n\\/aé0-', max_size=6))


@pytest.mark.parametrize("tool", TOOL_FAMILIES)
def test_broken_answers_are_read_the_same_however_they_are_split(tool: str) -> None:
    @given(
        st.lists(fragments(tool), max_size=8),
        CUTS,
        st.none() | st.sampled_from(sorted(REASONING_FAMILIES)),
    )
    @settings(max_examples=40)
    def check(parts: list[str], places: list[int], reasoning: str | None) -> None:
        text = "".join(parts)
        whole = events_of(make_parser(tool, reasoning, TOOLS), [text])
        assert events_of(make_parser(tool, reasoning, TOOLS), cut(text, places)) == whole
        read(whole)

    check()


VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9)
    | st.text("abé<\"'\\\n{}:,", max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc_", max_size=4), inner,
                                                                max_size=3),
    max_leaves=8,
)  # fmt: skip


@pytest.mark.parametrize("tool", TOOL_FAMILIES)
def test_calls_that_are_written_are_read_back(tool: str) -> None:
    form = TOOL_FAMILIES[tool].format
    arguments = st.fixed_dictionaries(
        {},
        optional={
            "city": st.text("ab é\n<\"'\\{}", max_size=20),
            "days": st.integers(),
            "metric": st.booleans(),
            "share": st.floats(-1e6, 1e6),
            "tags": st.lists(st.text("ab,", max_size=4), max_size=3),
            "where": st.dictionaries(st.text("abc_", min_size=1, max_size=4), VALUES, max_size=3),
        },
    )

    @given(st.lists(st.tuples(st.sampled_from(sorted(SCHEMAS)), arguments), min_size=1, max_size=3))
    @settings(max_examples=30)
    def check(calls: list[tuple[str, dict[str, Any]]]) -> None:
        calls = calls if form.parallel else calls[:1]
        if isinstance(form.arguments, TaggedArguments | QuotedArguments):
            # What a name without a schema is worth is a guess; and Gemma's keys have no quotes.
            calls = [("get_weather", arguments) for _, arguments in calls]
        if isinstance(form.arguments, QuotedArguments) and any(
            "" in json.dumps(arguments).split('"') for _, arguments in calls
        ):
            return
        said = "I look." if form.triggers and tool != "harmony" else ""
        found = parsed(said + form.render(calls), tool)
        assert found.calls == calls
        assert found.content == said

    check()


PLAIN_TEXT = st.text('<>|{}[]":,` \n\\/aé0-').map(lambda text: text + ".")


@pytest.mark.parametrize("tool", TOOL_FAMILIES)
@given(PLAIN_TEXT, CUTS)
@settings(max_examples=10)
def test_text_without_calls_is_content(tool: str, text: str, places: list[int]) -> None:
    assert parsed(text, tool, pieces=cut(text, places)).content == text


@pytest.mark.parametrize("reasoning", REASONING_FAMILIES)
@given(PLAIN_TEXT, CUTS)
@settings(max_examples=10)
def test_text_without_reasoning_is_content(reasoning: str, text: str, places: list[int]) -> None:
    found = parsed(text, None, reasoning, pieces=cut(text, places))
    if REASONING_FAMILIES[reasoning].style == DEEPSEEK_R1:
        assert (found.content, found.reasoning) == ("", text.lstrip(" \n"))
    else:
        assert (found.content, found.reasoning) == (text, "")


@pytest.mark.parametrize("tool", TOOL_FAMILIES)
def test_an_answer_that_ends_within_the_arguments_says_so(tool: str) -> None:
    form = TOOL_FAMILIES[tool].format
    whole = form.begin + form.before_arguments("get_weather") + form.written({"city": "Paris"})
    found = parsed(whole[: whole.index("Par") + 3], tool)
    assert found.names == ["get_weather"] and found.problems == [UNFINISHED]
    assert found.arguments[0].replace(" ", "") == '{"city":"Par'
    assert found.content == ""


JSON_FAMILIES = [name for name, f in TOOL_FAMILIES.items() if f.format.arguments == "json"]


@pytest.mark.parametrize("tool", JSON_FAMILIES)
def test_arguments_that_are_no_json_are_passed_on(tool: str) -> None:
    form = TOOL_FAMILIES[tool].format
    bad = "{\"city\": 'Paris'}"
    text = form.begin + form.before_arguments("get_weather") + bad
    found = parsed(text + form.after_arguments + form.end, tool)
    assert found.names == ["get_weather"] and found.problems == [NOT_JSON]
    assert found.arguments[0].startswith(bad) and found.content == ""
    text = form.begin + form.before_arguments("get_weather") + "[1]"
    found = parsed(text + form.after_arguments + form.end, tool)
    assert found.problems in ([NO_OBJECT], [""] if not found.names else [NO_OBJECT])
    assert found.names == ["get_weather"]


@pytest.mark.parametrize("tool", JSON_FAMILIES)
def test_arguments_pass_verbatim_and_line_breaks_in_texts_are_escaped(tool: str) -> None:
    form = TOOL_FAMILIES[tool].format
    verbatim = '{ "city" :"P\\u0061ris",\n"days":1e2 }'
    text = form.begin + form.before_arguments("get_weather") + verbatim
    assert parsed(text + form.after_arguments + form.end, tool).arguments == [verbatim]
    text = form.begin + form.before_arguments("write_file") + '{"content": "a\n\tb"}'
    found = parsed(text + form.after_arguments + form.end, tool)
    assert found.calls == [("write_file", {"content": "a\n\tb"})]


@pytest.mark.parametrize(
    ("tool", "text"),
    [
        ("hermes", "Use <tool_call> like this: <tool_call>{}</tool_call>"),
        ("hermes", '<tool_call>{"name": 5, "arguments": {}}'),
        ("qwen3_coder", "Write <function=name> then <tool_call> and </tool_call>."),
        ("glm45", 'A <tool_call> is\nnot {"a": 1}'),
        ("minimax_m2", "<minimax:tool_call>none</minimax:tool_call>"),
        ("mistral", "[TOOL_CALLS] of many\n[TOOL_CALLS][1]"),
        ("gemma4", "<|tool_call>response:x{}"),
        ("kimi_k2", "<|tool_call_begin|><|tool_call_end|> x"),
        ("deepseek_v3", "<｜tool▁calls▁begin｜>what?<｜tool▁calls▁end｜>"),
        ("json", '{"name": "Bob", "arguments": {}}'),
        ("json", '{"city": "Paris", "days": [1, 2]}'),
        ("json", "[1, 2]"),
        ("json", "```python\nprint()\n```"),
        ("llama3_json", '{"name": "get_weather"'),
        ("llama3_json", "Say {} or []."),
    ],
)
def test_what_only_looks_like_a_call_is_content(tool: str, text: str) -> None:
    found = parsed(text, tool)
    assert (found.names, found.content) == ([], text)


def test_what_a_parser_must_see_is_told() -> None:
    assert markers("mistral_args", "magistral") == (
        "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "[THINK]", "[/THINK]",
    )  # fmt: skip
    assert markers(None, None) == ()
    for name, family in TOOL_FAMILIES.items():
        whole = family.format.render([("f", {"a": "b"})]) + "".join(family.format.triggers)
        if name not in ("llama3_json", "json"):
            assert any(mark in whole for mark in family.format.markers)
            assert family.format.triggers


def test_kimis_ids_are_in_the_text_and_mistrals_may_be() -> None:
    kimi = next(answer for answer in ANSWERS if answer.tool == "kimi_k2")
    assert parsed(kimi.text, "kimi_k2").ids == ["functions.get_weather:0", "functions.get_time:1"]
    text = "[TOOL_CALLS]get_time[CALL_ID]abcdefghi[ARGS]{}[TOOL_CALLS]get_time[ARGS]{}"
    assert parsed(text, "mistral").ids == ["abcdefghi", "id-1"]
    again = parsed("[TOOL_CALLS]get_time[CALL_ID]abcdefghi[ARGS]{}" * 3, "mistral")
    assert again.ids == ["abcdefghi", "id-1", "id-2"]  # a result must find its call


HALF = "\\ud83d"  # of a surrogate pair, as JSON spells it


@pytest.mark.parametrize("tool", ["hermes", "mistral", "llama3_json", "granite"])
def test_half_a_surrogate_pair_never_comes_out(tool: str) -> None:
    """JSON can spell what UTF-8 cannot write: an answer with it could not be sent."""
    begin = "".join(TOOL_FAMILIES[tool].format.triggers[:1])
    named = parsed(begin + f'{{"name": "a{HALF}", "arguments": {{}}}}', tool)
    assert not named.names and HALF in named.content
    texts = {f'{{\\"a\\": \\"{HALF}\\"}}': '{"a": "\ufffd"}', f"no {HALF}": "no \ufffd",
             f'{{\\"a\\": \\"{HALF}\\ude00\\"}}': '{"a": "😀"}'}  # fmt: skip
    for text, arguments in texts.items():
        found = parsed(begin + f'{{"name": "get_time", "arguments": "{text}"}}', tool)
        assert found.names == ["get_time"] and found.arguments == [arguments]
        assert found.arguments[0].encode()
