"""A chat request, whatever the protocol it came by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ds_cp.parsing.definitions import Tool, ToolChoice
from ds_cp.parsing.history import EarlierCall
from ds_cp.sampling_params import RequestOptions, SamplingParams

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
Role = Literal["system", "user", "assistant", "tool"]
Part = Mapping[str, str]  # {"type": "text", "text": ...}
NO_TOOLS = ToolChoice("none")


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One message. ``content``: text, or text parts as the client sent them.

    ``reasoning``, ``calls``: of an assistant, what it thought and the tools that it called.
    ``answers``: of a tool's result, the id of the call, which an earlier turn has.
    """

    role: Role
    content: str | Sequence[Part] = ""
    name: str | None = None
    reasoning: str = ""
    calls: Sequence[EarlierCall] = ()
    answers: str = ""


def first_unasked(turns: Sequence[Turn]) -> int | None:
    """The index of the first result of a call that no earlier turn makes; None where every result
    has its call. A call may be left unanswered, since clients cut conversations."""
    asked: set[str] = set()
    for index, turn in enumerate(turns):
        asked.update(call.id for call in turn.calls)
        if turn.role == "tool" and turn.answers not in asked:
            return index
    return None


@dataclass(frozen=True, kw_only=True)
class FieldNames:
    """What the protocol calls the fields that errors name."""

    messages: str = "messages"
    max_tokens: str = "max_tokens"
    tools: str = "tools"
    tool_choice: str = "tool_choice"
    template_kwargs: str = "chat_template_kwargs"
    effort: str = "reasoning_effort"


@dataclass(frozen=True, kw_only=True)
class ChatRequest:
    """What ``start.start_chat`` renders and runs.

    ``params``: ``structured_outputs`` is what the client wants the content to be; what tools and
    reasoning add to it is added later. ``tools`` and ``choice``: read by ``parsing.definitions``.
    ``template_kwargs``: the client's, over those of the config. ``effort``: of reasoning; None
    where the client does not say. ``continue_final``: the answer goes on with the last turn, an
    assistant's, and is not a new one. ``clamp``: ``max_tokens`` is lowered to what fits.
    ``moves_system``: what the system says behind other turns may be said by the user, where the
    template takes no such turn; else the template's refusal is told.
    """

    turns: Sequence[Turn]
    params: SamplingParams
    options: RequestOptions = field(default_factory=RequestOptions)
    tools: Sequence[Tool] = ()
    choice: ToolChoice = NO_TOOLS
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    effort: Effort | None = None
    add_generation_prompt: bool = True
    continue_final: bool = False
    stream: bool = False
    clamp: bool = False
    moves_system: bool = False
    names: FieldNames = field(default_factory=FieldNames)
