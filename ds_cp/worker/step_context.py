"""One step's attention on one rank: its work turned into index vectors, then asked layer by
layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ds_cp.attention import (
    BatchedDecode,
    Kernel,
    KeyValues,
    LayerSpec,
    LocalAttention,
    Mode,
    Span,
    finish,
    make_mode,
)
from ds_cp.attention.batched_decode import LONGEST
from ds_cp.comm.wire import Group
from ds_cp.kv.pool import KVPool
from ds_cp.kv.table import Extents
from ds_cp.layout import Runs, head, join, overlap, positions, total
from ds_cp.worker.state import Item, RunningSequence, StepWork

SCHEME_SHIP = "ship_kv"  # name in the ledger
EMPTY: Runs = ()  # no position


@dataclass(frozen=True)
class _Part:
    """My rows of one item in the step's flat batch, and the KV I attend with.

    ``rows``: [begin, end) of my new tokens; ``resident``: extents to read from the pool; ``fresh``:
    whether my own new K and V come from the layer rather than from the pool, because their home is
    elsewhere.
    """

    rows: tuple[int, int]
    resident: Extents
    fresh: bool


class StepContext:
    """Implements ``Attend`` for one step. Shapes and messages follow from the plans alone.

    ``logit_rows``: rows of the flat batch whose logits are wanted, those of ``draws`` (mine, in
    order) before those of ``scored`` (mine, in order).
    """

    def __init__(
        self,
        work: StepWork,
        group: Group,
        layers: Sequence[LayerSpec],
        pool: KVPool,
        kernel: Kernel,
    ) -> None:
        self._group = group
        self._layers = layers
        self._pool = pool
        self._kernel = kernel
        me, device = group.rank, group.device
        self.token_ids: list[int] = []
        self.positions: list[int] = []
        self._last_row: dict[int, int] = {}  # request -> row of its last token, where I own it
        self._first_row: dict[int, tuple[int, list[int]]] = {}  # request -> first row, positions
        self._shipments: list[_Shipment] = []
        self._modes: list[tuple[Mode, list[_Part]]] = []
        write_rows: list[int] = []
        write_extents: list[tuple[int, int]] = []
        self._batched: BatchedDecode | None = None
        if work.decodes:
            self._add_decodes(work.decodes, write_extents)
            write_rows += range(len(work.decodes))
        batches: dict[tuple[str, str, tuple[int, ...]], list[tuple[Span, _Part]]] = {}
        for item in work.items:
            part = self._add(item, me)
            span = self._span(item)
            if item.ships:
                self._shipments.append(_Shipment(item, part.rows[0], group))
            elif (shard := item.shard(me)) is not None and shard.new:
                write_rows += range(*part.rows)
                write_extents += shard.new_extents
            if item.mode != "local" or item.shard(me) is not None:
                # A ring visits the ranks of its items, so items of one span share a ring.
                around = tuple(s.rank for s in item.shards) if item.mode == "ring" else ()
                batches.setdefault((item.mode, item.ring_pass, around), []).append((span, part))
        self._modes += [
            (make_mode(mode, pass_, [span for span, _ in batch], group), [p for _, p in batch])
            for (mode, pass_, _), batch in sorted(batches.items(), key=lambda pair: pair[0])
        ]
        self._write_extents = join(write_extents)
        self._write_all = len(write_rows) == len(self.token_ids)
        self._write_rows = torch.tensor(write_rows, dtype=torch.int64, device=device)
        self._write_slots = torch.tensor(
            positions(self._write_extents), dtype=torch.int64, device=device
        )
        self.num_rows = len(self.token_ids)
        self.spans = any(mode != "local" for mode, _, _ in batches) or bool(self._shipments)
        self.draws = [draw for draw in work.draws if draw.rank == me]
        self.scored = [stretch for stretch in work.scored if stretch[3] == me]
        self.logit_rows = [self._last_row[draw.sequence.number] for draw in self.draws]
        for sequence, first, count, _ in self.scored:
            begin, mine = self._first_row[sequence.number]
            at = begin + mine.index(first)
            self.logit_rows += range(at, at + count)

    def _add_decodes(
        self, decodes: Sequence[RunningSequence], write_extents: list[tuple[int, int]]
    ) -> None:
        """One new token each of requests that are whole on this rank: short ones are attended
        together."""
        me = self._group.rank
        short = [s for s in decodes if s.table.num_tokens <= LONGEST]
        if len(short) == 1:
            short = []
        long = [s for s in decodes if not short or s.table.num_tokens > LONGEST]
        gathered: list[Extents] = []
        runs: list[tuple[Runs, Runs]] = []
        parts: list[_Part] = []
        for row, sequence in enumerate([*short, *long]):
            position = sequence.table.num_tokens - 1
            self.token_ids.append(_token_at(sequence, position))
            self.positions.append(position)
            self._last_row[sequence.number] = row
            write_extents.append((sequence.table.slot(position)[1], 1))
            k_runs, extents = sequence.table.part(me)
            if row < len(short):
                gathered.append(extents)
            else:
                runs.append((((position, 1),), k_runs))
                parts.append(_Part((row, row + 1), extents, False))
        if gathered:
            self._batched = BatchedDecode(gathered, self._pool.dtype, self._group.device)
        if parts:
            self._modes.append((LocalAttention(runs), parts))

    def _add(self, item: Item, me: int) -> _Part:
        """Append my new tokens of ``item`` to the flat batch."""
        shard = item.shard(me)
        begin = len(self.token_ids)
        if shard is None:
            return _Part((begin, begin), (), False)
        mine = positions(shard.q_runs)
        if mine:
            self.token_ids += [_token_at(item.sequence, p) for p in mine]
            self.positions += mine
            self._first_row[item.sequence.number] = begin, mine
            last = item.start + item.count - 1
            if item.draws and last in mine:
                self._last_row[item.sequence.number] = begin + mine.index(last)
        stored = total(shard.extents)
        resident = shard.extents
        if item.ships:
            resident = head(shard.extents, stored - shard.new)
        return _Part((begin, len(self.token_ids)), resident, item.ships)

    def _span(self, item: Item) -> Span:
        """The owner of each query and the holder of each key. When KV ships, new keys are still
        with their owners."""
        q_runs: list[Runs] = [EMPTY] * self._group.size
        k_runs: list[Runs] = [EMPTY] * self._group.size
        for shard in item.shards:
            q_runs[shard.rank] = shard.q_runs
            k_runs[shard.rank] = shard.k_runs
            if item.ships:
                earlier = head(shard.k_runs, total(shard.k_runs) - shard.new)
                k_runs[shard.rank] = join((*earlier, *shard.q_runs))
        return Span(tuple(q_runs), tuple(k_runs))

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """``q [1, H, T, D]``, ``k, v [1, G, T, D]`` of my T new tokens -> ``[1, T, H, D]``.

        Stores K and V at home first, then attends item by item in each mode.
        """
        spec = self._layers[layer]
        self._store(layer, k[0], v[0])
        q_THD, k_TGD, v_TGD = (x[0].transpose(0, 1) for x in (q, k, v))
        out = torch.empty(q_THD.shape, dtype=q.dtype, device=q.device)
        if self._batched is not None:
            first = slice(0, self._batched.num_rows)
            partial = self._batched(q_THD[first], self._pool.of_layer(layer), self._kernel, spec)
            out[first] = finish(partial, spec, q.dtype)
        for mode, parts in self._modes:
            queries, kv = [], []
            for part in parts:
                rows = slice(*part.rows)
                held = self._pool.read(layer, part.resident)
                if part.fresh:
                    held = KeyValues((*held.pieces, (k_TGD[rows], v_TGD[rows])))
                queries.append(q_THD[rows])
                kv.append(held)
            found = mode(queries, kv, self._kernel, spec)
            for part, partial in zip(parts, found, strict=True):
                if part.rows[0] < part.rows[1]:
                    out[slice(*part.rows)] = finish(partial, spec, q.dtype)
        return out.unsqueeze(0)

    def attend_without_tokens(self, dtype: torch.dtype, device: torch.device) -> None:
        """Take part in every layer's spanning attention although no token here is mine."""
        for layer, spec in enumerate(self._layers):
            q = torch.empty(1, spec.num_q_heads, 0, spec.head_dim, dtype=dtype, device=device)
            kv = torch.empty(1, spec.num_kv_heads, 0, spec.head_dim, dtype=dtype, device=device)
            self.attend(layer, q, kv, kv)

    def _store(self, layer: int, k_GTD: torch.Tensor, v_GTD: torch.Tensor) -> None:
        if self._write_slots.numel():
            if self._write_all:
                k_home, v_home = k_GTD, v_GTD
            else:
                k_home, v_home = k_GTD[:, self._write_rows], v_GTD[:, self._write_rows]
            self._pool.write(layer, k_home, v_home, self._write_slots, self._write_extents)
        for shipment in self._shipments:
            shipment.run(layer, k_GTD, v_GTD, self._pool)


