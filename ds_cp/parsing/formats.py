"""How a family writes tool calls, as data: what a grammar needs to force one, and the inverse of
its parser."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

INDEX = "{index}"  # in ``after_name``: the number of the call, from 0


@dataclass(frozen=True)
class TaggedArguments:
    """Arguments that are tagged one by one: ``before_key`` KEY ``after_key`` VALUE ``after_value``,
    any number of times. A value that is a string is written as it is, and so cannot hold
    ``ends_value``, a part of ``after_value``; any other is JSON. ``after_string_key``: what stands
    for ``after_key`` before a string, where that is not the same."""

    before_key: str
    after_key: str
    after_value: str
    ends_value: str
    after_string_key: str | None = None


@dataclass(frozen=True)
class QuotedArguments:
    """Gemma's: like JSON, without white space, with ``quote`` around strings in place of ``"`` and
    without escapes, and nothing around keys."""

    quote: str


@dataclass(frozen=True)
class ToolFormat:
    """One or more calls are ``begin`` CALL (``separator`` CALL)* ``end``; a call is ``before_name``
    NAME ``after_name`` ARGUMENTS ``after_arguments``. All are literal texts, but for ``INDEX`` in
    ``after_name``. ARGUMENTS is JSON by the tool's schema, where ``arguments`` is "json".

    ``parallel``: whether an answer can hold several calls. ``triggers``: literal texts of which one
    begins a call in an answer that may also be content; () where a call is the whole answer.
    ``ends_answer``: the model ends its answer by ``after_arguments``, an end token.
    ``markers``: the texts above and within that a tokenizer may have as one token, special or not;
    they must be in what the parser is fed.
    """

    before_name: str
    after_name: str
    after_arguments: str
    begin: str = ""
    separator: str = ""
    end: str = ""
    arguments: Literal["json"] | TaggedArguments | QuotedArguments = "json"
    parallel: bool = True
    ends_answer: bool = False
    triggers: tuple[str, ...] = ()
    markers: tuple[str, ...] = ()

    def before_arguments(self, name: str, index: int = 0) -> str:
        """What stands before the arguments of a call of ``name``."""
        return f"{self.before_name}{name}{self.after_name.replace(INDEX, str(index))}"

    def render(self, calls: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
        """Calls, as names and arguments, as the model would write them."""
        texts = [
            self.before_arguments(name, i) + self.written(arguments) + self.after_arguments
            for i, (name, arguments) in enumerate(calls)
        ]
        return f"{self.begin}{self.separator.join(texts)}{self.end}"

    def written(self, arguments: Mapping[str, Any]) -> str:
        """The arguments of a call."""
        kind = self.arguments
        if isinstance(kind, TaggedArguments):
            return "".join(_tagged(kind, key, arguments[key]) for key in arguments)
        if isinstance(kind, QuotedArguments):
            return _quoted(kind.quote, dict(arguments))
        return _json(arguments)


@dataclass(frozen=True)
class ReasoningFormat:
    """What stands around reasoning, where a prompt does not hold ``begin`` already. A grammar that
    forces what follows reasoning applies from behind ``end`` and ``after_end``.
    ``before_content``: what begins content, whether or not reasoning came."""

    begin: str
    end: str
    after_end: str = ""
    before_content: str = ""


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _tagged(kind: TaggedArguments, key: str, value: Any) -> str:
    is_text = isinstance(value, str)
    after_key = kind.after_string_key if is_text and kind.after_string_key else kind.after_key
    return (
        f"{kind.before_key}{key}{after_key}{value if is_text else _json(value)}{kind.after_value}"
    )


def _quoted(quote: str, value: Any) -> str:
    if isinstance(value, str):
        return f"{quote}{value}{quote}"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{_quoted(quote, item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(_quoted(quote, item) for item in value) + "]"
    return _json(value)
