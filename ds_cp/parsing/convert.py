"""Values that a format writes as plain text, as JSON, by the schema of their tool."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

from ds_cp.parsing.calls import MAX_HELD
from ds_cp.parsing.held import HeldText
from ds_cp.parsing.json_reader import MAX_NUMBER, NUMBER, is_json
from ds_cp.parsing.machine import SPACE

MAX_CHOICES = 64  # schemas that are looked at for the types of one value


def types_of(schema: Any, root: Any) -> frozenset[str]:
    """The JSON types that a schema admits; none where it does not say. ``root``: the schema that
    references point into."""
    found: set[str] = set()
    todo, seen = [schema], 0
    while todo and seen < MAX_CHOICES:
        node = todo.pop()
        seen += 1
        if not isinstance(node, Mapping):
            continue
        stated = node.get("type")
        if isinstance(stated, str):
            found.add(stated)
        elif isinstance(stated, list):
            found.update(t for t in stated if isinstance(t, str))
        elif isinstance(node.get("enum"), list) or "const" in node:
            values = [node["const"]] if "const" in node else node["enum"]
            found.update(map(_type_of, values[:MAX_CHOICES]))
        if node.get("nullable") is True:
            found.add("null")
        for key in ("anyOf", "oneOf", "allOf"):
            if isinstance(node.get(key), list):
                todo += node[key][:MAX_CHOICES]
        if isinstance(node.get("$ref"), str):
            todo.append(_referred(node["$ref"], root))
    return frozenset(found)


def parameter_types(schema: Mapping[str, Any] | None, name: str) -> frozenset[str]:
    """The JSON types of the parameter ``name`` of a tool with this schema."""
    properties = schema.get("properties") if schema else None
    if not isinstance(properties, Mapping) or name not in properties:
        return frozenset()
    return types_of(properties[name], schema)


def _type_of(value: Any) -> str:
    if value is None:
        return "null"
    names = {bool: "boolean", str: "string", int: "integer", float: "number", list: "array"}
    return names.get(type(value), "object")


def _referred(reference: str, root: Any) -> Any:
    node = root
    if not reference.startswith("#/"):
        return None
    for part in reference[2:].split("/")[:MAX_CHOICES]:
        part = part.replace("~1", "/").replace("~0", "~")
        node = node.get(part) if isinstance(node, Mapping) else None
    return node


def as_json(text: str, types: frozenset[str]) -> str:
    """The JSON of a value that is written as ``text``: of the first of its types that it fits, else
    a string. Without types, JSON is taken as it is."""
    bare = text.strip(SPACE)
    if not types:
        return bare if is_json(bare, '{["-0123456789tfn') else json.dumps(text, ensure_ascii=False)
    return next(_fitting(bare, types), None) or json.dumps(text, ensure_ascii=False)


def _fitting(bare: str, types: frozenset[str]) -> Iterator[str]:
    if "null" in types and bare in ("null", "None"):
        yield "null"
    if "boolean" in types and bare.lower() in ("true", "false"):
        yield bare.lower()
    if len(bare) <= MAX_NUMBER and types & {"integer", "number"}:
        if NUMBER.fullmatch(bare):
            if "number" in types or not set(bare) & set(".eE"):
                yield bare
        if number := _number(bare, types):
            yield number
    if "object" in types and is_json(bare, "{") or "array" in types and is_json(bare, "["):
        yield bare


def _number(bare: str, types: frozenset[str]) -> str | None:
    """A number that is not spelt as JSON has it: ``3.0`` for an integer, ``.5``, ``+1``."""
    try:
        number = float(bare)
    except ValueError:
        return None
    if "_" in bare or not math.isfinite(number):
        return None
    if number.is_integer() and "integer" in types and abs(number) < 1 << 53:
        return str(int(number))
    return repr(number) if "number" in types else None


class ValueText:
    """A value that arrives as text in pieces, as JSON. One that can only be a string is passed on
    at once; another is held until it ends, unless it has more than ``MAX_HELD`` characters: then it
    is a string. ``trim``: the line break at the beginning and the one at the end are none of it.
    """

    def __init__(self, types: frozenset[str], trim: bool) -> None:
        self._types = types
        self._trim = trim
        self._held = HeldText()
        self._streams = types == {"string"}
        self._first = True  # nothing of the value has come
        self._last = ""  # a line break that may be the last
        self._quoted = False

    def push(self, text: str) -> str:
        """JSON that is certain now."""
        if not text:
            return ""
        if self._trim:
            if self._first:
                text = text.removeprefix("\n")
                self._first = False
            text = self._last + text
            self._last = "\n" if text.endswith("\n") else ""
            text = text.removesuffix("\n")
        if self._streams:
            return self._quote(text)
        self._held.append(text)
        if self._held.chars <= MAX_HELD:
            return ""
        self._streams = True
        return self._quote(self._held.take())

    def end(self) -> str:
        """The rest of the JSON."""
        if self._streams:
            return self._quote("") + '"'
        return as_json(self._held.take(), self._types)

    def _quote(self, text: str) -> str:
        begin = "" if self._quoted else '"'
        self._quoted = True
        return begin + json.dumps(text, ensure_ascii=False)[1:-1]
