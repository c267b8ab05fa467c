"""Values of a model's config.json, each checked for type and bounds when it is read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ds_cp.errors import ModelError
from ds_cp.text import parse_json

MAX_BYTES = 4 << 20  # of a config.json
MAX_SIZE = 1 << 31  # of a dim, a count or a length
MAX_LAYERS = 10_000


class ConfigJson:
    """One object of a config.json. ``where`` names the file in messages."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self._values = values
        self.where = where

    def get(self, key: str) -> Any:
        """The value of ``key`` as it is, None where it is not there."""
        return self._values.get(key)

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def number(self, *keys: str, default: int | None = None, least: int = 1,
               most: int = MAX_SIZE) -> int:  # fmt: skip
        """The first of ``keys`` that is there and not null, a whole number from ``least`` to
        ``most``. ``ModelError`` for another value, or where there is neither key nor default."""
        for key in keys:
            value = self._values.get(key)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
                shown = str(value)[:40]
                raise ModelError(
                    f"{self.where}: {key} is {shown}; it must be a whole number "
                    f"from {least} to {most}"
                )
            return value
        if default is None:
            raise ModelError(
                f"{self.where} does not say {' or '.join(keys)}, so the shape is not known: "
                "give the config.json of a decoder, or add the key"
            )
        return default

    def maybe(self, *keys: str) -> int | None:
        """As ``number``, or None where no key is there or it is 0."""
        return self.number(*keys, default=0, least=0) or None

    def flag(self, which: bool | str) -> bool:
        """``which`` itself, or whether the key of that name is true. ``ModelError`` for a value
        that is neither true nor false nor null."""
        if isinstance(which, bool):
            return which
        value = self._values.get(which)
        if value is not None and not isinstance(value, bool):
            raise ModelError(
                f"{self.where}: {which} is {str(value)[:40]}; it must be true or false"
            )
        return bool(value)

    def words(self, key: str, count: int) -> list[str] | None:
        """A list of ``count`` strings, one for each layer; None where the key is not there."""
        value = self._values.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
            raise ModelError(f"{self.where}: {key} must be a list of strings, one for each layer")
        if len(value) != count:
            raise ModelError(f"{self.where}: {key} lists {len(value)} layers of {count}")
        return value


def read_json_object(path: Path, most: int, wanted: str) -> dict[str, Any]:
    """A file that holds one JSON object of at most ``most`` bytes. ``ModelError`` says what is
    wrong, and to give ``wanted``."""
    try:
        if not path.is_file():
            kind = "is not a file" if path.exists() else "does not exist"
            raise ModelError(f"{path} {kind}: give {wanted}")
        with path.open("rb") as file:
            raw = file.read(most + 1)
    except OSError as err:
        raise ModelError(f"{path} cannot be read: {err.strerror or err}") from None
    except ValueError:  # a null byte in the path
        raise ModelError(f"{str(path)!r} is not a path") from None
    if len(raw) > most:
        raise ModelError(f"{path} has more than {most} bytes: give {wanted}")
    try:
        found = parse_json(raw.decode("utf-8"))
    except UnicodeDecodeError:
        raise ModelError(f"{path} is not UTF-8 text: give {wanted}") from None
    except ValueError as err:
        raise ModelError(f"{path} is {err}") from None
    if not isinstance(found, dict):
        raise ModelError(f"{path} holds no JSON object: give {wanted}")
    return found
