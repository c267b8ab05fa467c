"""ds_cp's own attention over ranks, called as the engine calls it: a mode is made once a step, then
called per layer over pages. Prefill writes its keys and values into the pages within the time."""

from __future__ import annotations

import os
from typing import Any

import child
import torch

from ds_cp.attention import (
    LayerSpec,
    Shards,
    TreeRoutes,
    choose_kernel,
    empty_partial,
    finish,
    make_mode,
)
from ds_cp.attention.batch import IndexUpload, blocks_of_runs
from ds_cp.attention.pages import PageShape, empty_pages
from ds_cp.config import Config
from ds_cp.layout import Runs, positions
from ds_cp.startup.join import join_job
from ds_cp.topology import detect

BLOCK = 64  # tokens of a block


class Call:
    """One layer's attention of one request: ``q_runs[r]``, ``k_runs[r]`` are rank r's queries and
    keys. ``attend`` is what is timed; with ``write`` it stores this rank's keys first."""

    def __init__(
        self,
        group: Any,
        case: child.Case,
        mode: str,
        q_runs: list[Runs],
        k_runs: list[Runs],
        write: bool,
    ) -> None:
        me, dim, tokens = group.rank, case["dim"], case["tokens"]
        dtype, cpu = getattr(torch, case["dtype"]), torch.device("cpu")
        self.spec = LayerSpec(case["heads"], case["kv_heads"], dim, dim**-0.5)
        self.kernel = choose_kernel("auto", cpu, dtype, [self.spec], BLOCK).kernel
        blocks = tuple(blocks_of_runs(runs, BLOCK) for runs in k_runs)
        upload = IndexUpload()
        item = Shards(tuple(q_runs), blocks)
        self.mode = make_mode(mode, "kv", [item], group, 0, [None], upload, TreeRoutes())
        upload.send(cpu)
        torch.manual_seed(0)
        heads = (case["heads"], case["kv_heads"], case["kv_heads"])
        self.whole = [torch.randn(tokens, n, dim).to(dtype) for n in heads]
        self.at = torch.tensor(positions(q_runs[me]), dtype=torch.int64)
        mine = torch.tensor(positions(k_runs[me]), dtype=torch.int64)
        self.q = self.whole[0][self.at]
        self.k, self.v = (x[mine].clone() for x in self.whole[1:])
        shape = PageShape.of(self.spec, BLOCK, dtype, self.kernel.packed)
        slots, first = [], 0  # each run begins a block of its own
        for _, length in k_runs[me]:
            slots += [first * BLOCK + i for i in range(length)]
            first += -(-length // BLOCK)
        at = torch.tensor(slots, dtype=torch.int64)
        self.pages = empty_pages(shape, max(1, first), cpu)
        self.blocks, self.places = at // BLOCK, at % BLOCK
        self.write = write
        if len(slots):
            self._store()

    def _store(self) -> None:
        self.kernel.write(self.pages, self.k, self.v, self.blocks, self.places)

    @torch.inference_mode()
    def attend(self) -> torch.Tensor:
        if self.write and len(self.blocks):
            self._store()
        into = empty_partial(len(self.q), self.spec.num_q_heads, self.spec.v_dim, self.q.device)
        self.mode(self.q, self.at, self.pages, self.kernel, self.spec, into)
        return finish(into, self.spec, self.q.dtype)

    def error(self) -> float:
        """Largest difference to plain attention in fp64 over everything. All ranks call it."""
        got = self.attend().double()
        if not len(self.at):
            return 0.0
        q, k, v = (x.double().transpose(0, 1) for x in self.whole)
        unseen = torch.arange(k.shape[1])[None] > self.at[:, None]
        mask = torch.zeros(unseen.shape, dtype=torch.float64).masked_fill(unseen, float("-inf"))
        want = torch.nn.functional.scaled_dot_product_attention(
            q[:, self.at][None], k[None], v[None], attn_mask=mask, enable_gqa=True
        )[0].transpose(0, 1)
        return float((got - want).abs().max())


def prefill(group: Any, case: child.Case) -> Call:
    """A whole prompt: over all ranks in zigzag order, or with ``alone`` on rank 0."""
    tokens = case["tokens"]
    if case.get("alone"):
        runs = [((0, tokens),), *[()] * (group.size - 1)]
        return Call(group, case, "local", runs, runs, True)  # type: ignore[arg-type]
    runs = [
        tuple((a, b - a) for a, b in child.share_of_zigzag(r, group.size, tokens))
        for r in range(group.size)
    ]
    return Call(group, case, "ring", runs, runs, True)  # type: ignore[arg-type]


def decode(group: Any, case: child.Case) -> Call:
    """One query, of rank 0, over keys that all ranks hold; with ``alone`` each rank attends its own
    keys with a query of its own, and nothing is sent."""
    tokens, part = case["tokens"], case["tokens"] // group.size
    k_runs = [((r * part, part),) for r in range(group.size)]
    one = ((tokens - 1, 1),)
    if case.get("alone"):
        return Call(group, case, "local", [one] * group.size, k_runs, False)  # type: ignore[arg-type]
    q_runs = [one, *[()] * (group.size - 1)]
    return Call(group, case, "tree", q_runs, k_runs, False)  # type: ignore[arg-type]


class Exchange:
    """Every rank sends to the next one and receives from the one before: ``bytes`` each."""

    def __init__(self, group: Any, case: child.Case) -> None:
        self.group = group
        self.out = torch.zeros(case["bytes"], dtype=torch.uint8)
        self.back = torch.empty_like(self.out)
        self.to, self.of = (group.rank + 1) % group.size, (group.rank - 1) % group.size

    def attend(self) -> None:
        self.group.exchange([(self.to, self.out)], [(self.of, self.back)], "benchmark").wait()


def start(options: child.Case) -> Any:
    config = Config(model="none", threads_per_rank=options["threads"])
    world, _ = join_job(detect(os.environ), config)
    group = world.group("cp", [list(range(world.size))])
    import torch.distributed as dist

    def run(case: child.Case) -> child.Case:
        kinds = {"prefill": prefill, "decode": decode, "exchange": Exchange}
        call = kinds[case["kind"]](group, case)
        whole = isinstance(call, Call) and (not case.get("alone") or group.size == 1)
        told = {"max_error": call.error()} if whole and case.get("check") else {}
        call.attend()
        seconds = child.timed(case["repeats"], call.attend, dist.barrier)
        if case.get("alone") and case["kind"] == "prefill" and group.rank:
            seconds = [0.0] * len(seconds)  # nothing to do here
        name = call.kernel.name if isinstance(call, Call) else ""
        return {"seconds": seconds, "kernel": name, **told}

    return run


if __name__ == "__main__":
    child.serve(start)
