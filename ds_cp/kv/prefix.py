"""Keys that name a prompt's beginning, block by block, for the prefix cache."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from hashlib import sha256

KEY_BYTES = 32  # of one key


class PrefixKeys:
    """The chain of keys of one token sequence: 32 bytes for each whole block.

    ``key[i] = sha256(key[i - 1] + tokens of block i)``, tokens as little-endian 4-byte integers,
    ``key[-1] = sha256(b"ds_cp" + salt)``. So equal keys mean equal salts and equal tokens from the
    start to the end of the block; sequences with different salts never share. Only whole blocks
    have keys: the tokens of a block that is not full yet belong to none. Raises ``ValueError``
    for a ``block_size`` below 1.
    """

    def __init__(self, block_size: int, salt: str) -> None:
        if block_size < 1:
            raise ValueError(f"need block_size >= 1, got {block_size}")
        self.block_size = block_size
        self._packed = struct.Struct(f"<{block_size}I")
        self._root = sha256(b"ds_cp" + salt.encode(errors="surrogatepass")).digest()
        self._keys: list[bytes] = []

    def fork(self, count_blocks: int) -> PrefixKeys:
        """The keys of a sequence that has the first ``count_blocks`` blocks in common."""
        other = object.__new__(PrefixKeys)
        other.block_size, other._packed, other._root = self.block_size, self._packed, self._root
        other._keys = self._keys[:count_blocks]
        return other

    def upto(self, tokens: Sequence[int], count_blocks: int) -> list[bytes]:
        """The keys of the first ``count_blocks`` blocks of ``tokens``.

        Keys are computed once and kept: the caller promises that ``tokens`` is the sequence of the
        calls before, grown at its end only. Raises ValueError when ``tokens`` has fewer whole
        blocks.
        """
        size = self.block_size
        if not 0 <= count_blocks <= len(tokens) // size:
            raise ValueError(
                f"{len(tokens)} tokens are {len(tokens) // size} whole blocks of {size}, "
                f"keys of {count_blocks} asked for"
            )
        keys = self._keys
        key = keys[-1] if keys else self._root
        for i in range(len(keys), count_blocks):
            block = self._packed.pack(*tokens[i * size : (i + 1) * size])
            key = sha256(key + block).digest()
            keys.append(key)
        return keys[:count_blocks]
