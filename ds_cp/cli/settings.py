"""What ``ds-cp chat`` may ask of an answer: its flags, and the names of /set."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from typing import Any

from ds_cp.errors import RequestError
from ds_cp.text import shorten

# By name: the kind of the value, and what it does.
SETTINGS: Mapping[str, tuple[type, str]] = {
    "max_tokens": (int, "tokens of an answer at most"),
    "temperature": (float, "0: always the most likely token; up to 2"),
    "top_p": (float, "of the most likely tokens, those that make up this much; 1: all"),
    "top_k": (int, "of the most likely tokens, this many; 0: all"),
    "min_p": (float, "tokens this likely, as a part of the most likely one"),
    "seed": (int, "the same seed gives the same answer"),
    "stop": (list, "texts that end an answer"),
    "presence_penalty": (float, "against tokens that are there, -2 to 2"),
    "frequency_penalty": (float, "against tokens by how often they are there, -2 to 2"),
    "repetition_penalty": (float, "above 1: against tokens that are there"),
}


def setting(name: str, text: str) -> Any:
    """The value of a setting. ``RequestError`` when ``text`` is none."""
    kind, _ = SETTINGS[name]
    try:
        if kind is list:
            return shlex.split(text)
        value = kind(text)
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError
        return value
    except ValueError:
        words = {int: "an integer", float: "a number", list: "words, quoted as in a shell"}
        raise RequestError(f"{name} is {shorten(text, 40)}; it must be {words[kind]}") from None
