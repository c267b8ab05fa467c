"""How a model is told of tools where its chat template knows none."""

from __future__ import annotations

import json
from collections.abc import Sequence

from ds_cp.parsing.definitions import Tool

_HOW = (
    "You can call these tools; each line is one tool as JSON:\n{tools}\n\n"
    "To call a tool, answer with a JSON object and nothing else: "
    '{{"name": "NAME", "arguments": {{ARGUMENTS}}}}. To call several, write the objects one below '
    "the other. Where no tool is needed, answer in plain text."
)


def tools_as_text(tools: Sequence[Tool]) -> str:
    """Text for the system message, which asks for calls as the parser ``json`` reads them."""
    lines = (json.dumps(tool.for_template()["function"], ensure_ascii=False) for tool in tools)
    return _HOW.format(tools="\n".join(lines))


def result_as_text(name: str, content: str) -> str:
    """The text of a user's turn that stands for the result of a call."""
    return f"Result of the tool {name}:\n{content}"


def call_as_text(name: str, arguments: str) -> str:
    """The text of an assistant's turn that stands for a call."""
    return f'{{"name": {json.dumps(name, ensure_ascii=False)}, "arguments": {arguments or "{}"}}}'