class _Shipment:
    """One item whose new tokens' homes are not their owners: K and V travel there once, one message
    per pair of ranks. ``begin``: my first row of the item in the flat batch."""

    def __init__(self, item: Item, begin: int, group: Group) -> None:
        self._group = group
        me, device = group.rank, group.device
        mine = item.shard(me)
        owned = mine.q_runs if mine else EMPTY
        homes = mine.new_home_runs if mine else EMPTY
        row_of = {p: begin + i for i, p in enumerate(positions(owned))}
        slots = positions(mine.new_extents) if mine else []
        slot_of = dict(zip(positions(homes), slots, strict=True))

        def index(places: dict[int, int], runs: Runs) -> torch.Tensor:
            return torch.tensor([places[p] for p in positions(runs)], device=device)

        self._out: list[tuple[int, torch.Tensor]] = []  # peer, my rows
        self._in: list[tuple[int, torch.Tensor]] = []  # peer, my slots
        self._stay: list[tuple[torch.Tensor, torch.Tensor]] = []  # my rows, my slots
        for shard in item.shards:
            going = overlap(owned, shard.new_home_runs)
            coming = overlap(shard.q_runs, homes)
            if shard.rank == me:
                if going:
                    self._stay.append((index(row_of, going), index(slot_of, going)))
                continue
            if going:
                self._out.append((shard.rank, index(row_of, going)))
            if coming:
                self._in.append((shard.rank, index(slot_of, coming)))

    def run(self, layer: int, k_GTD: torch.Tensor, v_GTD: torch.Tensor, pool: KVPool) -> None:
        """Send, store what stays, then store what arrives."""
        heads, _, dim = k_GTD.shape
        sends = [(peer, torch.stack([k_GTD[:, rows], v_GTD[:, rows]])) for peer, rows in self._out]
        recvs = [(peer, k_GTD.new_empty(2, heads, len(at), dim)) for peer, at in self._in]
        pending = self._group.exchange(sends, recvs, SCHEME_SHIP)
        for rows, slots in self._stay:
            pool.write(layer, k_GTD[:, rows], v_GTD[:, rows], slots)
        pending.wait()
        for (_, slots), (_, both) in zip(self._in, recvs, strict=True):
            pool.write(layer, both[0], both[1], slots)


def _token_at(sequence: RunningSequence, position: int) -> int:
    """The token to compute: one that all ranks know, or the one drawn last."""
    if position < len(sequence.tokens):
        return sequence.tokens[position]
    return max(sequence.last, 0)  # -1 after logits that were no numbers: the request is ending
