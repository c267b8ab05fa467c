"""Whether a chat template writes tools, calls and results, and how it wants an earlier call.

Templates differ: some print arguments that are an object, some join texts; some see a call only
where the content beside it is null. What does not suit is dropped without an error, or fails. So a
call with marks in it is rendered in each way, and the first is used that keeps all of them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from ds_cp.templates.messages import ToolShape
from ds_cp.templates.shape import Message

_TOOL, _VALUE, _RESULT = "dscpmarkertool", "dscpmarkervalue", "dscpmarkerresult"
_LATE = "dscpmarkerlate"
_KEY, _FILLER = "dscpkey", "dscpfiller"
_ID = "dscpcall1"  # Mistral's templates refuse ids of another length
_TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "dscpmarkeroffer",
            "description": _FILLER,
            "parameters": {
                "type": "object",
                "properties": {_KEY: {"type": "string", "description": _FILLER}},
                "required": [_KEY],
            },
        },
    }
]
_OFFER = "dscpmarkeroffer"
# In the order of preference: arguments as text, content null beside a call.
_WAYS = ((False, False), (False, True), (True, False), (True, True))


def learn_tools(
    render: Callable[[list[Message], list[dict[str, Any]]], str],
    passing: tuple[type[Exception], ...],
) -> ToolShape:
    """What a template makes of tools. ``render`` renders a conversation with tools and may raise
    anything; exceptions of ``passing`` are raised."""
    offered = _try(render, passing, [{"role": "user", "content": _FILLER}])
    offers = _OFFER in offered
    late = _LATE in _try(render, passing, _late_system())
    for text_arguments, null_content in _WAYS:
        rendering = _try(render, passing, _conversation(text_arguments, null_content))
        printed_as_python = f"{{'{_KEY}'" in rendering
        if _TOOL in rendering and _RESULT in rendering and _VALUE in rendering:
            if not printed_as_python:
                return ToolShape(offers, True, text_arguments, null_content, late_system=late)
    return ToolShape(offers, late_system=late)


def shaped_calls(messages: Sequence[Message], shape: ToolShape) -> list[Message]:
    """The messages with the content beside calls as the template wants it."""
    return [
        message | {"content": None}
        if shape.null_content and message.get("tool_calls") and not message.get("content")
        else message
        for message in messages
    ]


def _conversation(text_arguments: bool, null_content: bool) -> list[Message]:
    arguments: Any = {_KEY: _VALUE}
    if text_arguments:
        arguments = json.dumps(arguments)
    function = {"name": _TOOL, "arguments": arguments}
    calls = [{"type": "function", "id": _ID, "function": function}]
    return [
        {"role": "user", "content": _FILLER},
        {"role": "assistant", "content": None if null_content else "", "tool_calls": calls},
        {"role": "tool", "content": _RESULT, "tool_call_id": _ID, "name": _TOOL},
    ]


def _late_system() -> list[Message]:
    """A conversation whose system speaks again behind the user, as agents' do."""
    said = (("system", _FILLER), ("user", _FILLER), ("system", _LATE))
    return [{"role": role, "content": content} for role, content in said]


def _try(
    render: Callable[[list[Message], list[dict[str, Any]]], str],
    passing: tuple[type[Exception], ...],
    messages: list[Message],
) -> str:
    """A rendering; "" where it fails."""
    try:
        return render(messages, _TOOLS).casefold()
    except passing:
        raise
    except Exception:
        return ""
