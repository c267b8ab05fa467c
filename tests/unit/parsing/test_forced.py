"""Grammars of calls: what they admit is read as the calls that were asked for."""

from __future__ import annotations

import pytest

from ds_cp.parsing.definitions import Tool, read_choice
from ds_cp.parsing.forced import call_grammar
from ds_cp.parsing.registry import TOOL_FAMILIES
from tests.unit.parsing.answers import SCHEMAS, parsed

TOOLS = [Tool(name, "", schema) for name, schema in SCHEMAS.items()]


@pytest.mark.parametrize("tool", TOOL_FAMILIES)
def test_what_the_grammar_admits_is_read_as_calls(tool: str) -> None:
    grammar = call_grammar(tool, TOOLS, read_choice("required", TOOLS))
    assert grammar is not None and grammar.structural_tag["at_least"] == 1
    tag = grammar.structural_tag
    texts = [
        one["begin"] + ('{"city": "Paris"}' if "properties" in one["schema"] else "{}") + one["end"]
        for one in tag["structures"]
    ]
    for one in tag["structures"]:
        assert any(trigger and one["begin"].startswith(trigger) for trigger in tag["triggers"])
    once = tag["at_most"] == 1
    text = texts[0] if once else "".join(texts)
    found = parsed(text, grammar.tool)
    assert [name for name, _ in found.calls] == list(SCHEMAS)[: 1 if once else None]
    assert found.content == ""


def test_one_call_of_a_named_tool() -> None:
    named = {"type": "function", "function": {"name": "get_time"}}
    grammar = call_grammar("hermes", TOOLS, read_choice(named, TOOLS))
    assert grammar is not None
    assert grammar.structural_tag == {
        "triggers": ["<tool_call>"],
        "structures": [
            {
                "begin": '<tool_call>\n{"name": "get_time", "arguments": ',
                "schema": {"type": "object"},
                "end": "}\n</tool_call>",
            }
        ],
        "at_most": 1,
        "at_least": 1,
    }


def test_a_model_is_free_unless_its_tools_are_strict() -> None:
    auto = read_choice("auto", TOOLS)
    assert call_grammar("hermes", TOOLS, auto) is None
    assert call_grammar("hermes", TOOLS, read_choice("none", TOOLS)) is None
    strict = [Tool(tool.name, "", tool.parameters, True) for tool in TOOLS]
    grammar = call_grammar("hermes", strict, auto)
    assert grammar is not None and "at_least" not in grammar.structural_tag
    assert call_grammar("json", strict, auto) is None
    assert call_grammar("qwen3_coder", strict, auto) is None
