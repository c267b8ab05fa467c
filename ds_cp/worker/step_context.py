"""One step's attention on one rank: its work turned into index vectors, then asked layer by
layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from ds_cp.attention import (
    LayerSpec,
    LocalAttention,
    Mode,
    PagedKernel,
    Shards,
    TreeRoutes,
    finish,
    make_mode,
)
from ds_cp.attention.batch import IndexUpload, Room
from ds_cp.attention.kernels.cuda import CudaKernel
from ds_cp.attention.pages import Fresh, Pages
from ds_cp.attention.state import empty_partial
from ds_cp.comm.wire import Group
from ds_cp.kv.pool import KVPool
from ds_cp.kv.table import SequenceTable
from ds_cp.layout import Blocks, Runs, positions, total
from ds_cp.worker.decode_graph import DecodeInputs
from ds_cp.worker.shipment import Shipment
from ds_cp.worker.state import Item, RunningSequence, StepWork

EMPTY: Runs = ()  # no position
NO_BLOCKS = Blocks()


@dataclass(frozen=True)
class Layers:
    """What all steps of a rank share: what each layer asks of attention, the KV, the kernel, the
    group that spans, and the routes of its trees."""

    specs: Sequence[LayerSpec]
    pool: KVPool
    kernel: PagedKernel
    group: Group
    routes: TreeRoutes = field(default_factory=TreeRoutes)

    @property
    def windows(self) -> list[int | None]:
        """The windows that there are; None for layers without one."""
        return sorted({spec.window for spec in self.specs}, key=lambda window: window or 0)


@dataclass(frozen=True)
class Padding:
    """Makes the vectors of steps with the same spanning requests alike: ``rows`` of requests that
    are whole on this rank, keys of each batch as in ``room``. A padded row stores its key in the
    pool's scratch block, which is nobody's, and attends to nothing."""

    rows: int
    room: Room


class StepContext:
    """Implements ``Attend`` for one step. Shapes and messages follow from the plans alone.

    The rows of the flat batch: decodes that are whole on this rank, then the other local items,
    then items that span, mode by mode. ``ids``, ``positions``: int64 ``[1, T]``; ``logit_rows``:
    int64, rows whose logits are wanted, those of ``draws`` (mine, in order) before those of
    ``scored`` (mine, in order). The first ``num_fixed`` numbers of ``upload`` are all that layers
    read; in a step with ``padding`` they are as many as in another one of its kind.
    """

    def __init__(self, work: StepWork, layers: Layers, padding: Padding | None = None) -> None:
        self._layers = layers
        self._pool, self._kernel = layers.pool, layers.kernel
        group, me = layers.group, layers.group.rank
        size = layers.pool.block_size
        upload = IndexUpload(None if padding is None else padding.room)
        token_ids: list[int] = []
        places: list[int] = []  # positions of the rows
        last_row: dict[int, int] = {}  # request -> row of its last token, where I own it
        first_row: dict[int, tuple[int, list[int]]] = {}  # request -> first row, positions
        writes = _Writes(me, size)
        self._modes: list[Mode] = []
        self._shipments: list[Shipment] = []

        local: list[Shards] = []
        for sequence in work.decodes:
            table, row = sequence.table, len(token_ids)
            position = table.num_tokens - 1
            q_runs: Runs = ((position, 1),)
            last_row[sequence.number] = row
            token_ids.append(_token_at(sequence, position))
            places.append(position)
            writes.add(table, q_runs, row)
            writes.open(table, position)
            local.append(_only(me, group.size, q_runs, table.blocks_on(me)))
        if padding is not None and padding.rows > len(local):
            assert layers.pool.scratch is not None
            for row in range(len(local), padding.rows):
                token_ids.append(0)
                places.append(0)
                writes.discard(layers.pool.scratch, row)
                local.append(_only(me, group.size, ((0, 1),), NO_BLOCKS))
        items = work.items
        if padding is not None:  # so that those that are routed alike are alike in any order
            items = sorted(items, key=lambda item: item.routing)
        batches = _batches(items, me)
        for (mode, ring_pass, _), items in batches:
            begin, together = len(token_ids), []
            for item in items:
                shard, row = item.shard(me), len(token_ids)
                mine = positions(shard.q_runs) if shard else []
                if mine:
                    token_ids += [_token_at(item.sequence, p) for p in mine]
                    places += mine
                    first_row[item.sequence.number] = row, mine
                    last = item.start + item.count - 1
                    if item.draws and last in mine:
                        last_row[item.sequence.number] = row + mine.index(last)
                if item.ships:
                    self._shipments.append(Shipment(item, row, group, size, upload))
                elif shard is not None:
                    writes.add(item.sequence.table, shard.new_runs, row)
                writes.open(item.sequence.table, item.start)
                together.append(_shards(item, group.size))
            if mode == "local":
                local += together
            else:
                self._modes.append(
                    make_mode(
                        mode, ring_pass, together, group, begin, layers.windows, upload,
                        layers.routes,
                    )
                )  # fmt: skip
        self._local = LocalAttention(local, me, 0, upload) if local else None
        if self._local is not None:
            self._modes.insert(0, self._local)
        self.num_rows = len(token_ids)
        self.spans = any(mode != "local" for (mode, _, _), _ in batches) or bool(self._shipments)
        self.draws = [draw for draw in work.draws if draw.rank == me]
        self.scored = [stretch for stretch in work.scored if stretch[3] == me]
        logit_rows = [last_row[draw.sequence.number] for draw in self.draws]
        for sequence, first, count, _ in self.scored:
            begin, mine = first_row[sequence.number]
            at = begin + mine.index(first)
            logit_rows += range(at, at + count)
        self.row_positions = places

        stored, stored_blocks, stored_places, to_open = writes.vectors()
        fixed = [upload.add(x) for x in (token_ids, places, stored, stored_blocks, stored_places)]
        self.num_fixed = len(upload)
        rest = [upload.add(values) for values in (logit_rows, to_open)]
        upload.send(group.device)
        self.upload, self.padding = upload, padding
        ids, at_row, rows, blocks, slots = (upload[x] for x in fixed)
        self.logit_rows, opened = (upload[x] for x in rest)
        self.ids, self.positions = ids[None], at_row[None]
        self._write_rows = None if len(rows) == self.num_rows else rows
        self._write_at = blocks, slots
        self._pool.open(opened)

    def decode_inputs(self) -> DecodeInputs | None:
        """The step as a graph replays it, when it is nothing but one new token each of requests
        that are whole here."""
        alone = self._local is not None and len(self._modes) == 1 and not self._shipments
        if not alone or self._write_rows is not None or self.scored:
            return None
        assert self._local is not None
        batch = self._local.batch
        if batch.max_rows != 1 or batch.num_rows != len(batch.parts):
            return None
        return DecodeInputs(self.ids[0], self.positions[0], *self._write_at, batch)

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """``q [1, H, T, D]``, ``k [1, G, T, D]``, ``v [1, G, T, Dv]`` of my T new tokens -> ``[1,
        T, H, Dv]``.

        Stores K and V at home first, then folds every mode into one partial.
        """
        spec, pages = self._layers.specs[layer], self._pool.layer(layer)
        q_THD, k_TGD, v_TGD = (x[0].transpose(0, 1) for x in (q, k, v))
        self._store(pages, k_TGD, v_TGD)
        whole = self._whole_prompts(q_THD, k_TGD, v_TGD, spec)
        if whole is not None:
            return whole.unsqueeze(0)
        if isinstance(self._kernel, CudaKernel):
            pages = replace(pages, fresh=Fresh(q_THD, k_TGD, v_TGD))
        into = empty_partial(len(q_THD), spec.num_q_heads, spec.v_dim, q.device)
        for mode in self._modes:
            mode(q_THD, self.positions[0], pages, self._kernel, spec, into)
        return finish(into, spec, q.dtype).unsqueeze(0)

    def attend_without_tokens(self, dtype: torch.dtype, device: torch.device) -> None:
        """Take part in every layer's spanning attention although no token here is mine."""
        for layer, spec in enumerate(self._layers.specs):
            q, k, v = (
                torch.empty(1, heads, 0, dim, dtype=dtype, device=device)
                for heads, dim in (
                    (spec.num_q_heads, spec.head_dim),
                    (spec.num_kv_heads, spec.head_dim),
                    (spec.num_kv_heads, spec.v_dim),
                )
            )
            self.attend(layer, q, k, v)

    def _whole_prompts(
        self, q_THD: torch.Tensor, k_TGD: torch.Tensor, v_TGD: torch.Tensor, spec: LayerSpec
    ) -> torch.Tensor | None:
        """``[T, H, D]`` where the kernel has a way for prompts without earlier keys, and the step
        is nothing else."""
        if not isinstance(self._kernel, CudaKernel) or self._local is None:
            return None
        if len(self._modes) > 1 or self._shipments:
            return None
        size = self._pool.block_size
        return self._kernel.prefill(q_THD, k_TGD, v_TGD, self._local.batch, spec, size)

    def _store(self, pages: Pages, k_TGD: torch.Tensor, v_TGD: torch.Tensor) -> None:
        if len(self._write_at[0]):
            k_home, v_home = k_TGD, v_TGD
            if self._write_rows is not None:
                k_home, v_home = k_TGD[self._write_rows], v_TGD[self._write_rows]
            self._kernel.write(pages, k_home, v_home, *self._write_at)
        for shipment in self._shipments:
            shipment.run(k_TGD, v_TGD, pages, self._kernel)


