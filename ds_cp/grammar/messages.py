"""What the process that compiles grammars is asked and answers (``ds_cp.frames``)."""

from __future__ import annotations

import msgspec

from ds_cp.grammar.vocabulary import Vocabulary


class Tokens(msgspec.Struct, frozen=True, tag="tokens"):
    """The first message: a tokenizer as the text of a ``tokenizer.json``. The answer is its
    ``Vocabulary``."""

    text: str


class Job(msgspec.Struct, frozen=True, tag="job"):
    """Compile a grammar. ``foreign``: it is in Lark's or GBNF's syntax, not made by
    ``ds_cp.grammar.lark``. ``cpu_s``, ``wall_s``: seconds of computing and by the clock;
    ``memory_bytes``: more than the process has. The kernel ends a process that passes them."""

    source: str
    foreign: bool
    cpu_s: float
    wall_s: float
    memory_bytes: int


class Known(msgspec.Struct, frozen=True, tag="known"):
    """What each token spells."""

    vocabulary: Vocabulary


class Compiled(msgspec.Struct, frozen=True, tag="compiled"):
    """It compiles, and its first mask was made. ``source``: its text for ``matcher.Compiler``."""

    source: str


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """It is no grammar, or no tokenizer, in one line."""

    reason: str


class Unable(msgspec.Struct, frozen=True, tag="unable"):
    """It was not compiled, which says nothing of it: why, in one line."""

    reason: str


Answer = Compiled | Failed | Unable
First = Known | Failed
