"""The books of the wire: bytes and exchanges that this rank sent, per scheme and per link."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """``bytes``: payload this rank sent; ``inter_host_bytes``: the part of it that left the host;
    ``exchanges``: rounds in which this rank took part (a round may carry several messages)."""

    bytes: int = 0
    inter_host_bytes: int = 0
    exchanges: int = 0


class Ledger:
    """Counts what is sent. Receiving is somebody else's sending, so it is not counted again."""

    def __init__(self) -> None:
        self._entries: dict[str, Entry] = {}

    def add(self, scheme: str, nbytes: int, inter_host_bytes: int, exchanges: int = 1) -> None:
        old = self._entries.get(scheme, Entry())
        self._entries[scheme] = Entry(
            old.bytes + nbytes,
            old.inter_host_bytes + inter_host_bytes,
            old.exchanges + exchanges,
        )

    def __getitem__(self, scheme: str) -> Entry:
        return self._entries.get(scheme, Entry())

    def schemes(self) -> dict[str, Entry]:
        """A copy of all entries."""
        return dict(self._entries)

    def clear(self) -> None:
        self._entries.clear()
