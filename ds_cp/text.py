"""Strict JSON, sizes, and how values and names are shown in one-line messages.

One reader of JSON for the config, batch files and HTTP bodies. Functions that reject a value raise
``ValueError`` with a sentence; the caller knows which file, key or request it is about and raises
the typed error.
"""

from __future__ import annotations

import difflib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from fractions import Fraction
from itertools import islice
from typing import Any

MAX_NAME_CHARS = 100  # characters of a name that is compared with valid ones
SIZE_PATTERN = r"^\s*[0-9]{1,18}(\.[0-9]{1,9})?\s*(B|[kKMGT]B|[KMGT]iB)\s*$"
# Bytes by unit.
_UNITS = {"B": 1} | {
    f"{letter}{middle}B": base**power
    for middle, base in (("", 1000), ("i", 1024))
    for power, letter in enumerate("KMGT", start=1)
}

_JOINTS = str.maketrans("", "", "-_. ")  # what joins the words of a name


class JsonError(ValueError):
    """Text that is not strict JSON. ``key``: the key that is given twice, if that is the fault."""

    def __init__(self, message: str, key: str | None = None) -> None:
        super().__init__(message)
        self.key = key


def parse_json(text: str) -> Any:
    """Strict JSON: no NaN or Infinity, no key twice in an object. ``JsonError`` says where."""
    try:
        return json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_no_constant)
    except JsonError:
        raise
    except json.JSONDecodeError as err:
        raise JsonError(
            f"not valid JSON at line {err.lineno}, column {err.colno}: {err.msg}"
        ) from None
    except RecursionError:
        raise JsonError("not valid JSON: nested too deeply") from None
    except ValueError:  # Python's own bound on the digits of an integer
        raise JsonError("not valid JSON: a number has too many digits") from None


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        key = counts.most_common(1)[0][0]
        raise JsonError(f"not usable JSON: key {show(key)} is given twice", key)
    return found


def _no_constant(name: str) -> Any:
    raise JsonError(f"not valid JSON: {name} is not a JSON number")


def parse_size(text: str) -> int:
    """Bytes of ``"512MiB"``, ``"1.5GB"``, ``"64 KiB"``: powers of 1024 with the i, of 1000 without.

    ``ValueError`` for anything else, and for a size that is not a whole number of bytes.
    """
    match = re.match(SIZE_PATTERN, text) if len(text) <= 64 else None
    if match is None:
        raise ValueError('not a size such as "512MiB" or "1.5GB"')
    unit = match.group(2)
    number = text.strip().removesuffix(unit).strip()
    size = Fraction(number) * _UNITS[unit[0].upper() + unit[1:]]
    if size.denominator != 1:
        raise ValueError("not a whole number of bytes")
    return int(size)


def nearest(key: str, siblings: Iterable[str], paths: Iterable[str]) -> str:
    """The valid key that an unknown one most likely means.

    ``siblings``: full paths of the keys beside it; ``paths``: full paths of all keys.
    """
    siblings, paths = list(siblings), list(paths)
    by_leaf = {path.rpartition(".")[2]: path for path in [*reversed(paths), *siblings]}
    beside = {path.rpartition(".")[2]: path for path in siblings}
    if key in by_leaf:
        return by_leaf[key]
    for names, cutoff in ((beside, 0.6), (by_leaf, 0.75), (beside, 0.0), (by_leaf, 0.0)):
        found = closest(key, names, cutoff)
        if found is not None:
            return names[found]
    return paths[0]


