"""Answers as models write them, and what they hold; and how tests read answers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ds_cp.parsing.calls import Toolbox
from ds_cp.parsing.events import (
    ArgumentsDelta,
    CallBegin,
    CallEnd,
    Content,
    Event,
    Parser,
    Reasoning,
    joined,
)
from ds_cp.parsing.registry import make_parser

WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer"},
        "metric": {"type": "boolean"},
        "share": {"type": "number"},
        "tags": {"type": "array", "items": {"type": "string"}},
        "where": {"$ref": "#/$defs/place"},
        "note": {"anyOf": [{"type": "string"}, {"type": "null"}]},
    },
    "$defs": {"place": {"type": "object"}},
}
SCHEMAS: dict[str, dict[str, Any]] = {
    "get_weather": WEATHER,
    "write_file": {
        "type": "object",
        "properties": {"path": {"type": "string"}, "content": {"type": "string"}},
    },
    "get_time": {},
}
TOOLS = Toolbox(SCHEMAS, lambda name, index: f"id-{index}")


@dataclass
class Read:
    """What the events of an answer come to."""

    content: str = ""
    reasoning: str = ""
    names: list[str] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    arguments: list[str] = field(default_factory=list)
    problems: list[str | None] = field(default_factory=list)  # "" where complete, None where open

    @property
    def calls(self) -> list[tuple[str, Any]]:
        """Names and arguments; every call must be complete."""
        assert self.problems == [""] * len(self.names)
        return list(zip(self.names, map(json.loads, self.arguments), strict=True))


def read(events: Iterable[Event]) -> Read:
    """Join the events, and check their order."""
    found, open_call = Read(), -1
    for event in events:
        match event:
            case Content(text):
                found.content += text
            case Reasoning(text):
                found.reasoning += text
            case CallBegin(index, id_, name):
                assert open_call < 0 and index == len(found.names)
                open_call = index
                found.names.append(name)
                found.ids.append(id_)
                found.arguments.append("")
                found.problems.append(None)
            case ArgumentsDelta(index, text):
                assert index == open_call
                found.arguments[index] += text
            case CallEnd(index, complete, problem):
                assert index == open_call and complete == (not problem)
                found.problems[index] = problem
                open_call = -1
                if complete:
                    assert isinstance(json.loads(found.arguments[index]), dict)
    assert open_call < 0  # every call is ended
    return found


def events_of(parser: Parser, pieces: Iterable[str]) -> list[Event]:
    """All events of an answer that arrives in these pieces."""
    events: list[Event] = []
    for piece in pieces:
        events += parser.feed(piece)
    return joined([*events, *parser.finish()])


def parsed(
    text: str,
    tool: str | None,
    reasoning: str | None = None,
    *,
    prompt: str = "",
    pieces: Sequence[str] | None = None,
) -> Read:
    """An answer as one parser reads it, at once or in ``pieces``."""
    parser = make_parser(tool, reasoning, TOOLS, prompt)
    return read(events_of(parser, [text] if pieces is None else pieces))


def cut(text: str, places: Iterable[int]) -> list[str]:
    """A text in pieces."""
    edges = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    return [text[a:b] for a, b in zip(edges, edges[1:], strict=False)]


@dataclass(frozen=True)
class Answer:
    """A text of a model, and what it holds."""

    name: str
    tool: str
    text: str
    calls: list[tuple[str, Any]]
    content: str = ""
    reasoning: str = ""
    reasoning_parser: str | None = None
    prompt: str = ""


PARIS = ("get_weather", {"city": "Paris"})
OSLO = ("get_weather", {"city": "Oslo", "days": 3, "metric": True})
TIME = ("get_time", {})
CODE = 'if a < b:\n    print("</tool>", {1: 2})\n'

ANSWERS = [
    Answer(
        "hermes",
        "hermes",
        '<think>\nThey want it.\n</think>\n\nLet me look.\n\n<tool_call>\n{"name": "get_weather", '
        '"arguments": {"city": "Paris"}}\n</tool_call>\n<tool_call>\n{"name": "get_weather", '
        '"arguments": {"city": "Oslo", "days": 3, "metric": true}}\n</tool_call>',
        [PARIS, OSLO],
        "Let me look.",
        "They want it.",
        "think",
    ),
    Answer(
        "hermes, arguments first and as text, no end",
        "hermes",
        '<tool_call>{"arguments": {"city": "Paris"}, "name": "get_weather"}</tool_call>'
        '<tool_call>{"name": "get_weather", "arguments": "{\\"city\\": \\"Paris\\"}"}',
        [PARIS, PARIS],
    ),
    Answer(
        "hermes, the end marker in a text",
        "hermes",
        '<tool_call>{"name": "write_file", "arguments": {"path": "a", "content": "</tool_call>"}}'
        "}</tool_call>\nDone.",
        [("write_file", {"path": "a", "content": "</tool_call>"})],
        "Done.",
    ),
    Answer(
        "qwen3 coder",
        "qwen3_coder",
        "I will write it.\n\n<tool_call>\n<function=write_file>\n<parameter=path>\na.py\n"
        f"</parameter>\n<parameter=content>\n{CODE}\n</parameter>\n</function>\n</tool_call>\n"
        "<tool_call>\n<function=get_weather>\n<parameter=city>\nOslo\n</parameter>\n"
        "<parameter=days>\n3\n</parameter>\n<parameter=metric>\nTrue\n</parameter>\n</function>\n"
        "</tool_call>",
        [("write_file", {"path": "a.py", "content": CODE}), OSLO],
        "I will write it.",
    ),
    Answer(
        "qwen3 coder, thinking that nothing closes, no tags around the function",
        "qwen3_coder",
        "I need the time.\n<tool_call>\n<function=get_time>\n</function>\n</tool_call>"
        "<function=get_time></function></tool_call><function=get_time></function>",
        [TIME, TIME, TIME],
        "",
        "I need the time.",
        "think",
        "<|im_start|>assistant\n<think>\n",
    ),
    Answer(
        "seed",
        "seed_oss",
        "<seed:think>Hm.</seed:think><seed:tool_call>\n<function=get_weather>\n"
        "<parameter=city>Oslo</parameter>\n<parameter=days>3</parameter>\n"
        "<parameter=metric>true</parameter>\n</function>\n</seed:tool_call>",
        [OSLO],
        "",
        "Hm.",
        "seed_oss",
    ),
    Answer(
        "glm 4.5",
        "glm45",
        "\n<think>Think.</think>\nI look.\n<tool_call>get_weather\n<arg_key>city</arg_key>\n"
        "<arg_value>Oslo</arg_value>\n<arg_key>days</arg_key>\n<arg_value>3</arg_value>\n"
        "<arg_key>metric</arg_key>\n<arg_value>true</arg_value>\n</tool_call>\n"
        "<tool_call>get_time\n</tool_call>",
        [OSLO, TIME],
        "I look.",
        "Think.",
        "think",
    ),
    Answer(
        "glm 4.7",
        "glm45",
        "<tool_call>get_weather<arg_key>city</arg_key><arg_value>Paris</arg_value></tool_call>"
        "<tool_call>get_time</tool_call>",
        [PARIS, TIME],
    ),
    Answer(
        "minimax",
        "minimax_m2",
        'So.\n</think>\n\n\n<minimax:tool_call>\n<invoke name="get_weather">\n'
        '<parameter name="city">Oslo</parameter>\n<parameter name="days">3</parameter>\n'
        '<parameter name="metric">true</parameter>\n</invoke>\n<invoke name="get_time">\n'
        "</invoke>\n</minimax:tool_call>",
        [OSLO, TIME],
        "",
        "So.",
        "think",
        "]~b]ai\n<think>\n",
    ),
    Answer(
        "deepseek v3",
        "deepseek_v3",
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n"
        '{"city": "Paris"}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>'
        "get_time\n```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        [PARIS, TIME],
    ),
    Answer(
        "deepseek v3.1, reasoning without its first mark",
        "deepseek_v31",
        "Hm.</think>I look.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>"
        '{"city": "Paris"}<｜tool▁call▁end｜><｜tool▁call▁begin｜>get_time<｜tool▁sep｜>{}'
        "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        [PARIS, TIME],
        "I look.",
        "Hm.",
        "deepseek_r1",
    ),
    Answer(
        "deepseek v3.2",
        "deepseek_v32",
        '<｜DSML｜function_calls>\n<｜DSML｜invoke name="get_weather">\n<｜DSML｜parameter '
        'name="city" string="true">Oslo</｜DSML｜parameter>\n<｜DSML｜parameter name="days" '
        'string="false">3</｜DSML｜parameter>\n<｜DSML｜parameter name="metric" string="false">true'
        "</｜DSML｜parameter>\n</｜DSML｜invoke>\n</｜DSML｜function_calls>",
        [OSLO],
    ),
    Answer(
        "deepseek v4",
        "deepseek_v32",
        'I look.\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="get_time">\n</｜DSML｜invoke>\n'
        "</｜DSML｜tool_calls>",
        [TIME],
        "I look.",
    ),
    Answer(
        "deepseek v4.1",
        "deepseek_v41",
        '<｜DSML｜ calls>\n<｜DSML｜ invoke name="get_weather">\n<｜DSML｜ parameter name="city" '
        'string="true">Paris</｜DSML｜ parameter>\n</｜DSML｜ invoke>\n</｜DSML｜ calls>',
        [PARIS],
    ),
    Answer(
        "command a",
        "cohere",
        "<|START_THINKING|>Hm.<|END_THINKING|><|START_ACTION|>[\n    "
        '{"tool_call_id": "0", "tool_name": "get_weather", "parameters": {"city": "Paris"}}\n'
        "]<|END_ACTION|>",
        [PARIS],
        "",
        "Hm.",
        "cohere",
    ),
    Answer(
        "kimi k2",
        "kimi_k2",
        "◁ I look.<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0"
        '<|tool_call_argument_begin|>{"city": "Paris"}<|tool_call_end|><|tool_call_begin|>'
        "functions.get_time:1<|tool_call_argument_begin|>{}<|tool_call_end|>"
        "<|tool_calls_section_end|>",
        [PARIS, TIME],
        "◁ I look.",
    ),
    Answer(
        "mistral, a list",
        "mistral",
        '[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Paris"}}, '
        '{"name": "get_time", "arguments": {}}]',
        [PARIS, TIME],
    ),
    Answer(
        "magistral, names",
        "mistral",
        "[THINK]Hm.[/THINK]I look.[TOOL_CALLS]get_weather[ARGS]"
        '{"city": "Paris"}[TOOL_CALLS]get_time[CALL_ID]abcdefghi[ARGS]{}[TOOL_CALLS]get_time{}',
        [PARIS, TIME, TIME],
        "I look.",
        "Hm.",
        "magistral",
    ),
    Answer(
        "gemma 4",
        "gemma4",
        "<|channel>thought\nHm.\n<channel|>I look.<|tool_call>call:get_weather{city:"
        '<|"|>Oslo<|"|>,days:3,metric:true}<tool_call|><|tool_call>call:get_weather{where:{n:'
        '[1,<|"|>a, "b"<|"|>,{}],"q": "r"},city:<|"|>x\ny<|"|>}<tool_call|>',
        [OSLO, ("get_weather", {"where": {"n": [1, 'a, "b"', {}], "q": "r"}, "city": "x\ny"})],
        "I look.",
        "Hm.",
        "gemma4",
    ),
    Answer(
        "function gemma",
        "functiongemma",
        "<start_function_call>call:get_weather{city:<escape>Paris<escape>}<end_function_call>"
        "<start_function_call>call:get_time{}<end_function_call>",
        [PARIS, TIME],
    ),
    Answer(
        "gpt-oss",
        "harmony",
        "<|channel|>analysis<|message|>Need weather.<|end|><|start|>assistant<|channel|>commentary"
        "<|message|>I look.<|end|><|start|>assistant<|channel|>commentary to=functions.get_weather "
        '<|constrain|>json<|message|>{"city": "Paris"}<|call|>',
        [PARIS],
        "I look.",
        "Need weather.",
        "harmony",
    ),
    Answer(
        "gpt-oss, the recipient before the channel",
        "harmony",
        ' to=functions.get_weather<|channel|>commentary json<|message|>{"city": "Paris"}<|call|>'
        "<|start|>assistant<|channel|>final<|message|>Done.<|return|>",
        [PARIS],
        "Done.",
        "",
        "harmony",
    ),
    Answer(
        "granite 3",
        "granite",
        "Here is my thought process: Hm.\n\nHere is my response: <|tool_call|>"
        '[{"name": "get_weather", "arguments": {"city": "Paris"}}]',
        [PARIS],
        "",
        "Hm.",
        "granite",
    ),
    Answer(
        "nemotron",
        "nemotron",
        '<TOOLCALL>[{"name": "get_weather", "arguments": {"city": "Paris"}}]</TOOLCALL>',
        [PARIS],
    ),
    Answer(
        "jamba",
        "jamba",
        '<tool_calls>[\n{"name": "get_time", "arguments": {}},\n{"name": "get_weather", '
        '"arguments": {"city": "Paris"}}]\n</tool_calls>',
        [TIME, PARIS],
    ),
    Answer(
        "llama 3",
        "llama3_json",
        '{"type": "function", "name": "get_weather", "parameters": {"city": "Paris"}}; '
        '{"name": "get_time", "parameters": {}}',
        [PARIS, TIME],
    ),
    Answer(
        "llama 3, the tag",
        "llama3_json",
        'I look.<|python_tag|>{"name": "get_weather", "parameters": {"city": "Paris"}}',
        [PARIS],
        "I look.",
    ),
    Answer(
        "json in a fence",
        "json",
        '\n```json\n[{"name": "get_weather", "arguments": {"city": "Paris"}}]\n```\n',
        [PARIS],
    ),
]
