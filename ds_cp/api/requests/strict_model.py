"""Models of request bodies: every field is known, harmless, refused by name, or reported; every
size is looked at before what it is the size of; validation ends at a list's first fault."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, ClassVar

from annotated_types import MaxLen
from pydantic import BaseModel, ConfigDict, ValidationInfo, model_validator

from ds_cp.api.errors import FieldError, shown
from ds_cp.api.requests.foreign_fields import FRONT_ENDS, Unsupported, is_nothing, is_one_of
from ds_cp.text import MAX_NAME_CHARS, closest, misspelt

MAX_FIELDS = 256  # fields of one object, with those that are unknown
MAX_UNKNOWN = 32  # names of unknown fields in one body
MAX_SKIPPED = 32  # kinds of things in one body that are skipped, and told


@dataclass
class Notes:
    """What the validation of one body leaves out: the unknown fields that it ignores, and tools
    that are not the client's own.

    ``refuse``: unknown fields are errors. Passed to ``model_validate`` as its context.
    """

    refuse: bool = False
    _seen: dict[tuple[str, str], None] = field(default_factory=dict)
    _skipped: dict[str, None] = field(default_factory=dict)

    @property
    def ignored(self) -> list[str]:
        """The names of the ignored fields, each once, cut to ``MAX_NAME_CHARS`` characters."""
        return list(dict.fromkeys(name for _, name in self._seen))

    @property
    def skipped(self) -> list[str]:
        """What ``skip`` was told, each once."""
        return list(self._skipped)

    def skip(self, what: str) -> None:
        """Leave out what this server does not have, whatever the setting for unknown fields: a
        hosted tool is an offer that the model need not take. At most ``MAX_SKIPPED`` are told."""
        if len(self._skipped) < MAX_SKIPPED:
            self._skipped[what[:MAX_NAME_CHARS]] = None

    def unknown(self, place: str, name: str, value: object, known: Iterable[str]) -> None:
        """Ignore an unknown field of a kind of object, ``place``. Raises ``FieldError`` when its
        value asks for something and its name looks like a ``known`` one, when unknown fields are
        refused, or when they are many. A name that many objects have is looked up once.
        """
        name = name[:MAX_NAME_CHARS]
        if is_nothing(value) or (place, name) in self._seen:
            return
        valid = list(known)
        near = None
        if name not in FRONT_ENDS:
            near = misspelt(name, valid)
        elif is_one_of(value, FRONT_ENDS[name]):
            return
        if near is not None or self.refuse:
            raise FieldError(unknown_field(name, valid, near), name)
        if len(self._seen) == MAX_UNKNOWN:
            raise FieldError(
                f"unknown field {shown(name)}, after {MAX_UNKNOWN} others that are unknown here "
                "too; leave them out",
                name,
            )
        self._seen[place, name] = None


def notes_of(info: ValidationInfo) -> Notes:
    """The notes of a validation; those of a model made by hand are dropped."""
    return info.context if isinstance(info.context, Notes) else Notes()


def sift(
    place: str,
    data: Mapping[str, Any],
    known: Iterable[str],
    unsupported: Mapping[str, Unsupported],
    harmless: frozenset[str],
    notes: Notes,
) -> dict[str, Any]:
    """The known fields of an object of the kind ``place``. Raises ``FieldError`` that names another
    one which asks for something that is not served, and for too many."""
    if len(data) > MAX_FIELDS:
        raise FieldError(f"an object has {len(data)} fields; at most {MAX_FIELDS}")
    kept = {}
    for name, value in data.items():
        if name in known:
            kept[name] = value
        elif name in unsupported:
            if not unsupported[name].accepts(value, data):
                raise FieldError(f"{name} is not supported: {unsupported[name].hint}", name)
        elif name not in harmless:
            notes.unknown(place, name, value, [*known, *unsupported])
    return kept


class StrictModel(BaseModel):
    """No value is converted silently, and no unknown field passes unseen (``Notes``).

    A field of a list, an object or a text whose length matters has a ``max_length``, which is
    looked at before anything in it.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    unsupported: ClassVar[dict[str, Unsupported]] = {}
    harmless: ClassVar[frozenset[str]] = frozenset()

    @model_validator(mode="before")
    @classmethod
    def _names(cls, data: Any, info: ValidationInfo) -> Any:
        if not isinstance(data, dict):
            return data
        notes = notes_of(info)
        kept = sift(cls.__name__, data, cls.model_fields, cls.unsupported, cls.harmless, notes)
        for name, most in max_lengths(cls).items():
            value = kept.get(name)
            if isinstance(value, str | list | dict) and len(value) > most:
                raise too_long(name, value, most)
        return kept


@cache
def max_lengths(model: type[BaseModel]) -> dict[str, int]:
    """The ``max_length`` of each field that has one, in characters or items."""
    return {
        name: rule.max_length
        for name, info in model.model_fields.items()
        for rule in info.metadata
        if isinstance(rule, MaxLen)
    }


def too_long(name: str, value: str | list[Any] | dict[str, Any], most: int) -> FieldError:
    """The error of a text, list or object that has more than ``most`` characters or items."""
    things = "characters" if isinstance(value, str) else "items"
    return FieldError(f"{name} has {len(value)} {things}; at most {most}", name)


def unknown_field(name: str, valid: list[str], near: str | None = None) -> str:
    """A sentence that names an unknown field and the valid one that it most likely means."""
    near = near or closest(name, valid)
    hint = f"did you mean {near}?" if near else f"valid fields: {', '.join(sorted(valid))}"
    return f"unknown field {shown(name)}; {hint}"
