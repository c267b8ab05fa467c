"""Conversations with tools for a chat template that knows none: the model is told of them in the
system message, and calls and results are plain text."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from ds_cp.parsing.definitions import Tool
from ds_cp.parsing.history import EarlierCall

Message = dict[str, Any]
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


def without_tools(
    messages: Sequence[tuple[Message, Sequence[EarlierCall]]],
    tools: Sequence[Tool],
    system: bool = True,
) -> list[Message]:
    """The messages, each with the calls in it, in words that any template renders: roles system,
    user and assistant. Results in a row become one turn of the user, since many templates want
    turns to alternate. ``content`` is text, a list of text parts, or None. ``system``: the template
    knows the role; where not, the user says what the system would."""
    names = {call.id: call.name for _, calls in messages for call in calls}
    plain: list[Message] = []
    for are_results, group in groupby(messages, lambda one: one[0]["role"] == "tool"):
        if are_results:
            results = [_result_as_text(message, names) for message, _ in group]
            plain.append({"role": "user", "content": "\n\n".join(results)})
        else:
            plain += [_in_words(message, calls) for message, calls in group]
    return _told(plain, tools_as_text(tools), system) if tools else plain


def _result_as_text(message: Message, names: Mapping[str, str]) -> str:
    name = names.get(message.get("tool_call_id", ""), "")
    return f"Result of the tool {name}:\n{_text(message.get('content'))}"


def _in_words(message: Message, calls: Sequence[EarlierCall]) -> Message:
    if not calls:
        return dict(message)
    said = [_text(message.get("content")), *map(_call_as_text, calls)]
    return {"role": message["role"], "content": "\n".join(filter(None, said))}


def _told(messages: list[Message], text: str, system: bool) -> list[Message]:
    if not system:
        at = next((i for i, message in enumerate(messages) if message["role"] == "user"), None)
        if at is not None:
            said = _before(text, messages[at].get("content"))
            return [*messages[:at], messages[at] | {"content": said}, *messages[at + 1 :]]
    if not messages or messages[0]["role"] != "system":
        return [{"role": "system", "content": text}, *messages]
    content = messages[0].get("content")
    if isinstance(content, list):
        content = [*content, {"type": "text", "text": f"\n\n{text}"}]
    else:
        content = f"{content}\n\n{text}" if content else text
    return [messages[0] | {"content": content}, *messages[1:]]


def _before(text: str, content: Any) -> Any:
    if isinstance(content, list):
        return [{"type": "text", "text": f"{text}\n\n"}, *content]
    return f"{text}\n\n{content or ''}"


def _text(content: Any) -> str:
    if isinstance(content, list):
        return "\n".join(part["text"] for part in content)
    return content or ""


def _call_as_text(call: EarlierCall) -> str:
    name = json.dumps(call.name, ensure_ascii=False)
    return f'{{"name": {name}, "arguments": {call.arguments or "{}"}}}'
