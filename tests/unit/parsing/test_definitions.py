"""Tools, choices, earlier calls and their results: what is accepted, and which field is named."""

from __future__ import annotations

from typing import Any

import pytest

from ds_cp.errors import RequestError
from ds_cp.parsing.calls import Toolbox
from ds_cp.parsing.definitions import (
    MAX_TOOLS,
    Tool,
    ToolChoice,
    read_choice,
    read_function,
    read_tools,
)
from ds_cp.parsing.history import (
    RAW,
    EarlierCall,
    as_object,
    read_calls,
)
from ds_cp.parsing.ids import KIMI, MISTRAL, OPENAI, id_for_template, new_ids
from ds_cp.parsing.instructions import tools_as_text, without_tools
from ds_cp.parsing.registry import make_parser
from tests.unit.parsing.answers import events_of, read


def tool(name: str = "f", **function: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **function}}


def deep(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(levels):
        schema = {"items": schema}
    return {"type": "object", "properties": {"a": schema}}


def test_tools_are_read() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string"}}}
    found = read_tools([tool(description="d", parameters=schema, strict=True), tool("g.h-1_2")])
    assert found == [Tool("f", "d", schema, True), Tool("g.h-1_2")]
    assert found[0].for_template() == tool(description="d", parameters=schema)
    assert found[1].for_template()["function"]["parameters"]["type"] == "object"
    assert read_tools(None) == read_tools([]) == []
    assert read_tools([{"type": "web_search"}, tool()], skip_unknown=True) == [Tool("f")]


@pytest.mark.parametrize(
    ("value", "param"),
    [
        ({}, "tools"),
        ([tool()] * (MAX_TOOLS + 1), "tools"),
        ([5], "tools[0]"),
        ([{"type": "web_search"}], "tools[0].type"),
        ([{"function": {"name": "f"}}], "tools[0].type"),
        ([{"type": "function"}], "tools[0].function"),
        ([tool("")], "tools[0].function.name"),
        ([tool("a b")], "tools[0].function.name"),
        ([tool("x" * 65)], "tools[0].function.name"),
        ([tool(name=None)], "tools[0].function.name"),
        ([tool(description=5)], "tools[0].function.description"),
        ([tool(description="x" * (1 << 17))], "tools[0].function.description"),
        ([tool(parameters=[])], "tools[0].function.parameters"),
        ([tool(parameters={"type": "array"})], "tools[0].function.parameters.type"),
        ([tool(parameters=deep(70))], "tools[0].function.parameters"),
        ([tool(parameters={"enum": list(range(30_000))})], "tools"),
        ([tool(strict="yes")], "tools[0].function.strict"),
        ([tool(), tool()], "tools[1]"),
    ],
)
def test_a_bad_tool_is_refused_by_its_field(value: Any, param: str) -> None:
    with pytest.raises(RequestError) as caught:
        read_tools(value)
    assert caught.value.param == param and param in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_a_tool_of_another_protocol_is_refused_by_its_own_fields() -> None:
    function = {"name": "f", "input_schema": {"type": "object"}}
    assert read_function(function, "tools[0]", "input_schema") == Tool("f", "", {"type": "object"})
    with pytest.raises(RequestError, match=r"^tools\[0\].input_schema must be"):
        read_function({"name": "f", "input_schema": 5}, "tools[0]", "input_schema")


def named(name: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def test_choices_are_read() -> None:
    tools = [Tool("f"), Tool("g")]
    assert read_choice(None, []) == read_choice("auto", []) == ToolChoice("none")
    assert read_choice(None, tools) == ToolChoice("auto", ("f", "g"))
    assert read_choice("none", tools) == ToolChoice("none")
    assert read_choice("required", tools, False) == ToolChoice("required", ("f", "g"), True)
    assert read_choice(named("g"), tools, True) == ToolChoice("required", ("g",), True)
    allowed = {
        "type": "allowed_tools",
        "allowed_tools": {"mode": "required", "tools": [named("g")]},
    }
    assert read_choice({"type": "function", "name": "g"}, tools).names == ("g",)
    assert read_choice(allowed, tools) == ToolChoice("required", ("g",))


@pytest.mark.parametrize(
    ("value", "tools", "param"),
    [
        ("any", [Tool("f")], "tool_choice"),
        ("required", [], "tool_choice"),
        (5, [Tool("f")], "tool_choice"),
        ({"type": "other"}, [Tool("f")], "tool_choice"),
        (named("g"), [Tool("f")], "tool_choice.function.name"),
        (named(5), [Tool("f")], "tool_choice.function.name"),
        ({"type": "allowed_tools"}, [Tool("f")], "tool_choice.allowed_tools"),
        (
            {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [named("g")]}},
            [Tool("f")],
            "tool_choice.allowed_tools.tools[0].function.name",
        ),
    ],
)
def test_a_bad_choice_is_refused_by_its_field(value: Any, tools: list[Tool], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        read_choice(value, tools)
    assert caught.value.param == param and param in str(caught.value)


def call(id_: Any = "c1", name: Any = "f", arguments: Any = '{"a": 1}') -> dict[str, Any]:
    return {"id": id_, "type": "function", "function": {"name": name, "arguments": arguments}}


def test_earlier_calls_become_what_templates_want() -> None:
    found = read_calls([call(), call("c2", arguments={"b": "é"}), call("c3", arguments="")], "x")
    assert [one.for_template()["function"]["arguments"] for one in found] == [
        {"a": 1}, {"b": "é"}, {},
    ]  # fmt: skip
    texts = [one.for_template(text_arguments=True)["function"]["arguments"] for one in found]
    assert texts == ['{"a": 1}', '{"b": "é"}', "{}"]
    assert read_calls(None, "x") == read_calls([], "x") == []


@pytest.mark.parametrize(
    "broken",
    ['{"a": ', "[1]", "null", "{'a': 1}", '{"a": ' + "9" * 9000 + "}", '{"a": [1e999]}',
     r'{"a": {"\ud800": 1}}', r'{"a": "\udfff"}'],
)  # fmt: skip
def test_what_a_model_wrote_wrongly_may_come_back(broken: str) -> None:
    found = EarlierCall("c", "f", broken).for_template()
    assert found["function"]["arguments"] == {RAW: broken}


def test_an_integer_that_no_template_is_given_is_its_digits() -> None:
    """A model that writes one long number does not end its conversation."""
    large, long = 2**63 - 1, 2**63
    text = f'{{"a": [{large}, -{large}, {long}, -{long}00]}}'
    found = EarlierCall("c", "f", text).for_template()["function"]["arguments"]
    assert found == {"a": [large, -large, str(long), f"-{long}00"]}
    assert as_object(text) == {"a": [large, -large, long, -long * 100]}


@pytest.mark.parametrize(
    ("value", "param"),
    [
        ({}, "m"),
        ([call()] * 200, "m"),
        ([5], "m[0]"),
        ([call() | {"type": "custom"}], "m[0].type"),
        ([{"id": "c"}], "m[0].function"),
        ([call(name="a b")], "m[0].function.name"),
        ([call(arguments=5)], "m[0].function.arguments"),
        ([call(id_=None)], "m[0].id"),
        ([call(id_="x" * 600)], "m[0].id"),
        ([call(), call()], "m"),
    ],
)
def test_a_bad_earlier_call_is_refused_by_its_field(value: Any, param: str) -> None:
    with pytest.raises(RequestError) as caught:
        read_calls(value, "m")
    assert caught.value.param == param and param in str(caught.value)


def test_ids_are_of_their_family() -> None:
    mine = id_for_template(MISTRAL, "call_0123456789")
    assert len(mine) == 9 and mine.isalnum() and mine.isascii()
    assert id_for_template(MISTRAL, "call_0123456789") == mine == id_for_template(MISTRAL, mine)
    assert id_for_template(MISTRAL, "call_0123456788") != mine
    assert id_for_template(OPENAI, "call_0123456789") == "call_0123456789"
    assert new_ids(KIMI, earlier=2)("f", 1) == "functions.f:3"
    for style, length in ((MISTRAL, 9), (OPENAI, 29)):
        made = {new_ids(style)("f", 0) for _ in range(50)}
        assert len(made) == 50 and {len(one) for one in made} == {length}


def test_a_model_that_is_told_of_tools_is_read_back() -> None:
    asked = [EarlierCall("c1", "f", '{"a": 1}'), EarlierCall("c2", "g", "")]
    conversation: list[tuple[dict[str, Any], list[EarlierCall]]] = [
        ({"role": "system", "content": "Be kind."}, []),
        ({"role": "user", "content": [{"type": "text", "text": "Hi"}]}, []),
        ({"role": "assistant", "content": None}, asked),
        ({"role": "tool", "tool_call_id": "c2", "content": "12"}, []),
        ({"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "13"}]}, []),
        ({"role": "user", "content": "And?"}, []),
    ]
    told = without_tools(conversation, [Tool("f", "does it", deep(1))])
    assert [message["role"] for message in told] == ["system", "user", "assistant", "user", "user"]
    assert told[0]["content"].startswith("Be kind.\n\nYou can call these tools")
    assert '"name": "f"' in told[0]["content"] and "does it" in told[0]["content"]
    assert told[1] == conversation[1][0]
    assert told[3]["content"] == "Result of the tool g:\n12\n\nResult of the tool f:\n13"
    parser = make_parser("json", None, Toolbox({"f": {}, "g": {}}))
    assert read(events_of(parser, [told[2]["content"]])).calls == [("f", {"a": 1}), ("g", {})]
    assert without_tools(conversation[1:2], []) == [conversation[1][0]]
    first = without_tools(conversation[1:2], [Tool("f")])[0]
    assert first == {"role": "system", "content": tools_as_text([Tool("f")])}
