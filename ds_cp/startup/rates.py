"""What this machine achieves, measured by all ranks at once: the numbers of a device file.

The operators are those of a step: linear layers as start-up would choose them, the attention kernel
that it would choose, a decode step of a decoder that has next to no work, exchanges of
``ds_cp.comm``. The fastest of a few trials counts.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional

from ds_cp.attention import LayerSpec, LocalAttention, PagedKernel, Shards, choose_kernel
from ds_cp.attention.batch import IndexUpload
from ds_cp.attention.pages import PageShape, empty_pages
from ds_cp.attention.state import empty_partial
from ds_cp.comm.device import synchronize
from ds_cp.comm.failure import failing
from ds_cp.comm.links import LinkSpeed, measure_links
from ds_cp.comm.wire import Group, World
from ds_cp.kv.host_store import open_store
from ds_cp.kv.pool import KVPool
from ds_cp.layout import Block, Blocks
from ds_cp.model.linear import packing_ops, torch_uses_amx
from ds_cp.model.tiny import tiny_decoder
from ds_cp.model.wiring import CONTEXT, probe_layers
from ds_cp.plan import Begin, Chunk, Decodes, Sampling, StepPlan
from ds_cp.startup.agreement import local_phase
from ds_cp.startup.host_budget import host_gb_per_s
from ds_cp.startup.kv_budget import free_bytes
from ds_cp.startup.packing import plan_packing
from ds_cp.worker.state import WorkerState
from ds_cp.worker.step_context import Layers, StepContext

TRIALS = 5  # of each, the fastest counts
ROWS = {"cpu": 512, "cuda": 8192}  # tokens that pass a linear layer
WIDTH = {"cpu": 1024, "cuda": 4096}  # its dims
KEYS = {"cpu": 2048, "cuda": 16384}  # tokens of causal attention
READ_KEYS = {"cpu": 1 << 16, "cuda": 1 << 20}  # tokens whose KV one row reads
READ = {"cpu": 32, "cuda": 64}  # matrices [4 WIDTH, WIDTH] that one row passes
SPEC = LayerSpec(8, 2, 128, 128**-0.5)
BLOCK = 64  # tokens
FEW, MANY = 2, 12  # layers of the decoder without work
STEPS = 20  # decode steps of it
HOST_LAYERS, HOST_BLOCKS = 8, 16  # of what goes to host memory and comes back, 32 MiB in bf16

Apply = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Rates:
    """Of one rank, while all compute. ``linear``, ``attention``: operations a second; ``reading``:
    bytes of weights a second, by one row; ``reading_kv``: of KV, by attention of one row;
    ``layer_s``, ``step_s``: seconds of a layer and of a step beside their work; ``memory``: bytes
    that are free for a rank; ``links``: empty on one rank; ``host``: bytes of KV a second between a
    rank and its host memory, 0.0 where it was not measured."""

    linear: float
    attention: float
    reading: float
    reading_kv: float
    layer_s: float
    step_s: float
    memory: int
    links: tuple[LinkSpeed, ...]
    host: float = 0.0


def measure_rates(world: World, dtype: torch.dtype) -> Rates:
    """All of it. Collective; takes some seconds.

    Raises on every rank what one rank ran into: ``ConfigError`` when no kernel runs there.
    """
    with failing(world):
        group = world.group("cp", [tuple(range(world.size))])
        memory, _ = free_bytes(world)
        alone = local_phase(world, lambda: _alone(world, group, dtype))
        linear, attention, reading, reading_kv, few, many, host = alone
        layer = max(0.0, (many - few) / (MANY - FEW))
        links = measure_links(world)
    return Rates(
        linear, attention, reading, reading_kv, layer, max(0.0, few - FEW * layer), memory, links,
        host,
    )  # fmt: skip


def _alone(
    world: World, group: Group, dtype: torch.dtype
) -> tuple[float, float, float, float, float, float, float]:
    """What needs no other rank: operations a second of linear layers and of attention, bytes a
    second of weights and of KV, seconds of a decode step with few and with many layers, and bytes
    of KV a second between the rank and its host memory."""
    kernel = choose_kernel("auto", world.device, dtype, [SPEC], BLOCK).kernel
    with torch.inference_mode():
        linear, reading = _linear(world, dtype), _reading(world, dtype)
        keys, read = KEYS[world.device.type], READ_KEYS[world.device.type]
        causal = _attention_s(world, dtype, kernel, keys, keys)
        attention = 2.0 * keys * (keys + 1) * SPEC.num_q_heads * SPEC.head_dim / causal
        nbytes = 2.0 * read * SPEC.num_kv_heads * SPEC.head_dim * dtype.itemsize
        reading_kv = nbytes / _attention_s(world, dtype, kernel, 1, read)
        few, many = (_decode_s(world, group, dtype, count) for count in (FEW, MANY))
    return linear, attention, reading, reading_kv, few, many, _host(world, dtype)


def _host(world: World, dtype: torch.dtype) -> float:
    """Bytes of KV a second to host memory and back."""
    pool = KVPool([SPEC] * HOST_LAYERS, HOST_BLOCKS, BLOCK, dtype, world.device)
    store = open_store(pool, HOST_BLOCKS, None)
    try:
        return 1e9 * host_gb_per_s(world, pool, store)
    finally:
        store.close()


def _best(world: World, run: Callable[[], object]) -> float:
    """Seconds of the fastest of ``TRIALS``, after one that does not count."""
    best = float("inf")
    for trial in range(TRIALS + 1):
        synchronize(world.device)
        began = time.perf_counter()
        run()
        synchronize(world.device)
        if trial:
            best = min(best, time.perf_counter() - began)
    return best


def _layer(weight: torch.Tensor) -> Apply:
    """A linear layer as the server computes it: packed on a CPU without AMX, else torch's."""
    ops = packing_ops() if weight.device.type == "cpu" else ""
    if isinstance(ops, str) or torch_uses_amx(weight.dtype) or weight.dtype == torch.float16:
        return lambda x: functional.linear(x, weight)
    return ops.pack(weight, None)


