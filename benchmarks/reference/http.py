"""docs/http.md, from /openapi.json and the tables of fields."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, cast

from fastapi import FastAPI
from fastapi.routing import APIRoute

from benchmarks.reference.tables import Schema, table, words
from ds_cp.api.app import create_app
from ds_cp.api.requests import foreign_fields as fields
from ds_cp.config import Server
from ds_cp.engine.interface import EngineInterface

HEAD = """# HTTP

Written from `/openapi.json` and the tables of fields by `python -m benchmarks.reference`. Errors
have OpenAI's shape, `{"error": {"message", "type", "param", "code"}}`, and every answer has
`X-Request-Id`. With `server.api_key`, every path but the page's files wants `Authorization:
Bearer KEY`. Null asks for nothing in every field.
"""
TABLES: tuple[tuple[str, Mapping[str, fields.Unsupported]], ...] = (
    ("Both kinds of completion", fields.BOTH),
    ("/v1/completions", fields.COMPLETION_ONLY),
    ("/v1/chat/completions", fields.CHAT_ONLY),
    ("A message", fields.MESSAGE),
    ("`stream_options`", fields.STREAM_OPTIONS),
    ("/tokenize", fields.TOKENIZE),
)


class _NoEngine:
    """An engine of which only the routes are wanted."""

    state = "starting"

    def on_ended(self, listener: object) -> None:
        """Nothing ends."""


def http_page() -> str:
    """The page."""
    app = create_app(cast(EngineInterface, _NoEngine()), Server())
    schema = app.openapi()
    definitions: dict[str, Schema] = schema["components"]["schemas"]
    lines = [HEAD, "## Paths", ""]
    rows, bodies = [], []
    for path, methods in schema["paths"].items():
        for method, entry in methods.items():
            name = _body_of(entry)
            if name and name not in bodies:
                bodies.append(name)
            said = entry.get("description") or entry["summary"]
            rows.append((f"`{method.upper()} {path}`", f"`{name}`" if name else "", said))
    lines += table(("path", "body", "what it does"), rows)
    lines += ["", "Not in `/openapi.json`:", ""]
    hidden = [
        (f"`{' '.join(sorted(route.methods))} {route.path}`", (route.description or "").strip())
        for route in _routes(app)
        if not route.include_in_schema
    ]
    lines += table(("path", "what it does"), hidden)
    for name in _with_parts(bodies, definitions):
        lines += ["", f"## `{name}`", "", *_fields(definitions[name], definitions)]
    lines += ["", *_foreign()]
    return "\n".join(lines) + "\n"


def _routes(app: FastAPI) -> Iterator[APIRoute]:
    """The routes of all routers. FastAPI keeps a router that is included as a route."""
    for outer in app.routes:
        router = getattr(outer, "original_router", None)
        for route in [outer] if router is None else router.routes:
            if isinstance(route, APIRoute):
                yield route


def _body_of(entry: Mapping[str, Any]) -> str:
    content = entry.get("requestBody", {}).get("content", {})
    ref = content.get("application/json", {}).get("schema", {}).get("$ref", "")
    return str(ref).rpartition("/")[2]


def _with_parts(names: list[str], definitions: Mapping[str, Schema]) -> list[str]:
    """The bodies, then the objects that are in them."""
    found = list(names)
    for name in found:  # grows meanwhile
        for other in _refs(definitions[name]):
            if other not in found and "properties" in definitions[other]:
                found.append(other)
    return found


def _refs(schema: Any) -> Iterator[str]:
    if isinstance(schema, Mapping):
        if "$ref" in schema:
            yield str(schema["$ref"]).rpartition("/")[2]
        for value in schema.values():
            yield from _refs(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from _refs(value)


def _fields(schema: Schema, definitions: Mapping[str, Schema]) -> list[str]:
    required = schema.get("required", ())
    rows = []
    for name, entry in schema.get("properties", {}).items():
        must = "yes" if name in required else ""
        rows.append((f"`{name}`", must, words(entry, definitions), entry.get("description", "")))
    return table(("field", "required", "value", "meaning"), rows)


def _foreign() -> list[str]:
    lines = [
        "## Fields that are accepted and change nothing", "",
        *table(("in", "fields"), [
            (where, ", ".join(f"`{name}`" for name in sorted(names)))
            for where, names in fields.HARMLESS.items()
        ]),
        "", "What front ends send to every server, where the value asks for nothing:", "",
        *table(("field", "values that pass"), [
            (f"`{name}`", _values(values)) for name, values in fields.FRONT_ENDS.items()
        ]),
        "", "## Fields that would change the answer", "",
        "They are refused by name (HTTP 400), unless the value asks for nothing: null, false, "
        "empty, or one of those listed.",
    ]  # fmt: skip
    for title, entries in TABLES:
        rows = [
            (f"`{name}`", _values(one.neutral), one.hint)
            for name, one in entries.items()
        ]  # fmt: skip
        lines += ["", f"### {title}", "", *table(("field", "passes with", "why not else"), rows)]
    return lines


def _values(values: tuple[Any, ...]) -> str:
    return ", ".join(f"`{json.dumps(value)}`" for value in values)
