"""Which parsers fit a model, by its chat template: what a template writes is what the model was
trained to write."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from ds_cp.parsing.registry import (
    HARMONY,
    REASONING_FAMILIES,
    TOOL_FAMILIES,
    checked_name,
)
from ds_cp.text import show

AUTO, NONE = "auto", "none"
_Rules = Sequence[tuple[str, tuple[str, ...]]]
# The name of a parser, and texts that a template has which wants it: all of them. The first rule
# that holds counts, so what is more special comes first.
_TOOL_RULES: _Rules = (
    (HARMONY, ("<|channel|>", "<|message|>")),
    ("gemma4", ("<|tool_call>",)),
    ("functiongemma", ("<start_function_call>",)),
    ("deepseek_v41", ("｜DSML｜ ",)),
    ("deepseek_v32", ("｜DSML｜",)),
    ("deepseek_v3", ("<｜tool▁call▁begin｜>", "```json")),
    ("deepseek_v31", ("<｜tool▁call▁begin｜>",)),
    ("kimi_k2", ("<|tool_calls_section_begin|>",)),
    ("minimax_m2", ("<minimax:tool_call>",)),
    ("seed_oss", ("<seed:tool_call>",)),
    ("glm45", ("<arg_key>",)),
    ("qwen3_coder", ("<function=", "<parameter=")),
    ("mistral_args", ("[TOOL_CALLS]", "[ARGS]")),
    ("mistral", ("[TOOL_CALLS]",)),
    ("cohere", ("<|START_ACTION|>",)),
    ("nemotron", ("<TOOLCALL>",)),
    ("jamba", ("<tool_calls>",)),
    ("granite", ("<|tool_call|>",)),
    ("hermes", ("<tool_call>",)),
    ("llama3_json", ("<|python_tag|>",)),
    ("llama3_json", ("ipython", '"parameters"')),
)
# Where the template says that it renders tools but not how a call is spelt.
_TOKEN_RULES: _Rules = (
    ("kimi_k2", ("<|tool_calls_section_begin|>",)),
    ("mistral_args", ("[TOOL_CALLS]", "[ARGS]")),
    ("mistral", ("[TOOL_CALLS]",)),
    ("gemma4", ("<|tool_call>",)),
    ("granite", ("<|tool_call|>",)),
    ("llama3_json", ("<|python_tag|>",)),
)
_REASONING_RULES: _Rules = (
    (HARMONY, ("<|channel|>", "<|message|>")),
    ("gemma4", ("<|channel>",)),
    ("magistral", ("[THINK]",)),
    ("seed_oss", ("<seed:think>",)),
    ("cohere", ("<|START_THINKING|>",)),
    ("granite", ("Here is my thought process",)),
    ("deepseek_r1", ("</think>", "<｜Assistant｜>")),
    ("think", ("<think>",)),
    ("think", ("</think>",)),
)
_TOOLS = re.compile(r"\btools\b")


@dataclass(frozen=True)
class Chosen:
    """Parsers by name; None for none. ``renders_tools``: the template writes a request's tools into
    the prompt; where not, the prompt must be told of them (``ds_cp.parsing.instructions``).
    ``notes``: lines for the operator at start."""

    tool: str | None
    reasoning: str | None
    renders_tools: bool
    notes: tuple[str, ...] = ()


def choose(
    template: str | None,
    special_tokens: Collection[str] = (),
    *,
    tool: str = AUTO,
    reasoning: str = AUTO,
) -> Chosen:
    """The parsers for a model with this chat template and these special and added tokens.

    ``tool``, ``reasoning``: names from the config that override what is found; "none" for none.
    Raises ``ConfigError`` for an unknown name.
    """
    text = template or ""
    tokens = "\n".join(special_tokens)
    renders_tools = bool(_TOOLS.search(text))
    notes = []
    if tool == AUTO:
        found, mark = _first(_TOOL_RULES, text)
        if found is None and renders_tools:
            found, mark = _first(_TOKEN_RULES, tokens)
        if found is not None:
            notes.append(f"tool calls are read as {found}: the chat template has {show(mark)}")
        elif template is not None:
            found = "json"
            how = "does not say how calls are written" if renders_tools else "knows no tools"
            notes.append(f"tool calls are read as json: the chat template {how}")
        chosen_tool = found
    else:
        chosen_tool = _named(tool, TOOL_FAMILIES, "server.tool_parser")
        notes.append(f"tool calls are read as {tool}: server.tool_parser")
    if reasoning == AUTO:
        chosen_reasoning, mark = _first(_REASONING_RULES, text)
        if chosen_reasoning is not None:
            notes.append(
                f"reasoning is read as {chosen_reasoning}: the chat template has {show(mark)}"
            )
    else:
        chosen_reasoning = _named(reasoning, REASONING_FAMILIES, "server.reasoning_parser")
        notes.append(f"reasoning is read as {reasoning}: server.reasoning_parser")
    return Chosen(chosen_tool, chosen_reasoning, renders_tools, tuple(notes))


def _first(rules: _Rules, text: str) -> tuple[str | None, str]:
    for name, marks in rules:
        if all(mark in text for mark in marks):
            return name, marks[0]
    return None, ""


def _named(name: str, families: Mapping[str, object], key: str) -> str | None:
    return None if name == NONE else checked_name(name, families, key)
