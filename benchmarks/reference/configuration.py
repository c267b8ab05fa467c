"""docs/configuration.md, from the config's JSON schema."""

from __future__ import annotations

import json
from typing import Any

from benchmarks.reference.tables import Schema, table, words
from ds_cp.config import config_schema

HEAD = """# Configuration

Written from the schema by `python -m benchmarks.reference`; the same schema is
`configs/ds_cp.schema.json`. A config is one JSON file. An unknown key is an error that names the
nearest valid one. `ds-cp config check FILE` checks a file, `ds-cp config explain FILE` shows
every key with its value. Only `model` must be set. Sizes may be written as `"512MiB"`.
"""


def configuration_page() -> str:
    """The page."""
    schema = config_schema()
    definitions: dict[str, Schema] = schema["$defs"]
    plain, sections = [], []
    for name, entry in schema["properties"].items():
        if "$ref" in entry:
            sections.append((name, entry))
        else:
            plain.append((name, entry))
    lines = [HEAD, "## Top level", "", *_table(plain, schema.get("required", ()), definitions)]
    for name, entry in sections:
        section = definitions[str(entry["$ref"]).rpartition("/")[2]]
        lines += ["", f"## `{name}`", "", section.get("description") or entry["description"], ""]
        required = section.get("required", ())
        keys = [(f"{name}.{key}", value) for key, value in section["properties"].items()]
        lines += _table(keys, required, definitions)
    return "\n".join(lines) + "\n"


def _table(keys: list[tuple[str, Any]], required: Any, definitions: dict[str, Schema]) -> list[str]:
    rows = []
    for name, entry in keys:
        default = f"`{json.dumps(entry['default'])}`" if "default" in entry else ""
        if name.rpartition(".")[2] in required:
            default = "must be set"
        rows.append((
            f"`{name}`", default, words(entry, definitions), entry.get("unit", ""),
            entry.get("description", ""),
        ))  # fmt: skip
    return table(("key", "default", "value", "unit", "meaning"), rows)
