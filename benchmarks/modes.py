"""What spanning two ranks or more costs: ring prefill, decode with its exchange, many streams.

    torchrun --nproc-per-node 2 -m benchmarks.modes [--rounds N] [--quick] [--out FILE]

One thread a rank, and both sides of a row in turns in one run. ``prefill``: a layer of a prompt by
ring pass-KV, against the same prompt by the same kernel on one rank, divided by the ranks
(efficiency). ``batch``: prompts of log-uniform lengths as the scheduler deals them out, in one
round, against each of them on one rank as above (efficiency), against a round for each (per
sequence) and against all of them as long as the longest (padded); busiest: the most pairs of a rank
over the mean, together and dealt out one by one. ``decode``: one stream whose keys are spread
evenly, by tree, against its local part alone, which all ranks attend at once; a layer's time in a
step of 8 layers one after the other, each with pages of its own. ``streams``: 64 streams that span,
against 64 that are local, with as many keys in all, in a step of two layers; the time of the bare
exchanges (measured by themselves) is taken off. ``routes``: seconds to plan 64 streams over 128
ranks, with routes that are new and that are kept. A time is the least of its rounds, a median that
of its rounds, each round on its slowest rank; ratios are of the least and of the medians.
"""

from __future__ import annotations

import math
import os
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import command, commit, finish, machine, parser
from benchmarks.steps import BLOCK, Work, filled_pool, in_steps, in_turns, repeated, step
from ds_cp.attention import LayerSpec, PagedKernel, Shards, TreeRoutes, choose_kernel, make_mode
from ds_cp.attention.asking import row_blocks
from ds_cp.attention.batch import IndexUpload
from ds_cp.attention.pages import Pages, PageShape
from ds_cp.attention.state import empty_partial
from ds_cp.comm.tree import Route
from ds_cp.comm.wire import Group, World
from ds_cp.config import load_config
from ds_cp.kv.table import SequenceTable
from ds_cp.layout import Block, Blocks, Runs, positions, split_even, total, zigzag
from ds_cp.sampling_params import SamplingParams
from ds_cp.scheduler.chunking import cut_chunk
from ds_cp.scheduler.draft import Draft
from ds_cp.scheduler.mode_policy import ModePolicy
from ds_cp.scheduler.request import Request
from ds_cp.startup.join import join_job
from ds_cp.startup.resources import socket_environment
from ds_cp.topology.job import detect

STREAMS = 64
PROMPTS, SHORTEST, LONGEST = 16, 64, 4096  # of the batch; tokens
LAYERS, WIDE_LAYERS = 8, 2  # of a step with one stream, and with many, whose pages fit no cache


def stored(counts: Sequence[int], q_runs: tuple[Runs, ...], begin: int = 0) -> Shards:
    """A request with keys at contiguous stretches of whole blocks, ``counts[r]`` blocks on rank r,
    numbered there from ``begin`` on."""
    blocks, at = [], 0
    for count in counts:
        blocks.append(Blocks(Block(begin + i, (at + i) * BLOCK, BLOCK) for i in range(count)))
        at += count
    return Shards(q_runs, tuple(blocks))


