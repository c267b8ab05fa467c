"""JSON in pieces: an answer of many megabytes never exists as a whole.

A *piece* is a few bytes of JSON. Values that are written by these functions may be iterators of
pieces themselves, so an answer is a tree of generators, and what is not asked for yet is not made.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

TEXT_CHARS = 8192  # characters of a text in one piece
LIST_ITEMS = 4096  # plain numbers of a list in one piece
LIST_BYTES = 32 * 1024  # bytes of an encoded list in one piece


def encode(value: Any) -> bytes:
    """A value as compact JSON, UTF-8. Raises ``ValueError`` for infinities and NaN."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def json_object(fields: Mapping[str, Any]) -> Iterator[bytes]:
    """An object. A field may be any value, or an iterator of pieces that are its JSON."""
    before = b"{"
    for name, value in fields.items():
        yield before + encode(name) + b":"
        yield from _pieces_of(value)
        before = b","
    yield b"{}" if before == b"{" else b"}"


def json_array(items: Iterable[Any]) -> Iterator[bytes]:
    """A list. An item may be any value; ``bytes``, or an iterator of pieces, are one item's JSON or
    that of several, with the commas between them, or of none."""
    begun = False
    for item in items:
        first = True
        for piece in _pieces_of(item):
            if not piece:
                continue
            if first:
                yield b"," if begun else b"["
            yield piece
            begun, first = True, False
    yield b"]" if begun else b"[]"


def json_text(*parts: str | bytearray) -> Iterator[bytes]:
    """The parts as one string; a ``bytearray`` is encoded already, without quotes."""
    yield b'"'
    for part in parts:
        if isinstance(part, str):
            for start in range(0, len(part), TEXT_CHARS):
                yield encode(part[start : start + TEXT_CHARS])[1:-1]
        else:
            yield from _slices_of(part)
    yield b'"'


def json_integers(values: Sequence[int]) -> Iterator[bytes]:
    """A list of integers."""
    starts = range(0, len(values), LIST_ITEMS)
    return json_array(items_of(values[start : start + LIST_ITEMS]) for start in starts)


def items_of(values: Sequence[Any]) -> bytes:
    """The items of a list of values, without its brackets."""
    return encode(values)[1:-1]


class EncodedList:
    """The items of a list that is encoded as it grows: a third of what its values would hold."""

    def __init__(self) -> None:
        self._data = bytearray()

    def extend(self, values: Sequence[Any]) -> int:
        """Append items; returns the bytes that they take."""
        before = len(self._data)
        if values:
            if before:
                self._data += b","
            self._data += items_of(values)
        return len(self._data) - before

    def items(self) -> Iterator[bytes]:
        """All items, as ``json_array`` takes them."""
        return _slices_of(self._data)


def _slices_of(data: bytearray) -> Iterator[bytes]:
    for start in range(0, len(data), LIST_BYTES):
        yield bytes(data[start : start + LIST_BYTES])


def _pieces_of(value: Any) -> Iterable[bytes]:
    if isinstance(value, Iterator):
        return value
    return (value,) if isinstance(value, bytes) else (encode(value),)
