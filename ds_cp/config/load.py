"""The JSON config: read it, check it, describe it.

``load_config`` reads and checks a file or a mapping; a mistake raises ``ConfigError``, in one line.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from ds_cp.config.models import Config
from ds_cp.errors import ConfigError
from ds_cp.text import allowed, nearest, parse_json, shorten, show

MAX_CONFIG_BYTES = 1 << 20  # bytes of a config file


def looks_like_path(model: str) -> bool:
    """Whether a model string that is not on disk was meant as a path, not as a hub name."""
    name = r"[A-Za-z0-9][A-Za-z0-9_.-]*"
    return model.endswith(".gguf") or not re.fullmatch(f"({name}/)?{name}", model)


def load_config(
    source: str | os.PathLike[str] | Mapping[str, Any],
    overrides: Mapping[str, Any] | None = None,
) -> Config:
    """The checked config from a JSON file or from a mapping of the same shape.

    ``overrides``: dotted keys that replace what the source says, as the command line does
    (``{"server.port": 0}``). A ``model`` that exists on disk comes back as an absolute path.

    Raises ``ConfigError``, one line, naming the key and what is allowed there.
    """
    if isinstance(source, Mapping):
        where, folder, raw = "the config", None, dict(source)
    else:
        path = Path(source)
        where, folder, raw = str(path), path.parent, _read(path)
    for key, value in (overrides or {}).items():
        raw = _replaced(raw, key.split("."), value)
    try:
        config = Config.model_validate(raw)
    except ValidationError as err:
        raise ConfigError(f"{where}: {_sentence(err, raw)}") from None
    return config.model_copy(update={"model": _resolved(config.model, folder)})


def config_schema() -> dict[str, Any]:
    """JSON schema (draft 2020-12) of the config file, with descriptions, units and bounds."""
    schema = Config.model_json_schema(by_alias=True)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | schema | {"title": "ds_cp"}


def explain(config: Config) -> list[str]:
    """One line per key: its value, unit and meaning; ``*`` marks what differs from the default."""
    lines = []
    for path, field, value, default in _leaves(config):
        extra = field.json_schema_extra
        unit = f" {extra['unit']}" if isinstance(extra, dict) and value != "auto" else ""
        shown = '"(hidden)"' if path == "server.api_key" and value is not None else show(value)
        mark = " " if value == default else "*"
        lines.append(f"{mark} {path} = {shown}{unit}  # {field.description}")
    return lines


def _leaves(config: Config) -> Iterator[tuple[str, Any, Any, Any]]:
    for name, field in Config.model_fields.items():
        value = getattr(config, name)
        if isinstance(value, BaseModel):
            for inner, inner_field in type(value).model_fields.items():
                path = f"{name}.{inner}"
                default = inner_field.get_default(call_default_factory=True)
                yield path, inner_field, getattr(value, inner), default
        elif name != "schema_":
            yield name, field, value, field.default


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_CONFIG_BYTES + 1)
    except OSError as err:
        raise ConfigError(f"cannot read config {path}: {err.strerror or err}") from None
    if len(data) > MAX_CONFIG_BYTES:
        raise ConfigError(f"config {path} is larger than {MAX_CONFIG_BYTES} bytes")
    try:
        raw = parse_json(data.decode("utf-8-sig"))
    except UnicodeDecodeError as err:
        raise ConfigError(f"config {path} is not UTF-8 text (byte {err.start})") from None
    except ValueError as err:
        raise ConfigError(f"config {path} is {err}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"config {path} must hold a JSON object, not {show(raw)}")
    return raw


def _replaced(raw: dict[str, Any], keys: list[str], value: Any) -> dict[str, Any]:
    if len(keys) > 1:
        inner = raw.get(keys[0], {})
        if not isinstance(inner, dict):  # wrong anyway; the validation names it
            return raw
        value = _replaced(inner, keys[1:], value)
    return {**raw, keys[0]: value}


def _resolved(model: str, folder: Path | None) -> str:
    path = Path(model).expanduser()
    for candidate in (path, folder / path if folder else path):
        if os.path.exists(candidate):
            return os.path.abspath(candidate)
    return str(path) if model.startswith("~") else model


# --- from pydantic's errors to one sentence


def _keys_of(model: type[BaseModel]) -> Iterator[tuple[str, Any]]:
    for name, field in model.model_fields.items():
        yield field.alias or name, field


def _all_paths() -> list[str]:
    paths = []
    for key, field in _keys_of(Config):
        paths.append(key)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            paths += [f"{key}.{inner}" for inner, _ in _keys_of(field.annotation)]
    return paths


def _sentence(err: ValidationError, raw: Mapping[str, Any]) -> str:
    """One sentence on the first mistake, unknown keys first: a misspelt key also looks missing."""
    details = err.errors(include_url=False, include_context=False, include_input=False)
    first = min(details, key=lambda detail: detail["type"] != "extra_forbidden")
    loc = first["loc"]
    path, model, schema = _walk(loc)
    if first["type"] == "extra_forbidden":
        prefix = ".".join(path)
        siblings = [f"{prefix}.{key}" if prefix else key for key, _ in _keys_of(model)]
        unknown = str(loc[-1])
        full = shorten(".".join([*path, unknown]))
        near = nearest(unknown, siblings, _all_paths())
        return f"unknown key {full}; the nearest valid one is {near}"
    name = ".".join(path)
    if first["type"] == "value_error" and first["msg"].startswith("Value error, " + (name or "")):
        message = first["msg"].removeprefix("Value error, ")
        if not name or message.startswith(name):
            return message
    if first["type"] == "missing":
        return f"{name} is missing; it must be {allowed(schema)}"
    value: Any = raw
    for key in path:
        value = value[key]
    shown = "not acceptable" if name == "server.api_key" else show(value)
    if not path:
        return f"a key is not text: {shown}"
    return f"{name} is {shown}; it must be {allowed(schema)}"


def _walk(loc: tuple[int | str, ...]) -> tuple[list[str], type[BaseModel], dict[str, Any]]:
    """The keys of ``loc`` that the config has (pydantic adds a union's branch), the model that
    holds the last of them, and its schema."""
    path: list[str] = []
    model: type[BaseModel] = Config
    schema: dict[str, Any] = {}
    for part in loc:
        field: Any = dict(_keys_of(model)).get(str(part))
        if field is None:
            break
        path.append(str(part))
        schema = model.model_json_schema(by_alias=True)["properties"][str(part)]
        if not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)):
            break
        model = field.annotation
    return path, model, schema
