"""The ledger of the wire: bytes and exchanges that this rank sent, per scheme."""

from __future__ import annotations

from dataclasses import dataclass


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
        self._entries: dict[str, Entry] = {}

    def add(self, scheme: str, nbytes: int, inter_host_bytes: int, exchanges: int = 1) -> None:
        """Count one round or more of ``scheme``: payload bytes, those of them between hosts."""
        old = self._entries.get(scheme, Entry())
        self._entries[scheme] = Entry(
            old.bytes + nbytes,
            old.inter_host_bytes + inter_host_bytes,
            old.exchanges + exchanges,
        )

    def __getitem__(self, scheme: str) -> Entry:
        """The entry of ``scheme``; zeros when nothing was sent under it."""
        return self._entries.get(scheme, Entry())

    def schemes(self) -> dict[str, Entry]:
        """A copy of all entries."""
        return dict(self._entries)

    def clear(self) -> None:
        """Forget all entries."""
        self._entries.clear()
