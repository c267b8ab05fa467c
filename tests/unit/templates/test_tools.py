"""What templates make of tools, found by rendering: with jinja2 alone, without transformers."""

from __future__ import annotations

import json
from typing import Any

import jinja2
import pytest

from ds_cp.templates.messages import ToolShape
from ds_cp.templates.tools import learn_tools, shaped_calls
from tests.helpers import chat_templates as templates

LOOP = "{% for m in messages %}"
CALLS = "{% for c in m.tool_calls or [] %}{{ c.function.name }}"
END = "{% endfor %}{% endfor %}"


def learned(template: str) -> ToolShape:
    environment = jinja2.Environment()
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    compiled = environment.from_string(template)

    def render(messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> str:
        return compiled.render(messages=messages, tools=tools, add_generation_prompt=True)

    return learn_tools(render, (MemoryError,))


@pytest.mark.parametrize(
    ("template", "shape"),
    [
        (templates.HERMES, ToolShape(True, True)),
        (templates.HARMONY, ToolShape(True, True)),
        (templates.NULL_CONTENT, ToolShape(True, True, True, True)),
        (templates.CHATML, ToolShape()),
        (templates.QWEN, ToolShape(offers=True)),
        (templates.GEMMA, ToolShape(late_system=False)),
        (LOOP + "{{ m.content }}" + CALLS + "{{ c.function.arguments }}" + END,
         ToolShape(False, True, True)),  # an object would be printed as Python has it
        (LOOP + "{{ m.content }}" + CALLS + "{{ ' ' + c.function.arguments }}" + END,
         ToolShape(False, True, True)),
        (LOOP + CALLS + "{{ c.function.arguments | tojson }}" + END,
         ToolShape(late_system=False)),  # it writes no text at all
        ("{{ raise_exception('never') }}", ToolShape(late_system=False)),
    ],
)  # fmt: skip
def test_the_first_way_that_keeps_everything(template: str, shape: ToolShape) -> None:
    assert learned(template) == shape


def test_what_ends_a_process_is_passed_on() -> None:
    def render(*_: Any) -> str:
        raise MemoryError

    with pytest.raises(MemoryError):
        learn_tools(render, (MemoryError,))


def test_content_beside_calls() -> None:
    messages = [
        {"role": "user", "content": ""},
        {"role": "assistant", "content": "", "tool_calls": [{}]},
        {"role": "assistant", "content": "a", "tool_calls": [{}]},
    ]
    assert shaped_calls(messages, ToolShape(True, True)) == messages
    null = shaped_calls(messages, ToolShape(True, True, null_content=True))
    assert [message["content"] for message in null] == ["", None, "a"]
