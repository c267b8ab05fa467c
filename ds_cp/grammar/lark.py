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


_ANY = r"/(.|\n)*/"

Special = Mapping[str, int]  # special tokens, which are in no text, and their ids
NONE: Special = {}


@dataclass(frozen=True)
class JsonOptions:
    """How JSON is written: ``whitespace`` between its tokens or none, of a regex ``pattern``.
    ``lenient``: keywords of a schema that cannot be kept are left out."""

    whitespace: bool = True
    pattern: str | None = None
    lenient: bool = False


@dataclass(frozen=True)
class Thought:
    """Free text before the answer: ``begin``, text, ``end``; perhaps none of it where it is
    ``optional``, none without an ``end``. ``then``: what stands between that and the answer."""

    end: str = ""
    begin: str = ""
    optional: bool = False
    then: str = ""


@dataclass(frozen=True)
class Tag:
    """``begin``, which starts with ``trigger``, then what ``rule`` says, then ``end``."""

    trigger: str
    begin: str
    rule: str
    end: str


def whole(rule: str) -> str:
    """The rules of an answer that is one rule."""
    return f"answer: {rule}\n"


def grammar(
    rules: str,
    thought: Thought | None = None,
    special: Special = NONE,
    or_begins: Sequence[str] = (),
) -> str:
    """The grammar of ``rules``, of which ``answer`` is the first, behind what is thought. In its
    place may be text that begins with one of ``or_begins``, and is free from there on, for special
    tokens too."""
    then = "" if thought is None else _quoted(thought.then, special)
    start, parts = f"{then} answer".strip(), []
    if or_begins:
        begins = " | ".join(_quoted(text, special) for text in or_begins)
        start = f"({start} | other)"
        rest = " | ".join(("OTHER", *(f"<[{number}]>" for number in special.values())))
        parts = [f"other: ({begins}) rest*", f"rest: {rest}", r"OTHER: /(.|\n)+/"]
    if thought is not None and thought.end:
        begin = _quoted(thought.begin, special)
        start = f"thought{'?' if thought.optional else ''} {start}"
        parts += [f"thought: {begin} before BLANKS?", f"BEFORE: {_ANY}", r"BLANKS: /\s{1,8}/"]
        parts += [_head("before", thought.end, special, "BEFORE")]
    return f"{HEADER}start: {start}\n" + "".join(f"{part}\n" for part in parts) + rules


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


def tagged(tags: Sequence[Tag], only_tags: bool, most: int | None, special: Special = NONE) -> str:
    """The rules of text with tags in it: free text up to a trigger, which begins a tag, any number
    of times and then free text again; ``only_tags``: one tag to ``most`` of them, and nothing
    else."""
    rules: list[str] = []
    if only_tags:
        times = "+" if most is None else f"{{1,{most}}}"
        any_tag = " | ".join(f"tag_{i}" for i in range(len(tags)))
        rules += [f"answer: any_tag{times}", f"any_tag: {any_tag}"]
    else:
        triggers = list(dict.fromkeys(tag.trigger for tag in tags))
        any_call = " | ".join(f"call_{i}" for i in range(len(triggers)))
        times = "*" if most is None else f"{{0,{most}}}"
        rules += [f"answer: any_call{times} tail", f"any_call: {any_call}", "tail: TEXT"]
        rules.append(f"TEXT: {_ANY}")
        for i, trigger in enumerate(triggers):
            mine = [f"tag_{n}" for n, tag in enumerate(tags) if tag.trigger == trigger]
            rules += [f"call_{i}: head_{i} ({' | '.join(mine)})"]
            rules += [_head(f"head_{i}", trigger, special)]
    for n, tag in enumerate(tags):
        begin = tag.begin if only_tags else tag.begin[len(tag.trigger) :]
        parts = (_quoted(begin, special), tag.rule, _quoted(tag.end, special))
        rules.append(f"tag_{n}: {' '.join(filter(None, parts))}")
    return "\n".join(rules) + "\n"


def _head(name: str, trigger: str, special: Special, text: str = "TEXT") -> str:
    """A rule of free text, the terminal ``text``, that ends with a trigger. A special token is in
    no text, so that the rule needs not be lazy."""
    lazy = "" if any(token in trigger for token in special) else "[lazy]"
    return f"{name}{lazy}: {text} {_quoted(trigger, special)}"


def _quoted(text: str, special: Special = NONE) -> str:
    """A text, with special tokens by their ids; nothing for ""."""
    for token, number in special.items():
        before, found, after = text.partition(token)
        if found:
            parts = (_quoted(before, special), f"<[{number}]>", _quoted(after, special))
            return " ".join(filter(None, parts))
    return json.dumps(text, ensure_ascii=False) if text else ""
