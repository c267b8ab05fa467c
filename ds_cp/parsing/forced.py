"""What a grammar must keep so that an answer calls tools as it was told to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ds_cp.parsing import harmony, thinking
from ds_cp.parsing.calls import MAX_CALLS
from ds_cp.parsing.definitions import Tool, ToolChoice
from ds_cp.parsing.formats import INDEX, ToolFormat
from ds_cp.parsing.registry import REASONING_FAMILIES, TOOL_FAMILIES

PLAIN = "json"  # the family that any model can be forced to write


@dataclass(frozen=True)
class CallGrammar:
    """``tool``: the parser that reads the answer. ``structural_tag``: what the answer is, in vLLM's
    shape: ``structures`` of ``begin``, JSON of ``schema`` and ``end``, of which ``triggers`` begin
    one; with ``at_least`` 1 the answer is nothing else, from 1 to ``at_most`` of them.
    Reasoning, where the answer begins with it, comes before and is not constrained."""

    tool: str
    structural_tag: dict[str, Any]


def call_grammar(tool: str, tools: Sequence[Tool], choice: ToolChoice) -> CallGrammar | None:
    """The grammar for a choice of tools; None where the model is free.

    It is free under "none", and under "auto" but for tools that are ``strict``. ``tool``: the name
    of the model's parser. A call that must be made is written in the family's own format if its
    arguments are JSON; else as plain JSON, as if the model had no format.
    """
    chosen = [one for one in tools if one.name in choice.names]
    form = TOOL_FAMILIES[tool].format
    spelt = form.arguments == "json"
    if choice.mode == "none" or not chosen:
        return None
    if choice.mode == "auto":
        # Behind an end of the answer's own there are headers, which free text cannot hold.
        free = spelt and form.triggers and not form.ends_answer
        if not free or not all(one.strict for one in chosen):
            return None
        return CallGrammar(tool, _structures(form, chosen, choice))
    name = tool if spelt else PLAIN
    tag = _structures(TOOL_FAMILIES[name].format, chosen, choice)
    return CallGrammar(name, {"at_most": MAX_CALLS, **tag, "at_least": 1})


@dataclass(frozen=True)
class Opening:
    """What stands before an answer that a grammar forces: ``begin``, free text and ``end`` are
    reasoning, perhaps none of it where that is ``optional``, none at all without an ``end``.
    ``before_content``: then comes this, before content."""

    begin: str = ""
    end: str = ""
    optional: bool = False
    before_content: str = ""


def opening(reasoning: str | None, prompt: str, continues: bool = False) -> Opening:
    """What a grammar must let an answer to the prompt begin with. ``reasoning``: the name of the
    model's parser; ``prompt``, ``continues``: as ``registry.make_parser`` has them."""
    if reasoning is None:
        return Opening()
    family = REASONING_FAMILIES[reasoning]
    form = family.format
    end = form.end + form.after_end
    if family.style is None:
        channel = harmony.open_channel(prompt)
        if channel is None:
            return Opening(form.begin, end, True, form.before_content)
        inside = "analysis" in channel
        return Opening("", end, False, form.before_content) if inside else Opening()
    begins = family.style.begins(prompt, continues)
    if begins == thinking.INSIDE or (begins == thinking.UNKNOWN and family.style.assumed):
        return Opening("", end)
    return Opening(form.begin, end, True) if begins == thinking.UNKNOWN else Opening()


def _structures(form: ToolFormat, tools: Sequence[Tool], choice: ToolChoice) -> dict[str, Any]:
    """Each call stands in a section of its own, where the family has sections."""
    structures = [
        {
            "begin": form.begin + form.before_arguments(tool.name),
            "schema": {"type": "object", **tool.parameters},
            "end": "" if form.ends_answer else form.after_arguments + form.end,
        }
        for tool in tools
    ]
    found: dict[str, Any] = {
        "triggers": list(form.triggers) or [form.before_name],
        "structures": structures,
    }
    once = choice.single or not form.parallel or INDEX in form.after_name
    return found | {"at_most": 1} if once else found
