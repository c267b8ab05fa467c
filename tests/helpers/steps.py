"""Requests in blocks over ranks, and a mode called as a step does: index vectors in one upload,
several requests at once, one running partial.

A request is what the scheduler makes of it: block i, with its rank, holds the positions from i *
block_size on. Block numbers are shuffled, so that one that is taken for a place is wrong.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ds_cp.attention import PagedKernel, Shards, TreeRoutes, make_mode
from ds_cp.attention.batch import IndexUpload
from ds_cp.attention.pages import Pages, PageShape, empty_pages
from ds_cp.attention.spec import LayerSpec
from ds_cp.attention.state import Partial, empty_partial
from ds_cp.comm.wire import Group
from ds_cp.layout import Block, Blocks, Runs, contiguous, positions, zigzag
from tests.helpers.oracle import full_attention


@dataclass(frozen=True)
class Request:
    """``homes``: the rank of each block; ``q_runs``: the new tokens of each rank; ``length``: keys,
    new ones included."""

    length: int
    homes: tuple[int, ...]
    q_runs: tuple[Runs, ...]
    seed: int | None = None  # of its numbers; its place among the requests


def prompt(counts: Sequence[int], size: int, past: int = 0, layout: str = "zigzag") -> Request:
    """A chunk of a prompt whose blocks are dealt out by layout, ``counts[r]`` of them to rank r,
    each computed where it is stored; ``past`` blocks of each rank are there already."""
    lay = zigzag if layout == "zigzag" else contiguous
    ranks = len(counts)
    earlier = [r for _ in range(past) for r in range(ranks)]
    homes = [0] * sum(counts)
    for rank, runs in enumerate(lay(0, counts)):
        for index in positions(runs):
            homes[index] = rank
    start = len(earlier)
    q_runs = tuple(
        tuple(((start + at) * size, n * size) for at, n in runs) for runs in lay(0, counts)
    )
    return Request((start + len(homes)) * size, (*earlier, *homes), q_runs)


def decode(length: int, homes: Sequence[int], owner: int, ranks: int, new: int = 1) -> Request:
    """The last ``new`` tokens of ``length`` on ``owner``; block i is on rank ``homes[i]``."""
    q_runs: list[Runs] = [()] * ranks
    q_runs[owner] = ((length - new, new),)
    return Request(length, tuple(homes), tuple(q_runs))


def shards_of(requests: Sequence[Request], ranks: int, size: int) -> list[Shards]:
    """What every rank knows of the requests."""
    free = []
    for rank in range(ranks):
        count = sum(home == rank for request in requests for home in request.homes)
        free.append(random.Random(rank).sample(range(count + 3), count))
    found = []
    for request in requests:
        blocks = tuple(Blocks() for _ in range(ranks))
        for index, home in enumerate(request.homes):
            keys = min(size, request.length - index * size)
            blocks[home].append(free[home].pop(), index * size, keys)
        found.append(Shards(request.q_runs, blocks))
    return found


def sequence(index: int, request: Request, spec: LayerSpec) -> tuple[torch.Tensor, ...]:
    """q, k, v of the whole sequence of request ``index``, in fp32."""
    length = request.length
    seed = index if request.seed is None else request.seed
    gen = torch.Generator().manual_seed(100 + seed)
    shapes = (
        (length, spec.num_q_heads, spec.head_dim),
        (length, spec.num_kv_heads, spec.head_dim),
        (length, spec.num_kv_heads, spec.v_dim),
    )
    return tuple(torch.randn(shape, generator=gen) for shape in shapes)


def filled(
    items: Sequence[Shards], requests: Sequence[Request], rank: int, shape: PageShape,
    spec: LayerSpec, kernel: PagedKernel, device: torch.device,
) -> Pages:  # fmt: skip
    """The pages of ``rank`` with the keys and values of its blocks; slots without a key are 0."""
    numbers = [n for item in items for n in item.blocks[rank].numbers]
    pages = empty_pages(shape, max(numbers, default=0) + 2, device)
    for index, (item, request) in enumerate(zip(items, requests, strict=True)):
        _, k, v = (x.to(device, shape.dtype) for x in sequence(index, request, spec))
        for number, first, keys in item.blocks[rank]:
            at = torch.arange(keys, device=device)
            kernel.write(
                pages, k[first : first + keys], v[first : first + keys],
                torch.full_like(at, number), at,
            )  # fmt: skip
    return pages


@dataclass
class Step:
    """One step on one rank: ``requests`` in one mode, for layers with the given ``windows``. Rows
    of others come before (``LEAD``) and after those of the mode."""

    LEAD = 3

    group: Group
    requests: Sequence[Request]
    size: int
    mode: str
    ring_pass: str
    windows: Sequence[int | None]
    routes: TreeRoutes

    def __post_init__(self) -> None:
        self.items = shards_of(self.requests, self.group.size, self.size)
        upload = IndexUpload()
        self.one: Any = make_mode(
            self.mode, self.ring_pass, self.items, self.group, self.LEAD, self.windows, upload,
            self.routes,
        )  # fmt: skip
        upload.send(self.group.device)
        self.places = [p for r in self.requests for p in positions(r.q_runs[self.group.rank])]

    def run(
        self, spec: LayerSpec, kernel: PagedKernel, dtype: torch.dtype = torch.float32,
        pages: Pages | None = None,
    ) -> Partial:  # fmt: skip
        """One layer: what is in the rows of the mode, which held nothing before. Other rows must
        stay as they were."""
        me, lead, device = self.group.rank, self.LEAD, self.group.device
        if pages is None:
            shape = PageShape.of(spec, self.size, dtype, kernel.packed)
            pages = filled(self.items, self.requests, me, shape, spec, kernel, device)
        rows = [
            sequence(i, r, spec)[0][positions(r.q_runs[me])] for i, r in enumerate(self.requests)
        ]
        others = torch.full((lead, spec.num_q_heads, spec.head_dim), torch.nan)
        q = torch.cat([others, *rows, others]).to(device, dtype)
        q = q.transpose(0, 1).contiguous().transpose(0, 1)  # as the model's layers give it
        at = torch.tensor([0] * lead + self.places + [0] * lead, device=device)
        into = empty_partial(len(q), spec.num_q_heads, spec.v_dim, device)
        for outer in (slice(0, lead), slice(len(q) - lead, len(q))):
            into.out[outer], into.lse[outer] = 7.0, 7.0
        self.one(q, at, pages, kernel, spec, into)
        for outer in (slice(0, lead), slice(len(q) - lead, len(q))):
            assert bool((into.out[outer] == 7.0).all()) and bool((into.lse[outer] == 7.0).all())
        mine = slice(lead, len(q) - lead)
        return Partial(into.out[mine], into.lse[mine])

    def error(self, found: Partial, spec: LayerSpec, dtype: torch.dtype = torch.float32) -> float:
        """Largest difference to fp64 over the whole sequences, relative to the largest value."""
        begin, worst = 0, 0.0
        for index, request in enumerate(self.requests):
            places = torch.tensor(positions(request.q_runs[self.group.rank]), dtype=torch.int64)
            q, k, v = (x.to(dtype) for x in sequence(index, request, spec))
            want, lse = full_attention(
                q[places], k, v, places, torch.arange(request.length),
                scale=spec.scale, window=spec.window, softcap=spec.softcap,
            )  # fmt: skip
            rows = slice(begin, begin + len(places))
            begin += len(places)
            if len(places):
                out = (found.out[rows].cpu().double() - want).abs().max() / want.abs().max()
                both = (
                    found.lse[rows].cpu().double() - lse
                ).abs().max() / lse.abs().max().clamp_min(1)
                worst = max(worst, float(out), float(both))
        assert begin == len(found.out)
        return worst


def expected_blocks(request: Request, size: int, rank: int) -> list[Block]:
    """Which blocks of a request ``rank`` holds, numbered by their place in the sequence."""
    return [
        Block(i, i * size, min(size, request.length - i * size))
        for i, home in enumerate(request.homes)
        if home == rank
    ]
