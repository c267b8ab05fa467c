"""A step of several layers of attention, and works that are timed in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

from benchmarks.wire import slowest
from ds_cp.attention import LayerSpec, PagedKernel, Shards, TreeRoutes, make_mode
from ds_cp.attention.batch import IndexUpload
from ds_cp.attention.state import empty_partial
from ds_cp.comm.wire import Group, World
from ds_cp.kv.pool import KVPool
from ds_cp.layout import positions

BLOCK = 64
Work = Callable[[], object]


def step(
    group: Group, kernel: PagedKernel, spec: LayerSpec, mode: str, items: Sequence[Shards],
    pool: KVPool, layers: int,
) -> Work:  # fmt: skip
    """The attention of a whole step, layer by layer."""
    upload, me = IndexUpload(), group.rank
    one = make_mode(mode, "kv", items, group, 0, [None], upload, TreeRoutes())
    upload.send(group.device)
    at = torch.tensor([p for item in items for p in positions(item.q_runs[me])], dtype=torch.int64)
    q = torch.randn(layers, spec.num_q_heads, len(at), spec.head_dim).to(pool.dtype).transpose(1, 2)
    each = list(zip(q.unbind(), map(pool.layer, range(layers)), strict=True))

    def once() -> None:
        for q_THD, pages in each:
            into = empty_partial(len(at), spec.num_q_heads, spec.v_dim)
            one(q_THD, at, pages, kernel, spec, into)

    return once


def filled_pool(
    kernel: PagedKernel, spec: LayerSpec, dtype: torch.dtype, blocks: int, layers: int
) -> KVPool:
    """Random pages of several layers, as a worker keeps them."""
    specs, device = [spec] * layers, torch.device("cpu")
    pool = KVPool(specs, blocks, BLOCK, dtype, device, kernel.packed)
    for i in range(layers):
        pool.layer(i).data.normal_()
    return pool


def in_steps(
    world: World, works: dict[str, Work], rounds: int, layers: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds of a layer of each: the least of the rounds and their median, of each round those of
    the slowest rank."""
    seconds = rounds_in_turns(world, works, rounds)
    each = {name: [x / layers for x in slowest(world, all_)] for name, all_ in seconds.items()}
    least = {name: min(values) for name, values in each.items()}
    return least, {name: statistics.median(values) for name, values in each.items()}


def in_turns(world: World, works: dict[str, Work], rounds: int) -> dict[str, float]:
    """The least seconds of each, on the slowest rank."""
    seconds = rounds_in_turns(world, works, rounds)
    least = slowest(world, [min(values) for values in seconds.values()])
    return dict(zip(works, least, strict=True))


def rounds_in_turns(world: World, works: dict[str, Work], rounds: int) -> dict[str, list[float]]:
    """This rank's seconds of every round but a first one."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(rounds + 1):
        for name, work in works.items():
            world.everybody.barrier()
            began = time.perf_counter()
            work()
            if turn:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def repeated(work: Work, times: int) -> Work:
    def all_of_them() -> None:
        for _ in range(times):
            work()

    return all_of_them
