"""The parsers by name, and what belongs to each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from ds_cp.errors import ConfigError
from ds_cp.parsing import gemma, harmony, headed, ids, tagged, thinking
from ds_cp.parsing.bare_json import PYTHON_TAG, BareJson
from ds_cp.parsing.calls import Toolbox
from ds_cp.parsing.chain import Chain, Plain
from ds_cp.parsing.events import Parser
from ds_cp.parsing.formats import (
    INDEX,
    QuotedArguments,
    ReasoningFormat,
    TaggedArguments,
    ToolFormat,
)
from ds_cp.parsing.marked_json import MarkedJson
from ds_cp.parsing.mistral import Mistral
from ds_cp.text import closest, show

HARMONY = "harmony"


@dataclass(frozen=True)
class ToolFamily:
    """A parser of tool calls. ``make``: one for an answer. ``ids``: how the family spells ids of
    calls (``ds_cp.parsing.ids``). ``ends_reasoning``: texts that end reasoning that was not
    closed, since models of the family forget to."""

    make: Callable[[Toolbox], Parser]
    format: ToolFormat
    ids: str = ids.OPENAI
    ends_reasoning: tuple[str, ...] = ()


@dataclass(frozen=True)
class ReasoningFamily:
    """A parser of reasoning: a style of marks, or harmony's. ``field``: what templates call the
    reasoning of an earlier answer."""

    style: thinking.Style | None
    format: ReasoningFormat
    field: str = "reasoning_content"


def _json_object(
    begin: str, end: str, key: str = "arguments", separator: str = "\n", whole: bool = False
) -> ToolFormat:
    markers = tuple(mark for mark in (begin.strip(), end.strip()) if mark)
    return ToolFormat(
        f'{begin}{{"name": "', f'", "{key}": ', f"}}{end}", separator=separator,
        triggers=() if whole else (begin.strip(),), markers=markers,
    )  # fmt: skip


def _json_list(begin: str, end: str) -> ToolFormat:
    return ToolFormat(
        '{"name": "', '", "arguments": ', "}", f"{begin}[", ", ", f"]{end}",
        triggers=(begin,), markers=tuple(filter(None, (begin, end))),
    )  # fmt: skip


def _tags(style: tagged.Style, line: str = "\n") -> ToolFormat:
    """``line``: what stands behind each tag but those around a value."""
    begin, end = next(iter(style.sections.items()))
    name_end, key_end = style.name_ends[0], next(iter(style.key_ends))
    around = "\n" if style.trim else ""
    stated = key_end.replace("true", "false")
    return ToolFormat(
        f"{begin}{line}{style.call_begin}", f"{name_end}{line}",
        f"{style.call_end}{line}{end}", separator=line,
        arguments=TaggedArguments(
            style.key_begin, stated + around, around + style.value_end + line, style.value_end,
            key_end + around if stated != key_end else None,
        ),
        triggers=tuple(style.sections), markers=(begin, end),
    )  # fmt: skip


def _in_one_section(found: ToolFormat, line: str = "\n") -> ToolFormat:
    """The same, with all calls within one section."""
    begin, end = found.markers
    return replace(
        found,
        before_name=found.before_name.removeprefix(begin + line),
        after_arguments=found.after_arguments.removesuffix(line + end),
        begin=begin + line,
        end=line + end,
    )


_QWEN_TAG, _QWEN_END = "<tool_call>", "</tool_call>"
_GLM_FORMAT = ToolFormat(
    "<tool_call>", "\n", "</tool_call>", separator="\n",
    arguments=TaggedArguments(
        "<arg_key>", "</arg_key>\n<arg_value>", "</arg_value>\n", "</arg_value>"
    ),
    triggers=("<tool_call>",),
    markers=(
        "<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>",
    ),
)  # fmt: skip


def _headed_format(
    style: headed.Style, before: str, after: str, close: str, separator: str = ""
) -> ToolFormat:
    return ToolFormat(
        style.call_begin + before, after, close + style.call_end,
        style.section_begin, separator, style.section_end, triggers=(style.section_begin,),
        markers=(style.section_begin, style.call_begin, style.separator, style.call_end,
                 style.section_end),
    )  # fmt: skip


def _gemma_format(style: gemma.Style) -> ToolFormat:
    return ToolFormat(
        f"{style.begin}call:", "", style.end, arguments=QuotedArguments(style.quote),
        triggers=(style.begin,), markers=(style.begin, style.end, style.quote),
    )  # fmt: skip


_HARMONY_FORMAT = ToolFormat(
    "<|channel|>commentary to=functions.", " <|constrain|>json<|message|>", "<|call|>",
    parallel=False, ends_answer=True, triggers=("<|channel|>commentary to=functions.",),
    markers=("<|start|>", "<|channel|>", "<|constrain|>", "<|message|>", "<|end|>", "<|call|>",
             "<|return|>"),
)  # fmt: skip
_DEEPSEEK_ENDS = (headed.DEEPSEEK.section_begin,)

TOOL_FAMILIES: Mapping[str, ToolFamily] = {
    "hermes": ToolFamily(
        lambda tools: MarkedJson(tools, _QWEN_TAG, _QWEN_END),
        _json_object("<tool_call>\n", "\n</tool_call>"),
    ),
    "qwen3_coder": ToolFamily(
        lambda tools: tagged.Tagged(tools, tagged.QWEN3_CODER),
        _tags(tagged.QWEN3_CODER),
        ends_reasoning=(_QWEN_TAG,),
    ),
    "seed_oss": ToolFamily(
        lambda tools: tagged.Tagged(tools, tagged.SEED_OSS), _tags(tagged.SEED_OSS)
    ),
    "glm45": ToolFamily(lambda tools: tagged.Tagged(tools, tagged.GLM), _GLM_FORMAT),
    "minimax_m2": ToolFamily(
        lambda tools: tagged.Tagged(tools, tagged.MINIMAX),
        _in_one_section(_tags(tagged.MINIMAX)),
    ),
    "deepseek_v32": ToolFamily(
        lambda tools: tagged.Tagged(tools, tagged.DEEPSEEK_V32),
        _in_one_section(_tags(tagged.DEEPSEEK_V32)),
    ),
    "deepseek_v41": ToolFamily(
        lambda tools: tagged.Tagged(tools, tagged.DEEPSEEK_V41),
        _in_one_section(_tags(tagged.DEEPSEEK_V41)),
    ),
    "deepseek_v3": ToolFamily(
        lambda tools: headed.Headed(tools, headed.DEEPSEEK),
        _headed_format(headed.DEEPSEEK, "function<｜tool▁sep｜>", "\n```json\n", "\n```", "\n"),
        ends_reasoning=_DEEPSEEK_ENDS,
    ),
    "deepseek_v31": ToolFamily(
        lambda tools: headed.Headed(tools, headed.DEEPSEEK),
        _headed_format(headed.DEEPSEEK, "", headed.DEEPSEEK.separator, ""),
        ends_reasoning=_DEEPSEEK_ENDS,
    ),
    "kimi_k2": ToolFamily(
        lambda tools: headed.Headed(tools, headed.KIMI),
        _headed_format(headed.KIMI, "functions.", f":{INDEX}{headed.KIMI.separator}", ""),
        ids.KIMI,
        ends_reasoning=(headed.KIMI.section_begin,),
    ),
    "mistral": ToolFamily(Mistral, _json_list("[TOOL_CALLS]", ""), ids.MISTRAL),
    "mistral_args": ToolFamily(
        Mistral,
        ToolFormat(
            "[TOOL_CALLS]", "[ARGS]", "", triggers=("[TOOL_CALLS]",),
            markers=("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"),
        ),
        ids.MISTRAL,
    ),
    "gemma4": ToolFamily(
        lambda tools: gemma.Gemma(tools, gemma.GEMMA4), _gemma_format(gemma.GEMMA4)
    ),
    "functiongemma": ToolFamily(
        lambda tools: gemma.Gemma(tools, gemma.FUNCTION_GEMMA),
        _gemma_format(gemma.FUNCTION_GEMMA),
    ),
    HARMONY: ToolFamily(harmony.Harmony, _HARMONY_FORMAT),
    "granite": ToolFamily(
        lambda tools: MarkedJson(tools, "<|tool_call|>", "<|/tool_call|>"),  # the end is Phi's
        _json_list("<|tool_call|>", ""),
    ),
    "cohere": ToolFamily(
        lambda tools: MarkedJson(tools, "<|START_ACTION|>", "<|END_ACTION|>"),
        replace(
            _json_list("<|START_ACTION|>", "<|END_ACTION|>"),
            before_name='{"tool_name": "', after_name='", "parameters": ',
        ),
    ),
    "nemotron": ToolFamily(
        lambda tools: MarkedJson(tools, "<TOOLCALL>", "</TOOLCALL>"),
        _json_list("<TOOLCALL>", "</TOOLCALL>"),
    ),
    "jamba": ToolFamily(
        lambda tools: MarkedJson(tools, "<tool_calls>", "</tool_calls>"),
        _json_list("<tool_calls>", "</tool_calls>"),
    ),
    "llama3_json": ToolFamily(
        BareJson,
        replace(
            _json_object("", "", "parameters", "; ", whole=True), markers=(PYTHON_TAG,)
        ),
    ),
    "json": ToolFamily(BareJson, _json_object("", "", whole=True)),
}  # fmt: skip


def _marks(style: thinking.Style) -> ReasoningFamily:
    return ReasoningFamily(style, ReasoningFormat(style.opens[0], style.closes[0]))


REASONING_FAMILIES: Mapping[str, ReasoningFamily] = {
    "think": _marks(thinking.THINK),
    "deepseek_r1": _marks(thinking.DEEPSEEK_R1),
    "seed_oss": _marks(thinking.SEED),
    "magistral": _marks(thinking.MAGISTRAL),
    "gemma4": _marks(thinking.GEMMA4),
    "granite": _marks(thinking.GRANITE),
    "cohere": _marks(thinking.COHERE),
    HARMONY: ReasoningFamily(
        None,
        ReasoningFormat(
            "<|channel|>analysis<|message|>",
            "<|end|>",
            "<|start|>assistant",
            "<|channel|>final<|message|>",
        ),
        "thinking",
    ),
}


def make_parser(
    tool: str | None,
    reasoning: str | None,
    tools: Toolbox,
    prompt_end: str = "",
    continues: bool = False,
) -> Parser:
    """A parser for one answer.

    ``tool``: a name of ``TOOL_FAMILIES``; None where the request has no tools, or may call none:
    then what looks like a call is content. ``reasoning``: of ``REASONING_FAMILIES``, or None.
    ``prompt_end``: the last ``thinking.TAIL_CHARS`` characters of the rendered prompt, which say
    whether the answer begins within reasoning. ``continues``: the prompt ends within an answer,
    with which this one goes on; then ``prompt_end`` begins where that does.
    """
    if tool == HARMONY or (tool is None and reasoning == HARMONY):
        return harmony.Harmony(tools, harmony.open_channel(prompt_end), tool == HARMONY)
    calls = TOOL_FAMILIES[tool].make(tools) if tool else None
    style = REASONING_FAMILIES[reasoning].style if reasoning else None
    if style is None:
        return calls or Plain()
    if tool:
        style = replace(style, ends=TOOL_FAMILIES[tool].ends_reasoning)
    first = thinking.Thinking(style, style.begins(prompt_end, continues))
    return Chain(first, calls) if calls else first


def markers(tool: str | None, reasoning: str | None) -> tuple[str, ...]:
    """Texts that must be in what these parsers are fed, though a tokenizer may have them as special
    tokens, which are not shown otherwise."""
    found = TOOL_FAMILIES[tool].format.markers if tool else ()
    if reasoning == HARMONY:
        found += TOOL_FAMILIES[HARMONY].format.markers
    elif reasoning and (style := REASONING_FAMILIES[reasoning].style):
        found += tuple(mark.strip() for mark in (*style.opens, *style.closes))
        if reasoning == "gemma4":
            found += ("<|channel>",)
    return tuple(dict.fromkeys(found))


def checked_name(name: str, families: Mapping[str, object], key: str) -> str:
    """A name that the operator gave. Raises ``ConfigError`` where there is no such parser; ``key``
    is that of the config."""
    if name in families:
        return name
    near = closest(name, families)
    hint = f"did you mean {show(near)}? " if near else ""
    raise ConfigError(f"{key}: no parser is called {show(name)}; {hint}have {', '.join(families)}")
