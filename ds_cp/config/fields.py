"""The types of the config's values, with their bounds, and the base of its sections."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

from ds_cp.text import SIZE_PATTERN, parse_size

MAX_RANKS = 1024  # ranks of a job
MAX_TOKENS = 1 << 31  # tokens of a length or a budget
MAX_MEMORY = 1 << 50  # bytes of a budget

Auto = Literal["auto"]


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _bytes(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return tuple(_bytes(item) for item in value)
    return parse_size(value) if isinstance(value, str) and value != "auto" else value


Tokens = Annotated[int, Field(ge=1, le=MAX_TOKENS)]
_AUTO_SCHEMA: dict[str, Any] = {"const": "auto", "type": "string"}


def _sizes(least: int) -> list[dict[str, Any]]:
    """JSON schemas of bytes, as text and as a number."""
    return [
        {"type": "string", "pattern": SIZE_PATTERN, "examples": ["512MiB"]},
        {"type": "integer", "minimum": least, "maximum": MAX_MEMORY},
    ]


def _size_list(least: int) -> dict[str, Any]:
    items = {"anyOf": _sizes(least)}
    return {"type": "array", "items": items, "minItems": 1, "maxItems": MAX_RANKS}


_OneBudget = Annotated[int, Field(ge=1, le=MAX_MEMORY)]
MemoryBudget = Annotated[
    Auto
    | _OneBudget
    | Annotated[tuple[_OneBudget, ...], Field(min_length=1, max_length=MAX_RANKS)],
    BeforeValidator(_bytes),
    WithJsonSchema({"anyOf": [_AUTO_SCHEMA, *_sizes(1), _size_list(1)]}),
]
_Spare = Annotated[int, Field(ge=0, le=MAX_MEMORY)]
SpareBudget = Annotated[
    _Spare | Annotated[tuple[_Spare, ...], Field(min_length=1, max_length=MAX_RANKS)],
    BeforeValidator(_bytes),
    WithJsonSchema({"anyOf": [*_sizes(0), _size_list(0)]}),
]
MIN_BUFFERED = 16 << 20  # bytes: some requests must fit
MemorySize = Annotated[
    Auto | Annotated[int, Field(ge=MIN_BUFFERED, le=MAX_MEMORY)],
    BeforeValidator(_bytes),
    WithJsonSchema({"anyOf": [_AUTO_SCHEMA, *_sizes(MIN_BUFFERED)]}),
]
ByteSize = Annotated[
    Annotated[int, Field(ge=1, le=MAX_MEMORY)],
    BeforeValidator(_bytes),
    WithJsonSchema({"anyOf": _sizes(1)}),
]
TokenBudget = Annotated[
    Auto | Tokens | Annotated[tuple[Tokens, ...], Field(min_length=1, max_length=MAX_RANKS)],
    BeforeValidator(_tuple),
]
Timeout = Annotated[float, Field(ge=0.1, le=3600)]  # seconds
_ApiKey = Annotated[str, Field(min_length=1, max_length=512)]
ApiKeys = Annotated[
    _ApiKey | Annotated[tuple[_ApiKey, ...], Field(min_length=1, max_length=256)] | None,
    BeforeValidator(_tuple),
]
_Name = Annotated[str, Field(min_length=1, max_length=300)]
Names = Annotated[tuple[_Name, ...], Field(max_length=64), BeforeValidator(_tuple)]

_ModelName = Annotated[str, Field(min_length=1, max_length=256)]
ModelNames = Annotated[
    _ModelName | Annotated[tuple[_ModelName, ...], Field(min_length=1, max_length=64)] | None,
    BeforeValidator(_tuple),
]


def unit_of(unit: str) -> dict[str, Any]:
    """The entry of a field's JSON schema that names its unit."""
    return {"unit": unit}


class Section(BaseModel):
    """A frozen object of the config, without unknown keys; no value is converted silently."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
