"""Bytes that attention over ranks should send, by the formulas of docs/formulas.md: what /metrics
shows beside those that were counted. Integers only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ds_cp.facts import Facts
from ds_cp.kv.table import SequenceTable
from ds_cp.layout import Runs, total
from ds_cp.plan import Chunk

Bytes = dict[str, int]  # by scheme, of all ranks together


@dataclass(frozen=True)
class WireModel:
    """One layer's sizes, of a rank's own heads. ``windows``: (window W, number of layers that have
    it); the other layers see every key. ``kv_bytes``: of one token; ``q_bytes``: of one query;
    ``partial_bytes``: of one query's partial; ``block_size``: in tokens."""

    num_layers: int
    windows: tuple[tuple[int, int], ...]
    kv_bytes: int
    q_bytes: int
    partial_bytes: int
    block_size: int

    @classmethod
    def of(cls, facts: Facts) -> WireModel:
        """The sizes of a model as it is served."""
        element = 4 if facts.dtype == "float32" else 2
        heads = facts.num_q_heads // facts.tp_size
        return cls(
            facts.num_layers, facts.windows, facts.bytes_per_token // facts.num_layers,
            heads * facts.head_dim * element, heads * (facts.head_dim * element + 4),
            facts.block_size,
        )  # fmt: skip

    def of_chunk(self, chunk: Chunk, table: SequenceTable) -> Bytes:
        """Of a chunk whose tokens ``table`` has already."""
        found = self._shipped(chunk.owners, table)
        if chunk.mode != "local":
            owned = {rank: total(runs) for rank, runs in chunk.owners}
            for scheme, count in self._attention(chunk.mode, chunk.ring_pass, owned, table):
                found[scheme] = found.get(scheme, 0) + count
        return found

    def of_decode(self, mode: str, ring_pass: str, table: SequenceTable) -> Bytes:
        """Of one new token, which ``table`` has already: as ``of_chunk``, in a time that does not
        grow with the sequence, for every request and step has it. Its owner has its newest key, so
        all ranks that are asked but one are others."""
        if mode == "local":
            return {}
        size, length, others = self.block_size, table.num_tokens, table.width - 1
        layers = self.num_layers  # without a window, or with one that the sequence is in
        if mode == "ring" and ring_pass == "kv":
            around, tokens = others * len(table.homes) * size, 0
            for window, count in self.windows:
                if window < length:
                    tokens += count * min(around, window + size)
                    layers -= count
            return {"ring_pass_kv": (tokens + layers * around) * self.kv_bytes}
        rows = 0
        for window, count in self.windows:
            if window < length:
                rows += count * (table.ranks_from((length - window) // size) - 1)
                layers -= count
        rows += layers * others
        asked, answered = ("tree_q", "tree_partials") if mode == "tree" else (
            "ring_pass_q", "ring_pass_q_partials"
        )  # fmt: skip
        return {asked: rows * self.q_bytes, answered: rows * self.partial_bytes}

    def _attention(
        self, mode: str, ring_pass: str, owned: dict[int, int], table: SequenceTable
    ) -> Iterator[tuple[str, int]]:
        """``owned``: new tokens by rank."""
        whole = self.num_layers - sum(count for _, count in self.windows)
        for window, layers in ((None, whole), *self.windows):
            seen = None if window is None or window >= table.num_tokens else window
            if mode == "ring" and ring_pass == "kv":
                yield "ring_pass_kv", layers * self._kv_around(owned, table, seen)
                continue
            names = "tree_q", "tree_partials"
            if mode == "ring":
                names = "ring_pass_q", "ring_pass_q_partials"
            asked, answered = self._rows(owned, table, seen, around=mode == "ring")
            yield names[0], layers * asked * self.q_bytes
            yield names[1], layers * answered * self.partial_bytes

    def _kv_around(self, owned: dict[int, int], table: SequenceTable, window: int | None) -> int:
        """(N - 1) blocks of all ranks together; in a window about (W + b) tokens before each of two
        stretches of queries of a rank, at most that."""
        ranks = len({*owned, *table.span})
        tokens = (ranks - 1) * len(table.homes) * self.block_size
        if window is not None:
            stretches = 2 * len(owned) if sum(owned.values()) > 1 else 1
            tokens = min(tokens, stretches * (window + self.block_size))
        return tokens * self.kv_bytes

    def _rows(
        self, owned: dict[int, int], table: SequenceTable, window: int | None, around: bool
    ) -> tuple[int, int]:
        """Rows that travel as queries, and as partials: to every other rank of the ring, or of the
        ranks with keys that are seen; back from those with keys."""
        holders = set(table.span)
        if window is not None:
            first = max(0, table.num_tokens - sum(owned.values()) - window + 1)
            holders = {rank for rank, _ in table.homes[first // self.block_size :]}
        back = sum(count * len(holders - {rank}) for rank, count in owned.items())
        ranks = len({*owned, *holders})
        out = sum(owned.values()) * (ranks - 1) if around and window is None else back
        return out, back

    def _shipped(self, owners: Sequence[tuple[int, Runs]], table: SequenceTable) -> Bytes:
        """KV of new tokens whose home is another rank than their owner."""
        size, moved = self.block_size, 0
        for rank, runs in owners:
            for start, length in runs:
                while length:
                    index, place = divmod(start, size)
                    count = min(size - place, length)
                    moved += count if table.homes[index][0] != rank else 0
                    start, length = start + count, length - count
        return {"ship_kv": moved * self.kv_bytes * self.num_layers} if moved else {}
