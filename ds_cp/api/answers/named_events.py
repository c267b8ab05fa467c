"""Server-sent events that have a name, and ids, as the newer protocols have them."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from typing import Any

CHAR_BYTES = 4  # of memory that a character of an answer takes that is kept as text


def named_event(data: dict[str, Any]) -> bytes:
    """One event with JSON data, named by its ``type``."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False)
    return f"event: {data['type']}\ndata: {text}\n\n".encode()


def named_pieces(name: str, data: Iterator[bytes]) -> Iterator[bytes]:
    """The same from the pieces of its JSON."""
    yield f"event: {name}\ndata: ".encode()
    yield from data
    yield b"\n\n"


def new_id(prefix: str) -> str:
    """An id that nobody can guess, such as ``msg_...``."""
    return f"{prefix}_{secrets.token_hex(24)}"
