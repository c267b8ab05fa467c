"""What the types of a client say of a protocol: the fields of its objects, and their kinds."""

from __future__ import annotations

from collections.abc import Iterator
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints


def members(union: Any) -> Iterator[Any]:
    """The members of a union, of unions within it too."""
    origin = get_origin(union)
    if origin in (Union, UnionType):
        for member in get_args(union):
            yield from members(member)
    elif origin is Annotated:
        yield from members(get_args(union)[0])
    else:
        yield union


def fields_of(*kinds: Any) -> set[str]:
    """The fields of typed dictionaries, inherited ones too."""
    return {name for kind in kinds for name in get_type_hints(kind)}


def kinds_of(union: Any) -> set[str]:
    """What ``type`` may be in a union of typed dictionaries."""
    found: set[str] = set()
    for member in members(union):
        for literal in members(get_type_hints(member).get("type")):
            found.update(arg for arg in get_args(literal) if isinstance(arg, str))
    return found
