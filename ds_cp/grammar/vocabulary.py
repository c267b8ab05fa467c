"""What each token spells, in bytes: all that a rank needs of a tokenizer to keep a grammar."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import msgspec

MAX_BYTES = 16 * 2**20  # bytes of all tokens together, and of their lengths; 262,144 have 3 MiB


class Vocabulary(msgspec.Struct, frozen=True, array_like=True):
    """``text``: the bytes of all tokens, in the order of their ids; ``lengths``: two bytes each,
    little-endian. ``special``: ids that are no text: they may come only where a grammar names them.
    """

    text: bytes
    lengths: bytes
    special: tuple[int, ...] = ()

    @classmethod
    def of(cls, tokens: Sequence[bytes], special: Sequence[int]) -> Vocabulary:
        """From each token's bytes. Raises ``ValueError`` for more than ``MAX_BYTES``, and for a
        token of 64 KiB."""
        longest = max(map(len, tokens), default=0)
        if longest >= 2**16:
            raise ValueError(f"a token of {longest} bytes")
        found = cls(
            b"".join(tokens),
            b"".join(len(token).to_bytes(2, "little") for token in tokens),
            tuple(special),
        )
        if found.size > MAX_BYTES:
            raise ValueError(f"tokens of {found.size} bytes together; at most {MAX_BYTES}")
        return found

    @property
    def size(self) -> int:
        """Bytes on the wire, at most."""
        return len(self.text) + len(self.lengths) + 5 * len(self.special) + 64

    def tokens(self) -> list[bytes]:
        """The bytes of each token, by id."""
        both = memoryview(self.lengths)
        counts = [int.from_bytes(both[i : i + 2], "little") for i in range(0, len(both), 2)]
        ends = list(accumulate(counts))
        return [self.text[end - count : end] for end, count in zip(ends, counts, strict=True)]
