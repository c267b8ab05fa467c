"""Blocks that another request left full of NaN: whoever gets them next computes as on new ones.

A kernel reads whole blocks under a mask, where NaN would count. So a block is set to zero when its
first slot is written and it is not filled whole: by a chunk that ends inside it, on its home, which
may be away from the owner of the tokens, and by a decode that begins it.
"""

from __future__ import annotations

import pytest
import torch

from ds_cp.attention import LayerSpec
from ds_cp.attention.kernels import choose_kernel
from ds_cp.comm.wire import Group, World
from ds_cp.kv.pool import KVPool
from ds_cp.layout import Runs
from ds_cp.plan import Begin, Chunk, Decodes, Sampling, StepPlan
from ds_cp.worker.state import WorkerState
from ds_cp.worker.step_context import Layers, StepContext
from tests.helpers.oracle import full_attention
from tests.helpers.ranks import run_ranks, world_group

SIZE, BLOCKS, TOKENS = 8, 8, 49
SPEC = LayerSpec(4, 2, 16, 0.25)
MODES = [("local", "kv"), ("ring", "kv"), ("ring", "q"), ("tree", "kv")]
# Two chunks, of which the first ends inside block 2, by the rank that computes them; then a decode.
OWNERS: list[list[Runs]] = [
    [((0, 16),), ((16, 5),)],
    [((24, 8),), ((21, 3), (32, 16))],
]
HOMES = [[0, 0, 1], [0, 1, 1], [0]]  # of the blocks that are added, by rank
Numbers = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # q, k, v by position


def numbers() -> Numbers:
    gen = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(TOKENS, heads, 16, generator=gen) for heads in (4, 2, 2))
    return q, k, v


def plans(mode: str, ring_pass: str, away: bool) -> list[StepPlan]:
    """Request 1 fills all blocks and ends; request 2 gets them: two chunks and a decode."""
    local = mode == "local"
    free = [list(range(BLOCKS)) for _ in range(2)]
    ranks = (0,) if local else (0, 1)

    def take(homes: list[int]) -> tuple[tuple[int, int], ...]:
        found = [0 if local else rank ^ away for rank in homes]
        return tuple((rank, free[rank].pop()) for rank in found)

    everything = tuple((rank, block) for rank in ranks for block in range(BLOCKS))
    poison = [((rank * BLOCKS * SIZE, BLOCKS * SIZE),) for rank in ranks]
    count = BLOCKS * SIZE * len(ranks)
    steps = [
        StepPlan(
            1,
            begins=(Begin(1, (5,) * count, count, (), 0, Sampling()),),
            chunks=(Chunk(1, mode, ring_pass, tuple(enumerate(poison)), everything, False),),
        )
    ]
    for n, (owners, homes) in enumerate(zip(OWNERS, HOMES, strict=False)):
        runs = tuple(enumerate(owners))
        if local:
            runs = ((0, tuple(sorted(owners[0] + owners[1]))),)
        begin = Begin(2, (7,) * (TOKENS - 1), TOKENS - 1, (), 0, Sampling())
        chunk = Chunk(2, mode, ring_pass, runs, take(homes), n == 1)
        first = {"ended": (1,), "begins": (begin,)} if n == 0 else {}
        steps.append(StepPlan(2 + n, chunks=(chunk,), **first))
    [home] = take(HOMES[2])
    decode = Decodes("local" if local else "tree", "kv", (2,))
    return [*steps, StepPlan(4, grown=((2, home),), decodes=(decode,))]


def errors(group: Group, name: str, mode: str, ring_pass: str, away: bool) -> list[float]:
    """Of each step of request 2, the largest difference to fp64 on this rank."""
    device, found = group.device, []
    kernel = choose_kernel(name, device, torch.float32, [SPEC], SIZE, False).kernel
    pool = KVPool([SPEC], BLOCKS, SIZE, torch.float32, device, packed=kernel.packed)
    state, layers = WorkerState(group.rank, SIZE), Layers([SPEC], pool, kernel, group)
    values = numbers()
    for plan in plans(mode, ring_pass, away):
        step = StepContext(state.apply(plan), layers)
        places = torch.tensor(step.row_positions, dtype=torch.int64)
        if plan.step == 1:
            q, k, v = (torch.full((len(places), heads, 16), torch.nan) for heads in (4, 2, 2))
        else:
            q, k, v = (x[places] for x in values)
        out = step.attend(0, *(x.to(device).transpose(0, 1)[None] for x in (q, k, v)))[0].cpu()
        if plan.step == 1 or not len(places):
            continue
        want, _ = full_attention(
            q, *values[1:], places, torch.arange(TOKENS), scale=SPEC.scale
        )
        found.append(float((out.double() - want).abs().max()))
    return found


def check(world: World) -> list[str]:
    group, bad = world_group(world), []
    for name in ("auto", "sdpa", "reference"):
        for mode, ring_pass in MODES:
            for away in (False, True) if mode != "local" else (False,):
                found = errors(group, name, mode, ring_pass, away)
                if not all(error <= 5e-6 for error in found):  # NaN is not
                    bad.append(f"rank {group.rank} {name} {mode}/{ring_pass} away {away}: {found}")
    return bad


def test_blocks_left_full_of_nan_are_as_good_as_new() -> None:
    assert not sum(run_ranks(check, 2), [])


def without_scrubbing(world: World) -> list[str]:
    KVPool.open = lambda self, blocks: None  # type: ignore[method-assign]
    return check(world)


def test_without_the_rule_the_nan_would_be_found() -> None:
    """So the test above can fail: in every mode, with blocks at home and away."""
    bad = sum(run_ranks(without_scrubbing, 2), [])
    for mode, ring_pass in MODES[1:]:
        for away in (False, True):
            assert any(f"{mode}/{ring_pass} away {away}" in line for line in bad), (mode, away)
