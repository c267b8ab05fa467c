"""What a grammar must keep so that an answer calls tools as it was told to."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from ds_cp.parsing.definitions import Tool, ToolChoice
from ds_cp.parsing.formats import INDEX, ToolFormat
from ds_cp.parsing.registry import TOOL_FAMILIES

PLAIN = "json"  # the family that any model can be forced to write


@dataclass(frozen=True)
class CallGrammar:
    """``tool``: the parser that reads the answer. ``structural_tag``: what the answer is, in vLLM's
    shape: ``structures`` of ``begin``, JSON of ``schema`` and ``end``, of which ``triggers`` begin
    one; with ``at_least`` 1 the answer is nothing else, from 1 to ``at_most`` (or any number) of
    them. Reasoning, where the answer begins with it, comes before and is not constrained."""

    tool: str
    structural_tag: dict[str, Any]


def call_grammar(
    tool: str, tools: Sequence[Tool], choice: ToolChoice, special_tokens: Collection[str] = ()
) -> CallGrammar | None:
    """The grammar for a choice of tools; None where the model is free.

    It is free under "none", and under "auto" but for tools that are ``strict``. ``tool``: the name
    of the model's parser. A call that must be made is written in the family's own format if its
    arguments are JSON and none of its marks is one of ``special_tokens``, which a grammar over text
    cannot name; else as plain JSON, as if the model had no format.
    """
    chosen = [one for one in tools if one.name in choice.names]
    form = TOOL_FAMILIES[tool].format
    spelt = form.arguments == "json" and not _marks(form) & set(special_tokens)
    if choice.mode == "none" or not chosen:
        return None
    if choice.mode == "auto":
        if not spelt or not form.triggers or not all(one.strict for one in chosen):
            return None
        return CallGrammar(tool, _structures(form, chosen, choice))
    name = tool if spelt else PLAIN
    tag = _structures(TOOL_FAMILIES[name].format, chosen, choice)
    return CallGrammar(name, tag | {"at_least": 1})


def _marks(form: ToolFormat) -> set[str]:
    whole = form.begin + form.before_arguments("") + form.after_arguments + form.end
    return {mark for mark in form.markers if mark in whole}


def _structures(form: ToolFormat, tools: Sequence[Tool], choice: ToolChoice) -> dict[str, Any]:
    """Each call stands in a section of its own, where the family has sections."""
    structures = [
        {
            "begin": form.begin + form.before_arguments(tool.name),
            "schema": dict(tool.parameters),
            "end": form.after_arguments + form.end,
        }
        for tool in tools
    ]
    found: dict[str, Any] = {
        "triggers": list(form.triggers) or [form.before_name],
        "structures": structures,
    }
    once = choice.single or not form.parallel or INDEX in form.after_name
    return found | {"at_most": 1} if once else found
