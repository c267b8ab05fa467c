"""Decode steps replayed as CUDA graphs: one launch in place of hundreds.

A step that only decodes requests which are whole on this rank has the same operations as the last
one of as many rows. They are captured once over buffers that stay where they are; a step copies its
index vectors into them and replays. Rows are padded to a power of two: a padded row stores its key
in a block that is nobody's and attends to nothing. How many keys there are is padded too, so that
whatever a kernel plans on the host has room for the steps to come.

Not captured: prompts. Steps with requests that span are in ``span_graph``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ds_cp.attention import LayerSpec, PagedKernel, finish
from ds_cp.attention.batch import PagedBatch, parts_with_room
from ds_cp.kv.pool import KVPool

FEWEST_KEYS = 4096  # least room for keys, all rows together; then 4 times as much each
MARGIN = 1024  # positions; kernels cut a request's keys at multiples of at most this
MOST_ENTRIES = 2**20  # blocks that all rows of a step may name; bounds the buffers (24 MiB)

# ids [1, P], positions [1, P], the step's ``Attend`` -> logits [P, V]
Forward = Callable[[torch.Tensor, torch.Tensor, Any], torch.Tensor]


class Graph(Protocol):
    """Operations that can be repeated over the same memory."""

    def capture(self, run: Callable[[], None]) -> None:
        """Record what ``run`` does. Runs it at least once for real first."""
        ...

    def record(self, run: Callable[[], None]) -> None:
        """Record what ``run`` does, which ran before. Does nothing of it: where it sends messages,
        each rank's rounds stay as many as its peers'."""
        ...

    def replay(self) -> None:
        """Do it again."""
        ...

    def release(self) -> None:
        """Give up what was recorded; no replay follows."""
        ...


class CudaGraph:
    """``torch.cuda.CUDAGraph``; the graphs of one ``pool`` share memory, as one runs at a time."""

    def __init__(self, device: torch.device, pool: Any) -> None:
        self._device = device
        self._pool = pool
        self._graph = torch.cuda.CUDAGraph()

    def capture(self, run: Callable[[], None]) -> None:
        """As in ``Graph``. The first run, on a stream of its own, compiles kernels and fills
        workspaces, which a capture must not."""
        current = torch.cuda.current_stream(self._device)
        side = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        side.wait_stream(current)
        with torch.cuda.stream(side):
            run()
        current.wait_stream(side)
        self.record(run)

    def record(self, run: Callable[[], None]) -> None:
        """As in ``Graph``."""
        torch.cuda.synchronize(self._device)
        # Only this thread's calls count: a thread that watches NCCL may ask its events meanwhile.
        with torch.cuda.graph(self._graph, pool=self._pool, capture_error_mode="thread_local"):
            run()

    def replay(self) -> None:
        """As in ``Graph``."""
        self._graph.replay()

    def release(self) -> None:
        """As in ``Graph``."""
        self._graph.reset()


def cuda_graphs(device: torch.device) -> Callable[[], Graph]:
    """Makes graphs that share memory on ``device``."""
    pool = torch.cuda.graph_pool_handle()
    return lambda: CudaGraph(device, pool)


@dataclass(frozen=True, eq=False)
class DecodeInputs:
    """One step of R requests with one new token each, in row order, on the device: ``ids``,
    ``positions``, and where each row's key goes, ``blocks`` and ``places`` (int64 ``[R]``);
    ``batch``: request i is row i."""

    ids: torch.Tensor
    positions: torch.Tensor
    blocks: torch.Tensor
    places: torch.Tensor
    batch: PagedBatch


class DecodeGraphs:
    """Captured decode steps by padded number of rows and of keys, captured when first needed.

    ``scratch``: a block of the pool that no request ever gets. ``max_blocks``: of one request.
    ``note`` gets one line when the kernel cannot be captured or a capture fails; from then on every
    step runs eagerly.
    """

    def __init__(
        self,
        forward: Forward,
        specs: Sequence[LayerSpec],
        pool: KVPool,
        kernel: PagedKernel,
        scratch: int,
        max_rows: int,
        max_blocks: int,
        device: torch.device,
        make_graph: Callable[[], Graph],
        note: Callable[[str], None],
    ) -> None:
        self._forward = forward
        self._layers = _Layers(specs, pool, kernel)
        self._scratch = scratch
        self._sizes = padded_sizes(max_rows)
        self._entries = min(max_rows * max_blocks, MOST_ENTRIES)
        self._make_graph = make_graph
        self._note = note
        self._static = _Static(self._sizes[-1], self._entries, scratch, pool.block_size, device)
        self._graphs: dict[tuple[int, int], Graph] = {}
        self._logits: torch.Tensor | None = None
        self._off = not getattr(kernel, "capturable", False)
        if self._off:
            note(
                f"decode steps are not captured in CUDA graphs: kernel {kernel.name}, as it is set "
                "up, plans each step on the host"
            )

    @property
    def captured(self) -> list[tuple[int, int]]:
        """(rows, keys) of the graphs that there are."""
        return sorted(self._graphs)

    def run(self, inputs: DecodeInputs) -> torch.Tensor | None:
        """Logits ``[R, V]`` of the step, valid until the next one; None when it has to run
        eagerly. Keys and values are stored as by an eager step."""
        rows, entries = len(inputs.ids), len(inputs.batch.blocks)
        if self._off or not 0 < rows <= self._sizes[-1] or entries > self._entries:
            return None
        size = next(size for size in self._sizes if size >= rows)
        keys = sum(part.blocks.num_keys for part in inputs.batch.parts)
        key = size, padded_keys(keys)
        self._static.fill(inputs, size)
        if key not in self._graphs and not self._capture(*key):
            return None
        self._graphs[key].replay()
        assert self._logits is not None
        return self._logits[:rows]

    def _capture(self, size: int, keys: int) -> bool:
        graph = self._make_graph()
        try:
            graph.capture(lambda: self._once(size, keys))
        except Exception as err:  # whatever the model or a kernel does that cannot be captured
            self._off = True
            self._graphs.clear()
            first = (str(err).strip() or type(err).__name__).splitlines()[0]
            self._note(f"decode steps are not captured in CUDA graphs: {first}")
            return False
        self._graphs[size, keys] = graph
        return True

    def _once(self, size: int, keys: int) -> None:
        """The step over the buffers: what is captured."""
        static = self._static
        step = _StaticStep(self._layers, static, size, keys)
        logits = self._forward(static.ids[None, :size], static.positions[None, :size], step)
        if self._logits is None:
            self._logits = logits.new_empty(self._sizes[-1], logits.shape[1])
        self._logits[:size] = logits


def padded_sizes(max_rows: int) -> list[int]:
    """1, 2, 4, 8 ... ``max_rows``."""
    sizes = [1]
    while sizes[-1] < max_rows:
        sizes.append(min(2 * sizes[-1], max_rows))
    return sizes


def padded_keys(keys: int) -> int:
    """Room for ``keys`` keys of all rows, whatever their parts are rounded up to."""
    room = FEWEST_KEYS
    while room < keys + MARGIN:
        room *= 4
    return room


@dataclass(frozen=True)
class _Layers:
    specs: Sequence[LayerSpec]
    pool: KVPool
    kernel: PagedKernel


class _Static:
    """The buffers that graphs read. At first every row is padded."""

    def __init__(
        self, rows: int, entries: int, scratch: int, block_size: int, device: torch.device
    ) -> None:
        def numbers(count: int) -> torch.Tensor:
            return torch.zeros(count, dtype=torch.int64, device=device)

        self._scratch = scratch
        self.ids, self.positions = numbers(rows), numbers(rows)
        self.write_blocks = torch.full_like(self.ids, scratch)
        self.places = torch.arange(rows, device=device) % block_size
        self.q_starts = torch.arange(rows + 1, device=device)
        self.block_starts = numbers(rows + 1)
        self.blocks, self.firsts, self.keys = (numbers(max(1, entries)) for _ in range(3))

    def fill(self, inputs: DecodeInputs, size: int) -> None:
        """Put a step into the first rows; the others up to ``size`` are padded. Rows behind these
        are in no graph that runs before the next ``fill``."""
        rows, batch = len(inputs.ids), inputs.batch
        sources = [
            inputs.ids, inputs.positions, inputs.blocks, inputs.places,
            batch.block_starts, batch.blocks, batch.firsts, batch.keys,
        ]  # fmt: skip
        targets = [
            self.ids, self.positions, self.write_blocks, self.places,
            self.block_starts, self.blocks, self.firsts, self.keys,
        ]  # fmt: skip
        pairs = list(zip(targets, sources, strict=True))
        torch._foreach_copy_([target[: len(source)] for target, source in pairs], sources)
        if rows < size:
            self.write_blocks[rows:size].fill_(self._scratch)
            self.block_starts[rows + 1 : size + 1].fill_(len(batch.blocks))


class _StaticStep:
    """``Attend`` over the buffers."""

    def __init__(self, layers: _Layers, static: _Static, size: int, keys: int) -> None:
        self._layers = layers
        self._positions = static.positions[:size]
        self._at = static.write_blocks[:size], static.places[:size]
        # New for each run: what kernels keep in ``derived`` is computed from the buffers, so it has
        # to be among what is captured.
        self._batch = PagedBatch(
            parts=parts_with_room(size, keys, layers.pool.block_size),
            first_row=0,
            num_rows=size,
            max_rows=1,
            max_keys=keys,
            q_starts=static.q_starts[: size + 1],
            block_starts=static.block_starts[: size + 1],
            blocks=static.blocks,
            firsts=static.firsts,
            keys=static.keys,
        )

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """``q [1, H, P, D]``, ``k [1, G, P, D]``, ``v [1, G, P, Dv]`` -> ``[1, P, H, Dv]``."""
        spec, kernel = self._layers.specs[layer], self._layers.kernel
        pages = self._layers.pool.layer(layer)
        q_PHD, k_PGD, v_PGD = (x[0].transpose(0, 1) for x in (q, k, v))
        kernel.write(pages, k_PGD, v_PGD, *self._at)
        part = kernel.paged_attention(q_PHD, self._positions, pages, self._batch, spec)
        return finish(part, spec, q.dtype).unsqueeze(0)
