"""Text from elsewhere on a terminal: shown as text, whatever it holds."""

from __future__ import annotations

import re

# What a terminal would act on, or what hides or reorders text: control characters but line break
# and tab, marks of writing direction, other line breaks, tags, annotations, halves of surrogates.
_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u206f\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)


def harmless(text: str) -> str:
    """``text`` with a visible character for each that is not plain text; a carriage return is
    dropped. Line breaks and tabs stay."""
    return _UNSAFE.sub(_seen, text.replace("\r", "")) if _UNSAFE.search(text) else text


def _seen(match: re.Match[str]) -> str:
    code = ord(match.group())
    if code < 0x20:
        return chr(0x2400 + code)  # the picture of the control character
    return "\u2421" if code == 0x7F else "\ufffd"
