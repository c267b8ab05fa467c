"""Reasoning: where it begins and ends, by the prompt and by the text; and gpt-oss's channels."""

from __future__ import annotations

import pytest

from ds_cp.parsing.harmony import open_channel
from ds_cp.parsing.thinking import DEEPSEEK_R1, GEMMA4, INSIDE, OUTSIDE, THINK, UNKNOWN
from tests.unit.parsing.answers import parsed


def both(text: str, reasoning: str, prompt: str = "", tool: str | None = None) -> tuple[str, str]:
    """Reasoning and content, the same for the whole text and for its characters."""
    whole = parsed(text, tool, reasoning, prompt=prompt)
    assert parsed(text, tool, reasoning, prompt=prompt, pieces=list(text)) == whole
    return whole.reasoning, whole.content


def test_a_prompt_says_where_its_answer_begins() -> None:
    assert THINK.begins("...assistant\n<think>\n") == INSIDE
    assert THINK.begins("...assistant\n<think>\n\n</think>\n\n") == OUTSIDE
    assert THINK.begins("<think> is a tag<|im_end|>\n<|im_start|>assistant\n") == UNKNOWN
    assert GEMMA4.begins("<|turn>model\n<|channel>thought\n<channel|>") == OUTSIDE
    assert GEMMA4.begins("<|turn>model\n<|channel>thought\n") == INSIDE
    assert DEEPSEEK_R1.begins("<｜Assistant｜></think>") == OUTSIDE


@pytest.mark.parametrize(
    ("text", "reasoning", "prompt", "expected"),
    [
        ("\n<think>\nHm.\n</think>\n\nYes.\n", "think", "", ("Hm.", "Yes.\n")),
        ("Hm.</think>Yes.", "think", "<think>", ("Hm.", "Yes.")),
        ("Hm.", "think", "<think>\n", ("Hm.", "")),
        ("<think>Hm.\n", "think", "", ("Hm.\n", "")),
        ("\n\nYes.", "think", "<think>\n\n</think>\n\n", ("", "Yes.")),
        ("</think>\n\nYes.", "think", "<think></think>", ("", "Yes.")),
        ("<think></think>Yes.", "think", "", ("", "Yes.")),
        ("  Yes, <think> is a tag.", "think", "", ("", "  Yes, <think> is a tag.")),
        ("<think>a</think>b<think>c</think>", "think", "", ("a", "b<think>c</think>")),
        ("<think", "think", "", ("", "<think")),
        ("Hm.</think>Yes.", "deepseek_r1", "", ("Hm.", "Yes.")),
        ("<think>Hm.</think>Yes.", "deepseek_r1", "", ("Hm.", "Yes.")),
        ("Yes.", "deepseek_r1", "<｜Assistant｜></think>", ("", "Yes.")),
        ("a[THINK]b[/THINK]c[THINK]d[/THINK]", "magistral", "", ("b\n\nd", "ac")),
        ("Here's my thought process: a Here is my response: b", "granite", "", ("a", "b")),
        ("<|channel>thought\na\n<channel|>b", "gemma4", "", ("a", "b")),
        ("<seed:think>a</seed:think>b", "seed_oss", "", ("a", "b")),
    ],
)
def test_reasoning_is_split(
    text: str, reasoning: str, prompt: str, expected: tuple[str, str]
) -> None:
    assert both(text, reasoning, prompt) == expected


def test_a_call_within_reasoning_is_reasoning_unless_the_family_forgets_to_close_it() -> None:
    text = 'Hm. <tool_call>{"name": "get_time", "arguments": {}}</tool_call></think>Yes.'
    assert both(text, "think", "<think>", "hermes") == (text.partition("</think>")[0], "Yes.")
    kimi = "Hm. <|tool_calls_section_begin|><|tool_call_begin|>functions.get_time:0" \
        "<|tool_call_argument_begin|>{}<|tool_call_end|><|tool_calls_section_end|>"  # fmt: skip
    found = parsed(kimi, "kimi_k2", "think", prompt="<think>")
    assert found.reasoning == "Hm." and found.names == ["get_time"]


def test_white_space_of_any_length_takes_bounded_memory() -> None:
    text = "<think>" + " " * 1000 + "a" + "\n" * 1000 + "</think>" + "\n" * 1000 + "b" + " " * 1000
    reasoning, content = both(text, "think", tool="hermes")
    assert reasoning.strip() == "a" and reasoning.startswith("a")
    assert content == "b" + " " * 1000


CHANNELS = "<|channel|>analysis<|message|>One.<|end|><|start|>assistant<|channel|>"


@pytest.mark.parametrize(
    ("text", "prompt", "expected"),
    [
        (CHANNELS + "final<|message|>Two.<|return|>", "", ("One.", "Two.")),
        (CHANNELS + "final<|message|>Two", "", ("One.", "Two")),
        (CHANNELS + "fin", "", ("One.", "")),
        (CHANNELS + "analysis<|message|>More.<|end|>", "", ("One.\n\nMore.", "")),
        (CHANNELS + "commentary<|message|>A.<|end|><|start|>assistant<|channel|>final"
         "<|message|>B.", "", ("One.", "A.\n\nB.")),
        ("Two.", "<|start|>assistant<|channel|>final<|message|>", ("", "Two.")),
        ("One.<|end|>", "<|start|>assistant<|channel|>analysis<|message|>", ("One.", "")),
        ("Just text.\nMore.", "<|start|>assistant", ("", "Just text.\nMore.")),
        ("<|channel|>final<|message|><|return|>", "", ("", "")),
    ],
)  # fmt: skip
def test_channels_are_split(text: str, prompt: str, expected: tuple[str, str]) -> None:
    assert both(text, "harmony", prompt) == both(text, "harmony", prompt, "harmony") == expected


def test_a_call_is_content_where_there_are_no_tools() -> None:
    text = "<|channel|>commentary to=functions.get_time<|message|>{}<|call|>"
    assert both(text, "harmony") == ("", "{}")
    assert parsed(text, "harmony", "harmony").calls == [("get_time", {})]


def test_a_prompt_may_hold_the_header_of_the_answer() -> None:
    assert open_channel("<|end|><|start|>assistant") is None
    assert open_channel("<|start|>assistant<|channel|>final<|message|>So") is not None
    assert open_channel("<|start|>user<|message|>Hi<|end|>") is None
