"""The modes as a step calls them: many requests at once over blocks, layers with several windows, V
of other dims than K, one running partial; against fp64 over the whole sequences."""

from __future__ import annotations

import pytest
import torch

from ds_cp.attention import TreeRoutes
from ds_cp.attention.kernels import choose_kernel
from ds_cp.attention.kernels.reference import ReferenceKernel
from ds_cp.attention.spec import LayerSpec
from ds_cp.attention.state import Partial
from ds_cp.comm.wire import World
from ds_cp.layout import assign
from tests.helpers.steps import Request, Step, decode, prompt
from tests.helpers.ranks import run_ranks, world_group

MODES = [("ring", "kv"), ("ring", "q"), ("tree", "kv")]
WINDOWS = (None, 1, 3, 9, 30, 1000)
LIMIT = 2e-6


def requests_of(ranks: int, size: int) -> list[Request]:
    """Prompts, later chunks, decodes: spread evenly, unevenly, on some ranks, on one."""
    last = ranks - 1
    away = assign("zigzag", 0, [5 + r for r in range(ranks)], 1)  # owners that are not the homes
    tokens = sum(5 + r for r in range(ranks))
    return [
        prompt([2] * ranks, size),
        decode(3 * size + 1, [r % ranks for r in range(4)], owner=last, ranks=ranks),
        prompt([1 + r % 2 for r in range(ranks)], size, past=2),
        decode(2 * size, [last, 0], owner=0, ranks=ranks),
        decode(size + 2, [0, 0], owner=0, ranks=ranks, new=3),
        decode(size, [0], owner=last, ranks=ranks),
        Request(tokens, tuple(i % ranks for i in range(-(-tokens // size))), away),
        prompt([3] + [0] * last, size, layout="contiguous"),
    ]


def specs() -> list[LayerSpec]:
    return [
        LayerSpec(6, 2, 16, 0.25, window, softcap, v_head_dim=v_dim)
        for window, softcap, v_dim in [
            *((window, None, None) for window in WINDOWS),
            (None, 2.0, 8),
            (9, None, 24),
        ]
    ]


def check(world: World, size: int, kernel: str) -> list[str]:
    group, bad = world_group(world), []
    requests = requests_of(group.size, size)
    chosen = choose_kernel(kernel, group.device, torch.float32, specs(), size).kernel
    for mode, ring_pass in MODES:
        step = Step(group, requests, size, mode, ring_pass, WINDOWS, TreeRoutes())
        for spec in specs():
            found = step.run(spec, chosen)
            error = step.error(found, spec)
            if not error <= LIMIT:
                bad.append(f"rank {group.rank} {mode}/{ring_pass} {spec.window}: {error:.2e}")
            again = step.run(spec, chosen)  # buffers are used again: the same bits come out
            if not (torch.equal(found.out, again.out) and torch.equal(found.lse, again.lse)):
                bad.append(f"rank {group.rank} {mode}/{ring_pass} {spec.window}: another result")
    return bad


class Stacking(ReferenceKernel):
    """Folds stacked partials at once, as a GPU's kernel does; ``launches`` counts."""

    stacks = True

    def __init__(self) -> None:
        self.launches = 0

    def merge_rows(self, into: Partial, part: Partial, rows: torch.Tensor | None) -> None:
        self.launches += 1
        out, lse = (x if part.out.dim() == 4 else x[None] for x in (part.out, part.lse))
        for one, its_lse in zip(out, lse, strict=True):
            super().merge_rows(into, Partial(one, its_lse), rows)


def stacked(world: World, mode: str) -> tuple[bool, int, int]:
    """Whether stacked answers give the same bits; launches with them and without."""
    group, size = world_group(world), 4
    ranks, everywhere = group.size, [r % group.size for r in range(2 * group.size)]
    requests = [
        *(decode(2 * size * ranks, everywhere, owner=r, ranks=ranks) for r in range(ranks)),
        decode(2 * size, [0, ranks - 1], owner=0, ranks=ranks),
        prompt([1] * ranks, size, past=1),
    ]
    spec, found, launches = LayerSpec(6, 2, 16, 0.25), [], []
    for stacks in (True, False):
        kernel = Stacking()
        kernel.stacks = stacks
        step = Step(group, requests, size, mode, "q", (None,), TreeRoutes())
        found.append(step.run(spec, kernel))
        launches.append(kernel.launches)
    ours, theirs = found
    same = torch.equal(ours.out, theirs.out) and torch.equal(ours.lse, theirs.lse)
    return same and step.error(ours, spec) <= LIMIT, *launches


@pytest.mark.parametrize(("mode", "hosts"), [("tree", "aaaa"), ("tree", "aabba"), ("ring", "aaa")])
def test_answers_of_the_same_rows_are_merged_at_once(mode: str, hosts: str) -> None:
    results = run_ranks(stacked, len(hosts), mode, hosts=list(hosts))
    assert all(same and few <= many for same, few, many in results)
    assert sum(few for _, few, _ in results) < sum(many for _, _, many in results)


@pytest.mark.parametrize("hosts", ["a", "aa", "aaaa", "aabb", "abcab"])
def test_a_steps_requests_in_every_mode(hosts: str) -> None:
    results = run_ranks(check, len(hosts), 4, "reference", hosts=list(hosts))
    assert not sum(results, [])
