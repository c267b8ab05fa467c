"""The ledger of the wire: bytes and exchanges that this rank sent, per scheme."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class Waits:
    """``seconds`` that this rank waited in exchanges that had not ended when it came to wait."""

    __slots__ = ("seconds",)

    def __init__(self) -> None:
        self.seconds = 0.0


@dataclass(frozen=True)
class Entry:
    """What this rank sent under one scheme.

    ``bytes``: payload; ``inter_host_bytes``: the part of it for ranks of other hosts;
    ``exchanges``: rounds in which this rank sent or received (a round may carry several messages).
    """

    bytes: int = 0
    inter_host_bytes: int = 0
    exchanges: int = 0


class Ledger:
    """Counts what this rank sends. What it receives is in the sender's ledger."""

    def __init__(self) -> None:
        self._counts: dict[str, list[int]] = {}  # scheme -> the fields of its entry

    def add(self, scheme: str, nbytes: int, inter_host_bytes: int, exchanges: int = 1) -> None:
        """Count one round or more of ``scheme``: payload bytes, those of them between hosts."""
        counts = self._counts.get(scheme)
        if counts is None:
            counts = self._counts[scheme] = [0, 0, 0]
        counts[0] += nbytes
        counts[1] += inter_host_bytes
        counts[2] += exchanges

    def __getitem__(self, scheme: str) -> Entry:
        """The entry of ``scheme``; zeros when nothing was sent under it."""
        return Entry(*self._counts.get(scheme, ()))

    def bytes_of(self, schemes: Sequence[str]) -> list[int]:
        """Bytes under each of ``schemes`` so far."""
        counts = self._counts
        return [counts[scheme][0] if scheme in counts else 0 for scheme in schemes]

    def schemes(self) -> dict[str, Entry]:
        """A copy of all entries."""
        return {scheme: Entry(*counts) for scheme, counts in self._counts.items()}

    def clear(self) -> None:
        """Forget all entries."""
        self._counts.clear()