def _batches(
    items: Sequence[Item], me: int
) -> list[tuple[tuple[str, str, tuple[int, ...]], list[Item]]]:
    """The items that run together, local ones first: (mode, what a ring passes, its ranks)."""
    batches: dict[tuple[str, str, tuple[int, ...]], list[Item]] = {}
    for item in items:
        if item.mode == "local":
            if item.shard(me) is not None:
                batches.setdefault(("local", "", ()), []).append(item)
            continue
        if item.mode == "ring":  # it visits the ranks of its items: those of one span share a ring
            around = tuple(s.rank for s in item.shards)
            batches.setdefault(("ring", item.ring_pass, around), []).append(item)
        else:
            batches.setdefault((item.mode, "", ()), []).append(item)
    return sorted(batches.items(), key=lambda pair: pair[0])  # "local" is before "ring" and "tree"


class _Writes:
    """Which rows of the flat batch are stored here, and where."""

    def __init__(self, me: int, block_size: int) -> None:
        self._me = me
        self._size = block_size
        self._rows: list[int] = []
        self._blocks: list[int] = []
        self._places: list[int] = []
        self._opened: list[int] = []

    def add(self, table: SequenceTable, runs: Runs, row: int) -> None:
        """The tokens at ``runs``, in rows from ``row`` on, have their home here."""
        size = self._size
        self._rows += range(row, row + total(runs))
        for start, length in runs:
            while length:
                index, place = divmod(start, size)
                count = min(size - place, length)
                self._blocks += [table.homes[index][1]] * count
                self._places += range(place, place + count)
                start, length = start + count, length - count

    def discard(self, block: int, row: int) -> None:
        """The padded row ``row`` is stored in ``block``, which is nobody's."""
        self._rows.append(row)
        self._blocks.append(block)
        self._places.append(row % self._size)

    def open(self, table: SequenceTable, start: int) -> None:
        """The sequence has tokens from ``start`` on that are new. Its last block is opened when
        that gets its first token now and is not filled: it may hold what another request left."""
        index, filled = divmod(table.num_tokens, self._size)
        if filled and index * self._size >= start and table.homes[index][0] == self._me:
            self._opened.append(table.homes[index][1])

    def vectors(self) -> tuple[list[int], list[int], list[int], list[int]]:
        """Rows, their blocks, their places in these, and the blocks to open."""
        return self._rows, self._blocks, self._places, self._opened


def _only(rank: int, size: int, q_runs: Runs, blocks: Blocks) -> Shards:
    """A request that is whole on one rank."""
    return Shards(
        tuple(q_runs if r == rank else EMPTY for r in range(size)),
        tuple(blocks if r == rank else NO_BLOCKS for r in range(size)),
    )


def _shards(item: Item, size: int) -> Shards:
    q_runs, blocks = [EMPTY] * size, [NO_BLOCKS] * size
    for shard in item.shards:
        q_runs[shard.rank], blocks[shard.rank] = shard.q_runs, shard.blocks
    return Shards(tuple(q_runs), tuple(blocks))


def _token_at(sequence: RunningSequence, position: int) -> int:
    """The token to compute: one that all ranks know, or the one drawn last."""
    if position < len(sequence.tokens):
        return sequence.tokens[position]
    return max(sequence.last, 0)  # -1 after logits that were no numbers: the request is ending
