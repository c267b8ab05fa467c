"""Grammars as text in Lark's syntax as llguidance reads it. Pure text; nothing is checked here."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ds_cp.grammar.limits import MAX_WHITESPACE

# Tokens that only one text allows are masked as all others are: which of its spellings comes is
# then the model's choice, and no rank needs the tokenizer, only what each token spells.
HEADER = '%llguidance {"no_forcing": true}\n'
# Bounded: a small model may never end a run of blanks.
WHITESPACE = rf"[\x20\x0A\x0D\x09]{{1,{MAX_WHITESPACE}}}"


@dataclass(frozen=True)
class JsonOptions:
    """How JSON is written: ``whitespace`` between its tokens or none, of a regex ``pattern``.
    ``lenient``: keywords of a schema that cannot be kept are left out."""

    whitespace: bool = True
    pattern: str | None = None
    lenient: bool = False


@dataclass(frozen=True)
class Tag:
    """``begin``, which starts with ``trigger``, then what ``rule`` says, then ``end``."""

    trigger: str
    begin: str
    rule: str
    end: str


def whole(rule: str) -> str:
    """The grammar of an answer that is one rule."""
    return f"{HEADER}start: {rule}\n"


def json_rule(schema: Mapping[str, Any], options: JsonOptions) -> str:
    """JSON that a schema accepts, keys in the schema's order."""
    own: dict[str, Any] = {"whitespace_flexible": options.whitespace}
    if options.whitespace:
        own["whitespace_pattern"] = options.pattern or WHITESPACE
    if options.lenient:
        own |= {"lenient": True, "coerce_one_of": True}
    text = json.dumps(
        {**schema, "x-guidance": own}, ensure_ascii=False, allow_nan=False, separators=(",", ":")
    )
    return f"%json {text}"


def regex_rule(regex: str) -> str:
    """Text that a regex matches whole."""
    parts, escaped = [], False
    for char in regex:
        if char == "/" and not escaped:
            char = r"\/"
        elif char == "\n":
            char = "n" if escaped else r"\n"
        escaped = char == "\\" and not escaped
        parts.append(char)
    return f"/{''.join(parts)}/" if parts else "/(?:)/"


def choice_rule(texts: Sequence[str]) -> str:
    """One of these texts."""
    return " | ".join(map(_quoted, texts))


def tagged(tags: Sequence[Tag], only_tags: bool, most: int | None) -> str:
    """Text with tags in it: free text up to a trigger, which begins a tag, any number of times and
    then free text again; ``only_tags``: one tag to ``most`` of them, and nothing else."""
    if only_tags:
        times = "+" if most is None else f"{{1,{most}}}"
        any_tag = " | ".join(f"tag_{i}" for i in range(len(tags)))
        rules = [f"start: any_tag{times}", f"any_tag: {any_tag}"]
        rules += [
            f"tag_{i}: {_quoted(tag.begin)} {tag.rule}{_after(tag.end)}"
            for i, tag in enumerate(tags)
        ]
        return HEADER + "\n".join(rules) + "\n"
    triggers = list(dict.fromkeys(tag.trigger for tag in tags))
    any_call = " | ".join(f"call_{i}" for i in range(len(triggers)))
    times = "*" if most is None else f"{{0,{most}}}"
    rules = [f"start: any_call{times} tail", f"any_call: {any_call}", "tail: TEXT"]
    rules.append(r"TEXT: /(.|\n)*/")
    for i, trigger in enumerate(triggers):
        mine = [n for n, tag in enumerate(tags) if tag.trigger == trigger]
        options = " | ".join(f"tag_{n}" for n in mine)
        rules.append(f"call_{i}: head_{i} ({options})")
        rules.append(f"head_{i}[lazy]: TEXT {_quoted(trigger)}")
    for n, tag in enumerate(tags):
        rest = tag.begin[len(tag.trigger) :]
        rules.append(f"tag_{n}:{_after(rest)} {tag.rule}{_after(tag.end)}")
    return HEADER + "\n".join(rules) + "\n"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _after(text: str) -> str:
    return f" {_quoted(text)}" if text else ""
