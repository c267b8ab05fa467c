"""Ids of tool calls, as each family of templates wants them."""

from __future__ import annotations

import hashlib
import secrets
import string
from collections.abc import Callable

OPENAI, MISTRAL, KIMI = "openai", "mistral", "kimi"
_ALPHABET = string.ascii_letters + string.digits
_MISTRAL_CHARS = 9  # Mistral's templates refuse ids of another length


def new_ids(style: str, earlier: int = 0) -> Callable[[str, int], str]:
    """What gives ids to new calls, from a name and an index within the answer. ``earlier``: calls
    in the conversation before, which Kimi counts on from."""
    if style == MISTRAL:
        return lambda name, index: "".join(secrets.choice(_ALPHABET) for _ in range(_MISTRAL_CHARS))
    if style == KIMI:
        return lambda name, index: f"functions.{name}:{earlier + index}"
    return lambda name, index: f"call_{secrets.token_hex(12)}"


def id_for_template(style: str, id_: str) -> str:
    """An id from a conversation as the family's template accepts it: the same for the same id."""
    if style != MISTRAL or (len(id_) == _MISTRAL_CHARS and id_.isascii() and id_.isalnum()):
        return id_
    number = int.from_bytes(hashlib.sha256(id_.encode("utf-8", "replace")).digest(), "big")
    digits = []
    for _ in range(_MISTRAL_CHARS):
        number, digit = divmod(number, len(_ALPHABET))
        digits.append(_ALPHABET[digit])
    return "".join(digits)
