"""Markdown tables, and JSON schemas in a few words."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Schema = Mapping[str, Any]
# Bounds of a schema and how they are said.
_BOUNDS = (
    ("minimum", "at least {}"), ("exclusiveMinimum", "above {}"), ("maximum", "at most {}"),
    ("exclusiveMaximum", "below {}"), ("minLength", "at least {} characters"),
    ("maxLength", "at most {} characters"), ("minItems", "at least {} items"),
    ("maxItems", "at most {} items"), ("maxProperties", "at most {} entries"),
)  # fmt: skip


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table; a bar in a cell is escaped."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(" ".join(c.split()).replace("|", "\\|") for c in cells) + " |"

    return [line(heads), "|" + "---|" * len(heads), *map(line, rows)]


def words(schema: Schema, definitions: Mapping[str, Schema]) -> str:
    """What a value may be: its type and its bounds."""
    if "$ref" in schema:
        name = str(schema["$ref"]).rpartition("/")[2]
        inner = definitions.get(name, {})
        return words(inner, definitions) if "properties" not in inner else f"object `{name}`"
    if "anyOf" in schema:
        found = dict.fromkeys(words(one, definitions) for one in schema["anyOf"])
        return " or ".join(found)
    if "enum" in schema:
        return ", ".join(f"`{json.dumps(value)}`" for value in schema["enum"])
    if "const" in schema:
        return f"`{json.dumps(schema['const'])}`"
    kind = schema.get("type", "anything")
    text = " or ".join(kind) if isinstance(kind, list) else str(kind)
    if text == "array" and schema.get("items"):
        text = f"array of {words(schema['items'], definitions)}"
    bounds = [said.format(number(schema[key])) for key, said in _BOUNDS if key in schema]
    if "minimum" in schema and "maximum" in schema:
        bounds[:2] = [f"{number(schema['minimum'])} to {number(schema['maximum'])}"]
    return ", ".join([text, *bounds])


def number(value: float) -> str:
    """A bound as people write it."""
    whole = int(value)
    return f"{whole:,}" if whole == value else f"{value:g}"