def _linear(world: World, dtype: torch.dtype) -> float:
    kind, device = world.device.type, world.device
    rows, width = ROWS[kind], WIDTH[kind]
    x = torch.ones(rows, width, dtype=dtype, device=device)
    layer = _layer(torch.ones(4 * width, width, dtype=dtype, device=device))
    return 2.0 * rows * 4 * width * width / _best(world, lambda: layer(x))


def _reading(world: World, dtype: torch.dtype) -> float:
    kind, device = world.device.type, world.device
    width = WIDTH[kind]
    shape = (4 * width, width)
    layers = [_layer(torch.ones(shape, dtype=dtype, device=device)) for _ in range(READ[kind])]
    x = torch.ones(1, width, dtype=dtype, device=device)

    def row() -> None:
        for layer in layers:
            layer(x)

    return READ[kind] * 4.0 * width * width * dtype.itemsize / _best(world, row)


def _attention_s(
    world: World, dtype: torch.dtype, kernel: PagedKernel, rows: int, keys: int
) -> float:
    """Seconds of the last ``rows`` queries of a sequence over its ``keys`` tokens."""
    device, blocks = world.device, keys // BLOCK
    runs = ((keys - rows, rows),)
    item = Shards((runs,), (Blocks(Block(i, i * BLOCK, BLOCK) for i in range(blocks)),))
    upload = IndexUpload()
    mode = LocalAttention([item], 0, 0, upload)
    upload.send(device)
    pages = empty_pages(PageShape.of(SPEC, BLOCK, dtype, kernel.packed), blocks, device)
    pages.data.fill_(0.5)  # pages that were never written may all be one page of zeros
    heads, dim = SPEC.num_q_heads, SPEC.head_dim
    q = torch.ones(rows, heads, dim, dtype=dtype, device=device)
    at = torch.arange(keys - rows, keys, device=device)

    def run() -> None:
        mode(q, at, pages, kernel, SPEC, empty_partial(rows, heads, dim, device))

    return _best(world, run)


def _decode_s(world: World, group: Group, dtype: torch.dtype, count: int) -> float:
    """Seconds of a decode step of a decoder with ``count`` layers and next to no work."""
    model = tiny_decoder(count, dtype, world.device)
    specs = probe_layers(model)
    kernel = choose_kernel("auto", world.device, dtype, specs, BLOCK, check=False).kernel
    plan_packing("auto", model, world, kept=False)()
    layers = Layers(
        specs, KVPool(specs, 1, BLOCK, dtype, world.device, kernel.packed), kernel, group
    )
    homes = ((group.rank, 0),)
    best = float("inf")
    for _ in range(STEPS):
        state = WorkerState(group.rank, BLOCK)
        begin = Begin(1, (1, 2, 3), 3, (), 0, Sampling(temperature=0.0))
        chunk = Chunk(1, "local", "kv", ((group.rank, ((0, 2),)),), homes, True)
        decode = StepPlan(1, decodes=(Decodes("local", "kv", (1,)),))
        for plan in (StepPlan(0, begins=(begin,), chunks=(chunk,)), decode):
            synchronize(world.device)
            began = time.perf_counter()
            step = StepContext(state.apply(plan), layers)
            model(
                input_ids=step.ids, position_ids=step.positions, use_cache=False, **{CONTEXT: step}
            )
            synchronize(world.device)
        best = min(best, time.perf_counter() - began)
    return best
