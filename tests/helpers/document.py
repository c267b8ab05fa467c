"""Fields of request bodies as openapi.json has them: where each is, and which JSON it takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Json = dict[str, Any]
# A valid object of each model that is a part of a body and needs some fields; of others, {}.
PARTS: dict[str, Json] = {
    "ChatMessage": {"role": "user", "content": "a"},
    "AnthropicChoice": {"type": "auto"},
    "ThinkingConfig": {"type": "enabled"},
}
# One value of each type of JSON, of which none is a value of an enum or asks for nothing.
VALUES: Json = {
    "boolean": True,
    "integer": 5,
    "number": 1.5,
    "string": "?",
    "array": [[]],
    "object": {"zz": 5},
}


@dataclass(frozen=True)
class Field:
    """``name``: its place, as errors spell it. ``types``: of JSON that it takes. ``within``: the
    names of the object that it is in. ``body``: a whole body around a value of it."""

    name: str
    types: frozenset[str]
    within: tuple[str, ...]
    body: Callable[[Any], Json]

    @property
    def leaf(self) -> str:
        """The name alone."""
        return self.name.rpartition(".")[2]

    def wrong(self) -> Iterator[Any]:
        """A value of each type that it does not take."""
        for kind, value in VALUES.items():
            if kind not in self.types and not (kind == "integer" and "number" in self.types):
                yield value


def fields(document: Json, path: str, base: Json) -> Iterator[Field]:
    """All fields of the body of POST ``path``; ``base`` is a valid one."""
    content = document["paths"][path]["post"]["requestBody"]["content"]
    schema = resolved(document, content["application/json"]["schema"])
    yield from _below(document, schema, base, "", lambda inner: inner)


def _below(
    document: Json, schema: Json, base: Json, place: str, around: Callable[[Json], Json]
) -> Iterator[Field]:
    within = tuple(schema["properties"])
    for name, property_ in schema["properties"].items():

        def body(value: Any, name: str = name) -> Json:
            return around({**base, name: value})

        yield Field(place + name, types_of(document, property_), within, body)
        for inner in members(document, property_):
            listed = inner.get("type") == "array"
            part = inner.get("items", {}) if listed else inner
            model = part.get("$ref", "").rpartition("/")[2]
            if model:
                yield from _below(
                    document,
                    resolved(document, part),
                    PARTS.get(model, {}),
                    f"{place}{name}[0]." if listed else f"{place}{name}.",
                    lambda value, body=body, listed=listed: body([value] if listed else value),
                )


def members(document: Json, schema: Json) -> Iterator[Json]:
    """The members of a union."""
    for member in schema.get("anyOf", [schema]):
        if member is schema:
            yield member
        else:
            yield from members(document, member)


def resolved(document: Json, schema: Json) -> Json:
    """A schema itself, where this one is a reference."""
    name = schema.get("$ref", "").rpartition("/")[2]
    found: Json = document["components"]["schemas"][name] if name else schema
    return found


def types_of(document: Json, schema: Json) -> frozenset[str]:
    """The types of JSON that a schema takes; a string that must be one of some is none."""
    found = set()
    for member in members(document, schema):
        member = resolved(document, member)
        if "enum" not in member and "const" not in member:
            kinds = member["type"]
            found |= {kinds} if isinstance(kinds, str) else set(kinds)
    return frozenset(found)


def routes(document: Json, method: str) -> Mapping[str, Json]:
    """The paths that have a method, with what the document says of it."""
    return {path: each[method] for path, each in document["paths"].items() if method in each}
