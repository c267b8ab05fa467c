"""What a JSON text costs to read, found before it is read.

A reader of JSON makes an object for every value, and does so without letting the event loop run:
8 MB of ``1e9,1e9,...`` take it 0.4 s, 8 MB of ``{},{},...`` take 170 MB. The counts below cost one
look at the bytes, whatever they spell.
"""

from __future__ import annotations

MAX_MEMBERS = 100_000  # strings, lists, objects, and numbers that are not integers, of one body
MAX_VALUES = 1_000_000  # values of one body, unless the model is longer than this
MAX_DIGITS = 500  # consecutive digits; reading a number costs the square of them
_ZEROS = bytes.maketrans(b"123456789", b"000000000")


def too_heavy(text: bytes, max_values: int) -> str | None:
    """Why a JSON text is not read, or None. Of a text that is not JSON, the part before its fault
    is counted as if it were.

    ``max_values``: commas outside of strings, at most; ``MAX_VALUES`` if that is more.
    """
    most = max(max_values, MAX_VALUES)
    # Without its escaped backslashes and then its escaped quotes, a text has quotes only where
    # strings begin and end.
    bare = text.replace(b"\\\\", b"").replace(b'\\"', b"")
    strings = bare.count(b'"') // 2
    if strings > MAX_MEMBERS:
        return _too_many(strings, "strings", MAX_MEMBERS)
    outside = b"".join(bare.split(b'"')[::2])
    del bare
    # An exponent is an e, and so are the ends of true and false.
    members = strings + sum(outside.count(mark) for mark in (b"[", b"{", b".", b"e", b"E"))
    if members > MAX_MEMBERS:
        return _too_many(members, "strings, lists, objects and fractions", MAX_MEMBERS)
    values = outside.count(b",")
    if values > most:
        return _too_many(values, "values", most)
    if b"0" * (MAX_DIGITS + 1) in outside.translate(_ZEROS):
        return f"not usable JSON: a number has more than {MAX_DIGITS} digits"
    return None


def _too_many(count: int, what: str, most: int) -> str:
    return f"too much to read: it has {count} {what}; at most {most}"
