"""Whole answers against transformers' own parser of responses, with the templates that it has for
these families."""

from __future__ import annotations

import json
from typing import Any

import pytest
from transformers.utils.chat_parsing import parse_response

from tests.unit.parsing.answers import ANSWERS, SCHEMAS, Answer, parsed

THINK = {"open": "<think>", "close": "</think>", "content": "text"}
CALL = {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}}
TEMPLATES: dict[str, dict[str, Any]] = {
    "hermes": {
        "reasoning_content": THINK,
        "tool_calls": {
            "open_pattern": r"\s*<tool_call>", "close": "</tool_call>", "repeats": True,
            "content": "json", "transform": {"type": "function", "function": "{content}"},
        },
    },
    "qwen3_coder": {
        "reasoning_content": THINK,
        "tool_calls": {
            "open_pattern": r"\s*<tool_call>\s*<function=(?P<name>[^>\n]+)>", "repeats": True,
            "close_pattern": r"</function>\s*</tool_call>", "content": "xml-inline",
            "content_args": {"tag_pattern":
                r"<parameter=(?P<key>[^>\n]+)>\n(?P<value>.*?)\n</parameter>"},
            "transform": CALL,
        },
    },
    "gemma4": {
        "reasoning_content": {"open": "<|channel>thought\n", "close": "<channel|>",
                              "content": "text"},
        "tool_calls": {
            "open_pattern": r"<\|tool_call>call:(?P<name>\w+)", "close": "<tool_call|>",
            "repeats": True, "content": "json", "transform": CALL,
            "content_args": {"unquoted_keys": True, "string_delims": [['<|"|>', '<|"|>']]},
        },
    },
}  # fmt: skip
# What transformers' parser refuses or does not know: calls without their tags, arguments as text.
OURS_ALONE = {
    "hermes, arguments first and as text, no end",
    "hermes, the end marker in a text",
    "qwen3 coder, thinking that nothing closes, no tags around the function",
}
SHARED = [a for a in ANSWERS if a.tool in TEMPLATES and a.name not in OURS_ALONE]


@pytest.mark.parametrize("answer", SHARED, ids=lambda answer: answer.name)
def test_transformers_reads_the_same(answer: Answer) -> None:
    fields = {**TEMPLATES[answer.tool], "content": {"content": "text"}}
    tools = [
        {"type": "function", "function": {"name": name, "parameters": schema}}
        for name, schema in SCHEMAS.items()
    ]
    template = {"defaults": {"role": "assistant"}, "start_anchor": "<answer>", "fields": fields}
    theirs = parse_response(answer.text, template, prefix="", tools=tools)
    ours = parsed(answer.text, answer.tool, answer.reasoning_parser, prompt=answer.prompt)
    calls = [(c["function"]["name"], c["function"]["arguments"]) for c in theirs["tool_calls"]]
    assert json.dumps(ours.calls) == json.dumps(calls)
    assert theirs.get("content", "") == ours.content
    assert theirs.get("reasoning_content", "") == ours.reasoning