def closest(name: str, valid: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The valid name that is most like ``name``, or None when none is.

    ``cutoff``: the least similarity, from 0 (any name) to 1 (the same letters).
    """
    found = difflib.get_close_matches(name[:MAX_NAME_CHARS].lower(), list(valid), 1, cutoff)
    return found[0] if found else None


def misspelt(name: str, valid: Iterable[str]) -> str | None:
    """The valid name that ``name`` is a slip of the pen for, or None.

    Case, and whether words are joined by a line, a blank or nothing, do not count. Otherwise one
    character more, fewer, other or swapped with its neighbour is a slip where the longer name has
    four to seven characters, two such are in longer names, and none is in shorter ones. A name
    with a word more, as in stream_id, is no slip.
    """
    name = name[:MAX_NAME_CHARS]
    plain, stems = _joined(name), _stems(name)
    best: tuple[int, str] | None = None
    for known in valid:
        other = _joined(known)
        if other in stems or other.removesuffix("s") in stems:
            continue
        length = max(len(plain), len(other))
        most = 0 if length < 4 else 1 if length < 8 else 2
        slips = _edits(plain, other, most)
        if slips <= most and (best is None or slips < best[0]):
            best = slips, known
    return None if best is None else best[1]


def _joined(name: str) -> str:
    return name.translate(_JOINTS).lower()


def _stems(name: str) -> set[str]:
    """The name, joined, without its last words: those have two characters or more."""
    spaced = re.sub(r"([a-z])([A-Z])", r"\1 \2", name)
    ends = [match.start() for match in re.finditer(r"[-_. ]+(?=[^-_. ]{2})", spaced)]
    return {_joined(spaced[:end]) for end in ends}


def _edits(a: str, b: str, most: int) -> int:
    """Characters to add, drop, replace or swap with a neighbour to make ``b`` of ``a``; any number
    above ``most`` stands for more than that."""
    if abs(len(a) - len(b)) > most or len(set(a) - set(b)) > most:
        return most + 1  # an edit makes up for one character that is not in b
    before, row = [0] * (len(b) + 1), list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        last, before, row = before, row, [i]
        for j, y in enumerate(b, 1):
            least = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (x != y))
            if i > 1 and j > 1 and x == b[j - 2] and y == a[i - 2]:
                least = min(least, last[j - 2] + 1)
            row.append(least)
        if min(row) > most:
            return most + 1
    return row[-1]


def shorten(text: str, limit: int = 80) -> str:
    """One printable line of at most ``limit`` characters."""
    # Only what is shown is looked at: a client's name or value may have millions of characters.
    line = "".join(c if c.isprintable() else " " for c in text[:limit])
    return line if len(text) <= limit else line[: limit - 3] + "..."


def show(value: Any) -> str:
    """A value as JSON, short, for a message."""
    if isinstance(value, str | list):
        value = value[:MAX_NAME_CHARS]
    elif isinstance(value, dict):
        value = dict(islice(value.items(), MAX_NAME_CHARS))
    try:
        return shorten(json.dumps(value, ensure_ascii=False))
    except (TypeError, ValueError, RecursionError):  # nested just less deep than is read
        return f"of type {type(value).__name__}"


def allowed(schema: Mapping[str, Any]) -> str:
    """What a JSON schema node admits, in words: ``"auto" or an integer from 1 to 64 (ranks)``."""
    options: list[str] = []
    for option in schema.get("anyOf", [schema]):
        if option.get("type") == "array":
            options.append(
                "a list of such" if options else f"a list, each item {allowed(option['items'])}"
            )
        else:
            options += _words(option)
    words = " or ".join(filter(None, [", ".join(options[:-1]), options[-1]]))
    return f"{words} ({schema['unit']})" if "unit" in schema else words


def _words(schema: Mapping[str, Any]) -> list[str]:
    kind = schema.get("type")
    if "const" in schema:
        return [json.dumps(schema["const"])]
    if "enum" in schema:
        return [json.dumps(value) for value in schema["enum"]]
    if kind in ("integer", "number"):
        noun = "an integer" if kind == "integer" else "a number"
        if "exclusiveMinimum" in schema:
            low, high = schema["exclusiveMinimum"], schema["maximum"]
            return [f"{noun} above {low}, at most {high}"]
        return [f"{noun} from {schema['minimum']} to {schema['maximum']}"]
    if kind == "boolean":
        return ["true or false"]
    if kind == "string" and "examples" in schema:
        return [f"a size such as {json.dumps(schema['examples'][0])}"]
    if kind == "string":
        return [f"a string of {schema.get('minLength', 0)} to {schema['maxLength']} characters"]
    return ["null" if kind == "null" else "an object"]
