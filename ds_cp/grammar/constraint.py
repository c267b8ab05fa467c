"""What a caller asks an answer to look like: vLLM's ``structured_outputs``, checked and bounded.

Every size is bounded before the grammar is compiled, and what is compiled is bounded again, in
``limits``. No torch, and no llguidance.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ds_cp.errors import RequestError
from ds_cp.grammar import lark
from ds_cp.grammar.limits import (
    MAX_CHOICES,
    MAX_DEPTH,
    MAX_ENUM,
    MAX_REGEX_CHARS,
    MAX_REPEAT,
    MAX_SOURCE_BYTES,
    MAX_TAGS,
    MAX_VALUES,
)
from ds_cp.text import JsonError, nearest, parse_json, shorten, show

FIELD = "structured_outputs"  # the field of SamplingParams, as errors name it
MAX_INTEGER_BITS = 1024  # of an integer in a schema
KINDS = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")
# No two neighbours match the same text, so that it is linear in texts that are made to hurt.
_REPEAT = re.compile(r"\{\s*([0-9]+)\s*(?:,\s*(?:([0-9]+)\s*)?)?\}", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class StructuredOutputsParams:
    """What the whole answer must be; exactly one of the first six. Field names are vLLM's.

    Raises ``RequestError`` naming the field when a value is of another kind or too large. Whether
    the grammar can be kept is only known when it is compiled (``checker``).

    json: a JSON schema, as an object or as text. Every keyword is kept exactly or is refused by
        name, except under ``lenient``.
    regex: the whole answer matches it; Rust's syntax, which has no look-around and no
        back-references.
    choice: the answer is one of these strings.
    grammar: a context-free grammar in Lark's or GBNF's syntax, from ``start`` or ``root``.
    json_object: true: any JSON object.
    structural_tag: free text in which each trigger begins a tag with JSON of a schema in it:
        ``{"triggers": [..], "structures": [{"begin", "schema", "end"}, ..]}``. With ``"at_least":
        1`` there is no free text: the answer is tags, one to ``at_most``.
    disable_any_whitespace: JSON is written without white space between its tokens.
    whitespace_pattern: the regex of white space between the tokens of JSON.
    lenient: keywords that cannot be kept are left out, formats too, as OpenAI's ``strict: false``.
    thought: the server's own: the reasoning that may come before.
    or_begins: the server's own: or the answer begins with one of these, and is free from there on,
        as a tool call is.
    special_tokens: the server's own: ids of tokens that are in no text, by their names, in
        ``thought``, in ``or_begins``, and in what begins and ends tags.
    asked_as: the field by which a client asked for it, as later errors name it.
    source: the grammar as Lark's text; under ``grammar`` as it was given, to be converted when it
        is compiled.
    """

    json: str | Mapping[str, Any] | bool | None = None
    regex: str | None = None
    choice: Collection[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: str | Mapping[str, Any] | None = None
    disable_any_whitespace: bool = False
    whitespace_pattern: str | None = None
    lenient: bool = False
    thought: lark.Thought | None = None
    or_begins: Collection[str] = ()
    special_tokens: Mapping[str, int] = field(default_factory=dict)
    asked_as: str = FIELD
    source: str = field(init=False, repr=False)

    def __post_init__(self) -> None:
        asked = [name for name in KINDS if getattr(self, name) not in (None, False)]
        if len(asked) != 1:
            raise _error(
                f"{FIELD} needs exactly one of {', '.join(KINDS)}; it has {', '.join(asked) or 0}"
            )
        for name in ("disable_any_whitespace", "lenient"):
            if not isinstance(getattr(self, name), bool):
                raise _error(f"{FIELD}.{name} must be true or false")
        source = getattr(self, f"_{asked[0]}")()
        size = len(_utf8(source))
        if size > MAX_SOURCE_BYTES:
            raise _error(
                f"{FIELD}.{asked[0]} makes a grammar of {size} bytes; "
                f"at most {MAX_SOURCE_BYTES}: make it smaller"
            )
        object.__setattr__(self, "source", source)  # the dataclass is frozen

    @property
    def is_foreign(self) -> bool:
        """Whether ``source`` is the caller's own grammar, not Lark's text made here."""
        return self.grammar is not None

    # --- one for each kind: the source

    def _json(self) -> str:
        schema = self.json
        if isinstance(schema, str):
            schema = _parsed("json", schema)
        return self._whole(lark.json_rule(_schema("json", schema), self._options()))

    def _json_object(self) -> str:
        if self.json_object is not True:
            raise _error(f"{FIELD}.json_object must be true or left out")
        return self._whole(lark.json_rule({"type": "object"}, self._options()))

    def _regex(self) -> str:
        return self._whole(lark.regex_rule(_regex("regex", self.regex)))

    def _choice(self) -> str:
        texts = self.choice
        if isinstance(texts, str | Mapping) or not isinstance(texts, Collection):
            raise _error(f"{FIELD}.choice must be a list of strings")
        if not 1 <= len(texts) <= MAX_CHOICES:
            raise _error(f"{FIELD}.choice has {len(texts)} strings; 1 to {MAX_CHOICES}")
        if not all(isinstance(text, str) and text for text in texts):
            raise _error(f"{FIELD}.choice must be a list of strings with at least one character")
        return self._whole(lark.choice_rule(list(texts)))

    def _grammar(self) -> str:
        if not isinstance(self.grammar, str) or not self.grammar.strip():
            raise _error(f"{FIELD}.grammar must be the text of a grammar")
        _check_size("grammar", self.grammar)
        if "%llguidance" in self.grammar:
            raise _error(f"{FIELD}.grammar: %llguidance is the server's own; leave it out")
        if self.or_begins:
            raise _error(f"{FIELD}.grammar cannot stand beside tools; say json, regex or choice")
        if self.thought is not None:
            raise _error(f"{FIELD}.grammar cannot come after reasoning; say json, regex or choice")
        for repeat in _repeats(self.grammar):
            _check_repeat("grammar", repeat)
        return self.grammar

    def _structural_tag(self) -> str:
        value: Any = self.structural_tag
        if isinstance(value, str):
            value = _parsed("structural_tag", value)
        if not isinstance(value, Mapping):
            raise _error(f"{FIELD}.structural_tag must be an object")
        tags, triggers = value.get("structures"), value.get("triggers")
        least, most = value.get("at_least", 0), value.get("at_most")
        if not isinstance(tags, list) or not 1 <= len(tags) <= MAX_TAGS:
            raise _error(f"{FIELD}.structural_tag.structures must be a list of 1 to {MAX_TAGS}")
        if not isinstance(triggers, list) or not 1 <= len(triggers) <= MAX_TAGS:
            raise _error(f"{FIELD}.structural_tag.triggers must be a list of 1 to {MAX_TAGS}")
        if not all(isinstance(text, str) and text for text in triggers):
            raise _error(f"{FIELD}.structural_tag.triggers must be strings")
        if least not in (0, 1) or not (most is None or type(most) is int and 1 <= most <= MAX_TAGS):
            raise _error(
                f"{FIELD}.structural_tag: at_least is 0 or 1, at_most from 1 to {MAX_TAGS}"
            )
        found = []
        for tag in tags:
            if not isinstance(tag, Mapping):
                raise _error(f"{FIELD}.structural_tag.structures must be objects")
            begin, end = tag.get("begin"), tag.get("end", "")
            if not isinstance(begin, str) or not isinstance(end, str):
                raise _error(f"{FIELD}.structural_tag: begin and end must be strings")
            trigger = next((text for text in triggers if begin.startswith(text)), None)
            if trigger is None:
                raise _error(f"{FIELD}.structural_tag: {show(begin)} begins with no trigger")
            schema = _schema("structural_tag", tag.get("schema", {}))
            found.append(lark.Tag(trigger, begin, lark.json_rule(schema, self._options()), end))
        rules = lark.tagged(found, bool(least), most, self.special_tokens)
        return self._behind_thought(rules)

    def _whole(self, rule: str) -> str:
        return self._behind_thought(lark.whole(rule))

    def _behind_thought(self, rules: str) -> str:
        return lark.grammar(rules, self.thought, self.special_tokens, tuple(self.or_begins))

    def _options(self) -> lark.JsonOptions:
        pattern = self.whitespace_pattern
        if pattern is not None and self.disable_any_whitespace:
            raise _error(
                f"{FIELD}.whitespace_pattern and disable_any_whitespace exclude each other"
            )
        if pattern is not None:
            pattern = _regex("whitespace_pattern", pattern)
        return lark.JsonOptions(not self.disable_any_whitespace, pattern, self.lenient)


def as_params(value: object) -> StructuredOutputsParams | None:
    """``SamplingParams.structured_outputs`` from what a caller gives: its own kind, vLLM's fields
    as a mapping, or nothing. Raises ``RequestError``."""
    if value is None or isinstance(value, StructuredOutputsParams):
        return value
    if not isinstance(value, Mapping):
        raise _error(f"{FIELD} must be an object, not a {type(value).__name__}")
    known = [*KINDS, "disable_any_whitespace", "whitespace_pattern", "lenient"]
    for name in value:
        if name not in known:
            near = nearest(str(name), known, known)
            raise _error(f"{FIELD} has no field {shorten(str(name), 40)}; the nearest is {near}")
    given = {name: each for name, each in value.items() if each is not None}
    return StructuredOutputsParams(**given) if given else None


def _error(message: str) -> RequestError:
    return RequestError(message, FIELD)


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise _error(f"{FIELD}: half a surrogate pair is not text") from None


def _check_size(name: str, text: str) -> None:
    if len(text) > MAX_SOURCE_BYTES:
        raise _error(f"{FIELD}.{name} has {len(text)} characters; at most {MAX_SOURCE_BYTES}")


def _parsed(name: str, text: str) -> Any:
    """JSON given as text. Its size is looked at first."""
    _check_size(name, text)
    try:
        return parse_json(text)
    except JsonError as err:
        raise _error(f"{FIELD}.{name} is {err}") from None


def _schema(name: str, schema: object) -> dict[str, Any]:
    """A JSON schema within the bounds. The library reads it once more, so that only sizes and what
    would get past it are looked at here."""
    if schema is True:
        return {}
    if not isinstance(schema, Mapping):
        raise _error(f"{FIELD}.{name} must be a JSON schema: an object")
    values = count = 0
    for depth, key, value in _walk(schema):
        count += len(value) if isinstance(value, Mapping | list | tuple) else 0
        if count > MAX_VALUES:
            raise _error(f"{FIELD}.{name} has more than {MAX_VALUES} values")
        if depth > MAX_DEPTH:
            raise _error(f"{FIELD}.{name} is nested more than {MAX_DEPTH} levels deep")
        if key == "enum" and isinstance(value, list):
            values += len(value)
            if values > MAX_ENUM:
                raise _error(f"{FIELD}.{name} has more than {MAX_ENUM} values of enum")
        elif key == "pattern" and isinstance(value, str):
            _regex(name, value)
        elif isinstance(value, int) and value.bit_length() > MAX_INTEGER_BITS:
            raise _error(f"{FIELD}.{name} has an integer of {value.bit_length()} bits")
        elif isinstance(value, Mapping) and not all(isinstance(key, str) for key in value):
            raise _error(f"{FIELD}.{name} has a key that is not a string")
        elif isinstance(value, float) and (value != value or abs(value) == float("inf")):
            raise _error(f"{FIELD}.{name} has a number that JSON does not know")
        elif not isinstance(value, str | int | float | list | tuple | Mapping | None):
            raise _error(f"{FIELD}.{name} has a {type(value).__name__}, which JSON does not know")
    return {**schema}


def _walk(value: Mapping[str, Any]) -> Iterator[tuple[int, str, Any]]:
    """Depth, key and value of everything in a schema, without recursion."""
    stack: list[tuple[int, str, Any]] = [(1, "", value)]
    while stack:
        depth, key, one = stack.pop()
        yield depth, key, one
        if depth > MAX_DEPTH:
            return
        if isinstance(one, Mapping):
            stack += ((depth + 1, str(name), each) for name, each in one.items())
        elif isinstance(one, list | tuple):
            stack += ((depth + 1, "", each) for each in one)


def _regex(name: str, text: object) -> str:
    if not isinstance(text, str) or len(text) > MAX_REGEX_CHARS:
        raise _error(f"{FIELD}.{name}: a regex is a string of at most {MAX_REGEX_CHARS} characters")
    if (len(text) - len(text.rstrip("\\"))) % 2:
        raise _error(f"{FIELD}.{name}: the regex ends with half an escape")
    for repeat in _repeats(text):
        _check_repeat(name, repeat)
    return text


def _repeats(text: str) -> Iterator[str]:
    for match in _REPEAT.finditer(text):
        yield from (number for number in match.groups() if number)


def _check_repeat(name: str, number: str) -> None:
    if len(number) > 9 or int(number) > MAX_REPEAT:
        raise _error(f"{FIELD}.{name} repeats something {number[:12]} times; at most {MAX_REPEAT}")
