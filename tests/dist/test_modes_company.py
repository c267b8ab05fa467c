"""A spanning request's bits do not depend on the requests beside it: bf16, the native kernel, homes
and owners fixed. Every other choice of a mode (who sends what to whom, in which round) follows from
all items of the step, and must not reach the order in which one item's partials are folded."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ds_cp.attention import TreeRoutes
from ds_cp.attention.kernels import choose_kernel
from ds_cp.attention.spec import LayerSpec
from ds_cp.comm.wire import World
from ds_cp.layout import total
from ds_cp.native import Library, load
from tests.helpers.ranks import run_ranks, world_group
from tests.helpers.steps import Request, Step, decode, prompt

LIBRARY = load()
pytestmark = [
    pytest.mark.cpu_only("the native CPU kernel"),
    pytest.mark.skipif(
        not isinstance(LIBRARY, Library) or LIBRARY.isas[0] == "baseline",
        reason=f"needs the native library and AVX2: {LIBRARY}",
    ),
]
SIZE = 16
WINDOWS = (None, 40, 100)
MODES = [("ring", "kv"), ("ring", "q"), ("tree", "kv")]


def requests_of(ranks: int) -> list[Request]:
    """Shorter than the windows, between them, longer; prompts, a later chunk, decodes."""
    last = ranks - 1
    return [
        decode(37, [r % ranks for r in range(3)], owner=last, ranks=ranks),
        prompt([1] * ranks, SIZE),
        prompt([4] * ranks, SIZE),
        decode(93, [last - r % ranks for r in range(6)], owner=0, ranks=ranks, new=5),
        prompt([1] * ranks, SIZE, past=5),
        decode(290, [r % ranks for r in range(19)], owner=0, ranks=ranks),
        decode(9, [0], owner=last, ranks=ranks),
    ]


def check(world: World) -> list[str]:
    group, bad = world_group(world), []
    requests = requests_of(group.size)
    specs = [LayerSpec(6, 2, 32, 0.2, window) for window in WINDOWS]
    kernel = choose_kernel(
        "cpu", torch.device("cpu"), torch.bfloat16, specs, SIZE, check=False
    ).kernel
    orders = [list(range(len(requests))), [5, 0, 6, 2], [3, 1, 0], [4, 6, 1, 3, 0, 5, 2]]
    orders += [[n] for n in range(len(requests))]
    for mode, ring_pass in MODES:
        for spec in specs:
            first: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
            for order in orders:
                some = [replace(requests[n], seed=n) for n in order]
                step = Step(group, some, SIZE, mode, ring_pass, WINDOWS, TreeRoutes())
                found = step.run(spec, kernel, torch.bfloat16)
                counts = [total(requests[n].q_runs[group.rank]) for n in order]
                outs, lses = found.out.split(counts), found.lse.split(counts)
                for n, out, lse in zip(order, outs, lses, strict=True):
                    want = first.setdefault(n, (out, lse))
                    if not (torch.equal(out, want[0]) and torch.equal(lse, want[1])):
                        share = float((out != want[0]).float().mean())
                        bad.append(
                            f"rank {group.rank} {mode}/{ring_pass} window {spec.window}: request "
                            f"{n} of {order}: {share:.0%} of its numbers differ"
                        )
    return bad


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_requests_bits_in_any_company(ranks: int) -> None:
    assert not sum(run_ranks(check, ranks), [])


def test_a_requests_bits_in_any_company_over_hosts() -> None:
    assert not sum(run_ranks(check, 3, hosts=["a", "b", "a"]), [])