def prompt(length: int, ranks: int, begin: int = 0) -> Shards:
    """A prompt dealt out zigzag over ``ranks``, in blocks numbered from ``begin`` on."""
    runs = zigzag(0, [length // BLOCK // ranks] * ranks)
    blocks = tuple(
        Blocks(Block(begin + i, index * BLOCK, BLOCK) for i, index in enumerate(positions(mine)))
        for mine in runs
    )
    return Shards(tuple(tuple((s * BLOCK, n * BLOCK) for s, n in mine) for mine in runs), blocks)


def layer(
    group: Group, kernel: PagedKernel, spec: LayerSpec, dtype: torch.dtype, mode: str,
    items: Sequence[Shards],
) -> Work:  # fmt: skip
    """One layer of a step over random pages."""
    upload, me = IndexUpload(), group.rank
    one = make_mode(mode, "kv", items, group, 0, [None], upload, TreeRoutes())
    upload.send(group.device)
    shape = PageShape.of(spec, BLOCK, dtype, kernel.packed)
    most = max((n + 1 for item in items for n in item.blocks[me].numbers), default=1)
    pages = Pages(torch.randn(most, shape.stride).to(dtype), shape)
    at = torch.tensor([p for item in items for p in positions(item.q_runs[me])])
    q = torch.randn(spec.num_q_heads, len(at), spec.head_dim).to(dtype).transpose(0, 1)
    into = empty_partial(len(at), spec.num_q_heads, spec.v_dim)

    def once() -> None:
        into.out.zero_()
        into.lse.fill_(float("-inf"))
        one(q, at, pages, kernel, spec, into)

    return once


def on_one(item: Shards, me: int) -> Shards:
    """The whole prompt on rank ``me``."""
    length = sum(total(runs) for runs in item.q_runs)
    ranks = len(item.q_runs)
    q_runs: list[Runs] = [()] * ranks
    q_runs[me] = ((0, length),)
    return stored([length // BLOCK if r == me else 0 for r in range(ranks)], tuple(q_runs))


def dealt(lengths: Sequence[int], ranks: int, together: bool) -> tuple[list[Shards], float]:
    """Whole prompts as the scheduler deals them out in one step, or each as if it were alone; and
    the pairs of the busiest rank over the mean."""
    draft = Draft(1, [sum(lengths)] * ranks, None)
    policy = ModePolicy("ring", "kv", None, 1, 16, 4)
    items, used = [], [0] * ranks
    for number, length in enumerate(lengths):
        request = Request(number, str(number), (1,) * length, SamplingParams(), 1, 0)
        request.table, request.workers = SequenceTable(BLOCK), tuple(range(ranks))
        for rank, count in enumerate(split_even(-(-length // BLOCK), ranks)):
            if count:
                request.reserved[rank] = list(range(used[rank], used[rank] + count))
            used[rank] += count
        pairs = draft.pairs if together else ()
        cut = cut_chunk(request, draft.left, "zigzag", policy, None, pairs)
        assert cut is not None
        draft.chunk(cut, 0)
        q_runs: list[Runs] = [()] * ranks
        for rank, runs in cut.chunk.owners:
            q_runs[rank] = runs
        blocks = tuple(request.table.blocks_on(rank) for rank in range(ranks))
        items.append(Shards(tuple(q_runs), blocks))
    return items, max(draft.pairs) * ranks / sum(draft.pairs)


def batch(
    world: World, group: Group, kernel: PagedKernel, spec: LayerSpec, dtype: torch.dtype,
    longest: int, rounds: int,
) -> dict[str, Any]:  # fmt: skip
    """The row of a batch of prompts of log-uniform lengths."""
    rng, ranks = random.Random(1), world.size
    lengths = [round(SHORTEST * (longest / SHORTEST) ** rng.random()) for _ in range(PROMPTS)]
    fused, level = dealt(lengths, ranks, True)
    single, off = dealt(lengths, ranks, False)
    whole = math.ceil(max(lengths) / BLOCK / ranks)
    padded = [prompt(whole * BLOCK * ranks, ranks, i * whole) for i in range(PROMPTS)]
    alone, begin = [], 0
    for length in lengths:
        count = -(-length // BLOCK)
        keys = Blocks(
            Block(begin + i, i * BLOCK, min(BLOCK, length - i * BLOCK)) for i in range(count)
        )
        here = [r == group.rank for r in range(ranks)]
        q_runs: list[Runs] = [((0, length),) if mine else () for mine in here]
        alone.append(Shards(tuple(q_runs), tuple(keys if mine else Blocks() for mine in here)))
        begin += count
    each = [layer(group, kernel, spec, dtype, "ring", [item]) for item in single]
    works: dict[str, Work] = {
        "one rank": layer(group, kernel, spec, dtype, "local", alone),
        "fused": layer(group, kernel, spec, dtype, "ring", fused),
        "per sequence": lambda: [one() for one in each],
        "padded": layer(group, kernel, spec, dtype, "ring", padded),
    }
    found = in_turns(world, works, rounds)
    return {
        "what": f"batch of {PROMPTS}, {SHORTEST} to {longest}",
        **found,
        "efficiency": round(found["one rank"] / ranks / found["fused"], 3),
        "busiest": round(level, 4),
        "busiest one by one": round(off, 4),
        "per sequence / fused": round(found["per sequence"] / found["fused"], 2),
        "padded / fused": round(found["padded"] / found["fused"], 2),
    }


def decode(keys: int, owner: int, ranks: int, begin: int = 0, local: bool = False) -> Shards:
    """A stream whose ``keys`` are spread evenly, or are all on its owner."""
    q_runs: list[Runs] = [()] * ranks
    q_runs[owner] = ((keys - 1, 1),)
    each = keys // BLOCK if local else keys // BLOCK // ranks
    return stored([each * (not local or r == owner) for r in range(ranks)], tuple(q_runs), begin)


def exchanges(group: Group, spec: LayerSpec, dtype: torch.dtype, rows: int) -> Work:
    """The messages of a tree layer alone: ``rows`` queries to each peer, as many partials back."""
    peers = [r for r in range(group.size) if r != group.rank]
    sizes = (
        rows * spec.num_q_heads * spec.head_dim * dtype.itemsize,
        rows * spec.num_q_heads * (spec.v_dim * dtype.itemsize + 4),
    )
    buffers = [[torch.zeros(2, n, dtype=torch.uint8) for _ in peers] for n in sizes]

    def once() -> None:
        for some in buffers:
            sends = [(peer, x[0]) for peer, x in zip(peers, some, strict=True)]
            recvs = [(peer, x[1]) for peer, x in zip(peers, some, strict=True)]
            group.exchange(sends, recvs, "bench").wait()

    return once


def _medians(found: dict[str, float]) -> dict[str, float]:
    return {f"{name} median": value for name, value in found.items()}


def routes() -> dict[str, float]:
    """Seconds for 64 streams over all of 128 ranks on 16 hosts: finding who holds what, making the
    route, and finding one that is kept."""
    ranks = 128
    items = [decode(ranks * BLOCK * 4, i % ranks, ranks) for i in range(STREAMS)]
    hosts = [r // 8 for r in range(ranks)]
    kept = TreeRoutes()
    blocks = row_blocks(items, ranks, None)
    kept.find(blocks, hosts, 0)

    def least(work: Work) -> float:
        found = []
        for _ in range(20):
            began = time.perf_counter()
            work()
            found.append(time.perf_counter() - began)
        return round(min(found), 6)

    return {
        "holders_s": least(lambda: row_blocks(items, ranks, None)),
        "new_s": least(lambda: Route(blocks, hosts, 0)),
        "kept_s": least(lambda: kept.find(row_blocks(items, ranks, None), hosts, 0)),
    }


def measure(
    world: World, rounds: int, lengths: Sequence[int], longest: int
) -> list[dict[str, Any]]:
    """All rows."""
    group = world.group("modes", [list(range(world.size))])
    ranks, rows = world.size, []
    spec, dtype = LayerSpec(32, 8, 128, 128**-0.5), torch.bfloat16
    small = LayerSpec(16, 4, 64, 64**-0.5)
    kernel = choose_kernel("auto", group.device, dtype, [spec, small], BLOCK).kernel
    for length in lengths:
        item = prompt(length, ranks)
        alone = layer(group, kernel, small, dtype, "local", [on_one(item, group.rank)])
        around = layer(group, kernel, small, dtype, "ring", [item])
        found = in_turns(world, {"one rank": alone, "ring": around}, max(3, rounds // 10))
        ratio = found["one rank"] / ranks / found["ring"]
        rows.append({"what": f"prefill {length}", **found, "efficiency": round(ratio, 3)})
    rows.append(batch(world, group, kernel, small, dtype, longest, max(3, rounds // 10)))
    for keys in (4096, 32768):
        half = decode(keys // ranks, group.rank, ranks, local=True)
        pool = filled_pool(kernel, spec, dtype, keys // BLOCK // ranks, LAYERS)
        bare = exchanges(group, spec, dtype, 1)
        works: dict[str, Work] = {
            "local part": step(group, kernel, spec, "local", [half], pool, LAYERS),
            "tree": step(group, kernel, spec, "tree", [decode(keys, 0, ranks)], pool, LAYERS),
            "exchange": repeated(bare, LAYERS),
        }
        least, median = in_steps(world, works, rounds, LAYERS)
        row = {"what": f"decode {keys}", **least, **_medians(median)}
        row["more"] = round(least["tree"] / least["local part"] - 1, 3)
        row["more at the median"] = round(median["tree"] / median["local part"] - 1, 3)
        rows.append(row)
    keys = 2048
    each = keys // BLOCK
    span = [decode(keys, i % ranks, ranks, i * each // ranks) for i in range(STREAMS)]
    home = [decode(keys, i % ranks, ranks, i // ranks * each, True) for i in range(STREAMS)]
    pool = filled_pool(kernel, spec, dtype, STREAMS * each // ranks, WIDE_LAYERS)
    bare = exchanges(group, spec, dtype, STREAMS // ranks)
    works = {
        "local": step(group, kernel, spec, "local", home, pool, WIDE_LAYERS),
        "tree": step(group, kernel, spec, "tree", span, pool, WIDE_LAYERS),
        "exchange": repeated(bare, WIDE_LAYERS),
    }
    least, median = in_steps(world, works, max(3, rounds // 3), WIDE_LAYERS)
    row = {"what": f"{STREAMS} streams", **least, **_medians(median)}
    for name, found in (("beyond the exchange", least), ("beyond, at the median", median)):
        row[name] = round((found["tree"] - found["exchange"]) / found["local"], 3)
    rows.append(row)
    rows.append({"what": "routes", **routes()})
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--rounds", type=int, default=100)
    arguments.add_argument("--lengths", type=int, nargs="*", default=[4096, 8192])
    arguments.add_argument("--quick", action="store_true", help="tiny, to see that it works")
    arguments.add_argument("--out", type=Path)
    args = arguments.parse_args(argv)
    about = machine()
    job = detect(os.environ)
    for variable, value in socket_environment(job).items():
        os.environ.setdefault(variable, value)
    torch.set_num_threads(1)
    config = load_config({"model": "none", "threads_per_rank": 1, "device": "cpu"})
    world, _ = join_job(job, config)
    if args.quick:
        args.rounds, args.lengths = 3, [512]
    rows = measure(world, args.rounds, args.lengths, 512 if args.quick else LONGEST)
    if world.rank == 0:
        print(*world.notes, sep="\n", end="\n" if world.notes else "")
        print("| what | figures (ms) | ratio |\n|---|---|---|")
        for row in rows:
            times = ", ".join(
                f"{k} {v * 1e3:.3f}"
                for k, v in row.items()
                if k.removesuffix(" median") in _TIMES or k.endswith("_s")
            )
            rest = ", ".join(f"{k} {v}" for k, v in row.items() if k in _RATIOS)
            print(f"| {row['what']} | {times} | {rest} |")
        called = command("modes", sys.argv[1:] if argv is None else argv, world.size)
        finish({"command": called, "commit": commit(), **about, "rows": rows}, args.out)
    world.leave()


_TIMES = (
    "one rank", "ring", "fused", "per sequence", "padded", "local part", "local", "tree", "exchange"
)  # fmt: skip
_RATIOS = (
    "efficiency", "busiest", "busiest one by one", "per sequence / fused", "padded / fused", "more",
    "more at the median", "beyond the exchange", "beyond, at the median",
)  # fmt: skip


if __name__ == "__main__":
    main()
