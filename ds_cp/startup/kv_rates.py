"""What handling KV costs beside computing it: the allocator, prefix keys, copies of blocks."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from ds_cp.attention import LayerSpec
from ds_cp.comm.device import synchronize
from ds_cp.comm.failure import failing
from ds_cp.comm.wire import World
from ds_cp.config import Config
from ds_cp.errors import ConfigError
from ds_cp.kv.blocks import BlockAllocator
from ds_cp.kv.host_store import open_store
from ds_cp.kv.pool import KVPool
from ds_cp.kv.prefix import PrefixKeys
from ds_cp.startup.join import join_job
from ds_cp.startup.kv_budget import free_bytes
from ds_cp.topology.job import Job

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SCHEME = "bench_kv"  # name in the ledger
GROWS = 32  # blocks of each sequence that grows
MOVED = 64  # blocks of one copy, at most


@dataclass(frozen=True)
class KVShape:
    """``blocks`` of a rank's pool for the allocator, each of ``block_size`` tokens of ``layers``
    layers with ``kv_heads`` heads of ``head_dim``."""

    blocks: int
    block_size: int
    layers: int
    kv_heads: int
    head_dim: int


Rates = dict[str, tuple[str, list[float]]]  # by name: unit, a value a round


def measure_kv(
    job: Job, config: Config, shape: KVShape, warmup: int, repeats: int
) -> tuple[Rates, Mapping[str, int | str]] | None:
    """Join the job and measure: on rank 0 the figures and facts about them, None on the others.
    Collective; ``CommError`` when a rank does not come, ``ConfigError`` when blocks of this shape
    do not fit in memory."""
    world, threads = join_job(job, config)
    try:
        with failing(world):
            found: Rates = {}
            moves = _Moves(world, shape, DTYPES[config.dtype])
            for number in range(warmup + repeats):
                values = _allocator(shape, number) | _prefixes(shape, number) | moves.run()
                if number >= warmup:
                    for name, (unit, value) in values.items():
                        found.setdefault(name, (unit, []))[1].append(value)
            facts: dict[str, int | str] = {
                "ranks": world.size, "device": world.device.type, "threads": threads,
                "bytes_of_a_block": moves.nbytes, "blocks_of_a_copy": moves.count,
            }  # fmt: skip
            return (found, facts) if world.rank == 0 else None
    finally:
        world.leave()


def _allocator(shape: KVShape, seed: int) -> dict[str, tuple[str, float]]:
    """Blocks a second: of sequences that grow by one block at a time side by side, freed in another
    order than they came; and of whole prompts."""
    draw = random.Random(seed)
    allocator = BlockAllocator([shape.blocks], shape.block_size)
    sequences: list[list[int]] = [[] for _ in range(max(1, shape.blocks // GROWS))]
    order = [i for i in range(len(sequences)) for _ in range(min(GROWS, shape.blocks))]
    draw.shuffle(order)

    def grow() -> int:
        for i in order:
            blocks = sequences[i]
            blocks += allocator.allocate(0, 1, blocks[-1] if blocks else None)
        return len(order)

    def free() -> int:
        draw.shuffle(sequences)
        for blocks in sequences:
            allocator.release([(0, block) for block in blocks])
        return len(order)

    def prompts() -> int:
        held = [allocator.allocate(0, GROWS) for _ in range(shape.blocks // GROWS)]
        for blocks in held:
            allocator.release([(0, block) for block in blocks])
        return 2 * GROWS * len(held)

    found = {"allocate, one block at a time": ("blocks/s", _rate(grow)),
             "free, sequence by sequence": ("blocks/s", _rate(free))}  # fmt: skip
    if shape.blocks >= GROWS:
        found["allocate and free, whole prompts"] = "blocks/s", _rate(prompts)
    return found


def _prefixes(shape: KVShape, seed: int) -> dict[str, tuple[str, float]]:
    """Tokens a second that are named, and keys a second that are found, half of them known."""
    draw = random.Random(seed)
    tokens = [draw.randrange(1 << 17) for _ in range(shape.blocks * shape.block_size)]
    keys: list[bytes] = []

    def name() -> int:
        keys.extend(PrefixKeys(shape.block_size, "").upto(tokens, shape.blocks))
        return len(tokens)

    found = {"name a prefix": ("tokens/s", _rate(name))}
    allocator = BlockAllocator([shape.blocks], shape.block_size)
    for key, block in zip(keys[::2], allocator.allocate(0, len(keys[::2])), strict=True):
        allocator.put(key, (0, block))

    def find() -> int:
        return len([allocator.find(key) for key in keys])

    found["find a prefix"] = "blocks/s", _rate(find)
    return found


def _rate(work: Callable[[], int]) -> float:
    """What ``work`` did a second, by its own count."""
    began = time.perf_counter()
    done = work()
    return done / max(time.perf_counter() - began, 1e-9)


class _Moves:
    """Copies of blocks within the pool, to host memory and back, and from rank 0 to the next rank
    and back."""

    def __init__(self, world: World, shape: KVShape, dtype: torch.dtype) -> None:
        spec = LayerSpec(shape.kv_heads, shape.kv_heads, shape.head_dim, shape.head_dim**-0.5)
        self.count = min(MOVED, shape.blocks)
        tokens = shape.block_size * shape.layers * 2 * shape.kv_heads * shape.head_dim
        need, have = 5 * self.count * tokens * dtype.itemsize, free_bytes(world)[0]
        if need > have:
            raise ConfigError(
                f"{2 * self.count} blocks and their copies take {need} bytes, {have} are free; "
                "lower --layers, --kv-heads, --head-dim or --block-size"
            )
        layers = [spec] * shape.layers
        self._world = world
        self._pool = KVPool(layers, 2 * self.count, shape.block_size, dtype, world.device)
        self.nbytes = self._pool.block_elements * dtype.itemsize
        self._store = open_store(self._pool, self.count, None)

    def run(self) -> dict[str, tuple[str, float]]:
        """GB a second: of the copies, of those to host memory and back, and of each way between
        ranks."""
        here, there = list(range(self.count)), list(range(self.count, 2 * self.count))
        found = {"copy within a rank": ("GB/s", self._timed(lambda: self._copy(here, there)))}
        found["copy to host memory"] = "GB/s", self._timed(lambda: self._save(here))
        found["copy back from host memory"] = "GB/s", self._timed(lambda: self._load(here, there))
        if self._world.size > 1:
            found["move to the next rank"] = "GB/s", 2 * self._timed(lambda: self._move(here))
        return found

    def _timed(self, work: Callable[[], None]) -> float:
        self._world.everybody.barrier()
        self._world.wait_for_device()
        began = time.perf_counter()
        work()
        self._world.wait_for_device()
        return self.count * self.nbytes / max(time.perf_counter() - began, 1e-9) / 1e9

    def _copy(self, sources: list[int], targets: list[int]) -> None:
        self._pool.put_blocks(targets, self._pool.get_blocks(sources))

    def _save(self, blocks: list[int]) -> None:
        self._store.save(blocks, blocks)
        synchronize(self._world.device)  # it goes on beside what the device computes

    def _load(self, slots: list[int], blocks: list[int]) -> None:
        self._store.load(slots, blocks)
        synchronize(self._world.device)

    def _move(self, blocks: list[int]) -> None:
        """There and back, as the engine moves blocks: gathered, sent, and written to the pool."""
        group = self._world.everybody
        if group.rank > 1:
            return
        other = 1 - group.rank
        for sender in (0, 1):
            if group.rank == sender:
                content = self._pool.get_blocks(blocks)
                group.exchange([(other, content)], [], SCHEME).wait()
            else:
                buffer = torch.empty_like(self._pool.get_blocks(blocks))
                group.exchange([], [(other, buffer)], SCHEME).wait()
                self._pool.put_blocks(blocks, buffer)
