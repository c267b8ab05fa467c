"""Random JSON schemas whose answers are short, from a seed; and a tokenizer's vocabulary."""

from __future__ import annotations

import random
from typing import Any

Schema = dict[str, Any]
NAMES = ("a", "bé", "long name", 'q"', "x/y", "z\\", "名", "n0", "tab\t")
PATTERNS = ("^a{1,3}$", "^[0-9]{2}-[a-f]{2}$", "^(x|yy)(z|é)$", '^[^"\\\\]{0,3}$', "ab")
CONSTS: tuple[Any, ...] = ("a", "né\n", 0, -17, 2.5, True, None, [], [1, "x"], {"k": [None]})


class Schemas:
    """Draws schemas. Every one has answers, and few of more than 200 characters."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)

    def draw(self) -> Schema:
        """A whole schema; its definitions are used at most once or twice."""
        rng = self._rng
        schema = self._any(3)
        if rng.random() < 0.2:
            schema = {
                "type": "object",
                "properties": {"d": {"$ref": "#/$defs/one"}, "e": schema},
                "required": ["d", "e"],
                "additionalProperties": False,
                "$defs": {"one": self._any(1)},
            }
        if rng.random() < 0.2:
            schema["title"] = "A title"
        return schema

    def _any(self, depth: int) -> Schema:
        kinds = ["string", "integer", "number", "boolean", "null", "enum", "const", "types"]
        if depth:
            kinds += ["object", "object", "object", "array", "array", "tuple", "any_of", "all_of"]
        kind = self._rng.choice(kinds)
        found: Schema = getattr(self, f"_{kind}")(depth)
        return found

    def _string(self, depth: int) -> Schema:
        rng = self._rng
        if rng.random() < 0.4:
            pattern = rng.choice(PATTERNS)
            return {"type": "string", "pattern": pattern} | (
                {"maxLength": 8} if pattern == "ab" else {}
            )
        low = rng.randrange(4)
        return {"type": "string", "minLength": low, "maxLength": low + rng.randrange(6)}

    def _integer(self, depth: int) -> Schema:
        rng = self._rng
        low = rng.randrange(-2000, 2000)
        schema: Schema = {"type": "integer", "minimum": low, "maximum": low + rng.randrange(500)}
        if rng.random() < 0.3:
            step = rng.choice((2, 3, 7))
            schema = {"type": "integer", "multipleOf": step, "minimum": 0, "maximum": 100 * step}
        elif rng.random() < 0.3:
            schema = {"type": "integer", "exclusiveMinimum": low, "exclusiveMaximum": low + 90}
        return schema

    def _number(self, depth: int) -> Schema:
        return {"type": "number", "minimum": -3, "maximum": 12, "multipleOf": 0.25}

    def _boolean(self, depth: int) -> Schema:
        return {"type": "boolean"}

    def _null(self, depth: int) -> Schema:
        return {"type": "null"}

    def _enum(self, depth: int) -> Schema:
        return {"enum": self._rng.sample(CONSTS, self._rng.randrange(1, 5))}

    def _const(self, depth: int) -> Schema:
        return {"const": self._rng.choice(CONSTS)}

    def _types(self, depth: int) -> Schema:
        return {"type": self._rng.sample(["boolean", "null"], 2)}

    def _object(self, depth: int) -> Schema:
        rng = self._rng
        names = rng.sample(NAMES, rng.randrange(1, 5))
        schema: Schema = {
            "type": "object",
            "properties": {name: self._any(depth - 1) for name in names},
            "required": [name for name in names if rng.random() < 0.6],
            "additionalProperties": False,
        }
        if rng.random() < 0.2:
            schema["patternProperties"] = {"^k[0-9]$": self._any(0)}
            schema["maxProperties"] = len(names)
            schema["required"] = names  # llguidance counts properties only then
        return schema

    def _array(self, depth: int) -> Schema:
        low = self._rng.randrange(3)
        return {
            "type": "array",
            "items": self._any(depth - 1),
            "minItems": low,
            "maxItems": low + self._rng.randrange(3),
        }

    def _tuple(self, depth: int) -> Schema:
        items = [self._any(depth - 1) for _ in range(self._rng.randrange(1, 4))]
        return {"type": "array", "prefixItems": items, "minItems": len(items), "items": False}

    def _any_of(self, depth: int) -> Schema:
        return {"anyOf": [self._any(depth - 1) for _ in range(self._rng.randrange(1, 4))]}

    def _all_of(self, depth: int) -> Schema:
        low = self._rng.randrange(50)
        return {"allOf": [{"type": "integer", "minimum": low}, {"maximum": low + 30}]}
