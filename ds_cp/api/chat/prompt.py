"""A chat as what a template renders: with the template's own tools, or in plain words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from ds_cp.api.chat.request import ChatRequest, Part, Turn
from ds_cp.api.chat.style import ChatStyle
from ds_cp.parsing.definitions import Tool
from ds_cp.parsing.ids import id_for_template
from ds_cp.parsing.instructions import without_tools
from ds_cp.templates.messages import ToolShape

Message = dict[str, Any]


@dataclass(frozen=True)
class TemplateInput:
    """What one rendering is of. ``continue_final``: the text ends within the last message."""

    messages: Sequence[Message]
    tools: Sequence[Mapping[str, Any]] = ()
    values: Mapping[str, Any] = field(default_factory=dict)
    add_generation_prompt: bool = True
    continue_final: bool = False


def template_input(
    chat: ChatRequest, style: ChatStyle, shape: ToolShape, values: Mapping[str, Any]
) -> TemplateInput:
    """The chat for a template that makes ``shape`` of tools. What it cannot write, tools or earlier
    calls and results, is said in plain text."""
    tools = offered(chat)
    turns = chat.turns
    if chat.moves_system and not shape.late_system:
        turns = said_by_users(turns)
    if shape.offers and shape.history:
        messages = native(turns, style, shape)
    else:
        pairs = [(_plain(turn, style), turn.calls) for turn in turns]
        messages = without_tools(pairs, () if shape.offers else tools, shape.system)
    return TemplateInput(
        messages,
        [tool.for_template() for tool in tools] if shape.offers else (),
        values,
        chat.add_generation_prompt,
        chat.continue_final,
    )


def offered(chat: ChatRequest) -> list[Tool]:
    """The tools that the prompt tells of: none that the model may not call. Where it must call one,
    all, since they say what the conversation is about."""
    if chat.choice.mode == "none":
        return []
    if chat.choice.mode == "required":
        return list(chat.tools)
    return [tool for tool in chat.tools if tool.name in chat.choice.names]


def said_by_users(turns: Sequence[Turn]) -> list[Turn]:
    """The turns, what the system says behind others as the user's: in one turn with what the user
    says beside it, since templates that want the system first mostly want turns to alternate."""
    begun = next((i for i, turn in enumerate(turns) if turn.role != "system"), len(turns))
    found = list(turns[:begun])
    for spoken, group in groupby(turns[begun:], lambda turn: turn.role in ("system", "user")):
        run = list(group)
        if spoken and any(turn.role == "system" for turn in run):
            parts: list[Part] = []
            for turn in run:
                said = turn.content
                parts += [{"type": "text", "text": said}] if isinstance(said, str) else said
            run = [Turn(role="user", content=parts)]
        found += run
    return found


def native(turns: Sequence[Turn], style: ChatStyle, shape: ToolShape) -> list[Message]:
    """The turns as templates that know tools want them."""
    names = {call.id: call.name for turn in turns for call in turn.calls}
    messages = []
    for turn in turns:
        message = _plain(turn, style)
        if turn.calls:
            message["tool_calls"] = [
                call.for_template(style.ids, shape.text_arguments) for call in turn.calls
            ]
        if turn.role == "tool":
            message["tool_call_id"] = id_for_template(style.ids, turn.answers)
            message.setdefault("name", names.get(turn.answers, ""))
        messages.append(message)
    return messages


def _plain(turn: Turn, style: ChatStyle) -> Message:
    content = turn.content if isinstance(turn.content, str) else [dict(p) for p in turn.content]
    message: Message = {"role": turn.role, "content": content}
    if turn.name:
        message["name"] = turn.name
    # gpt-oss's template refuses a call with thoughts and a text beside it: the text stays.
    if turn.reasoning and not (turn.calls and content and style.reasoning_field == "thinking"):
        message[style.reasoning_field] = turn.reasoning
    if turn.role == "tool":
        message["tool_call_id"] = turn.answers
    return message
