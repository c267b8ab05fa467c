"""Ranks that call ``attention`` with a kernel by name and find different ones."""

from __future__ import annotations

import pytest
import torch

from ds_cp import attention as package
from ds_cp.attention import LayerSpec, Span, attention
from ds_cp.attention.kernels import choose
from ds_cp.comm.wire import World
from ds_cp.native import Library, load
from tests.helpers.ranks import run_ranks, world_group

pytestmark = pytest.mark.cpu_only("the choice between CPU kernels")


def lacking(world: World) -> list[str]:
    """Rank 1 has no native library. What each mode says, on each rank."""
    if world.rank == 1:
        del_cpu = {"sdpa": choose._torch}
        choose.makers = lambda device: del_cpu  # type: ignore[assignment]
    group, spec = world_group(world), LayerSpec(4, 2, 16, 0.25)
    span = Span((((0, 8),), ((8, 8),)), (((0, 8),), ((8, 8),)))
    q, k, v = (torch.randn(8, heads, 16) for heads in (4, 2, 2))
    said = []
    for mode in ("ring", "tree"):
        try:
            attention(q, k, v, span, group, spec, mode=mode)
        except ValueError as err:
            said.append(str(err))
    alike = attention(q, k, v, span, group, spec, kernel="sdpa")
    assert alike.shape == q.shape and world.ledger[package.SCHEME_KERNEL].bytes == 3 * 32
    return said


@pytest.mark.skipif(
    not isinstance(load(), Library), reason=f"{load()}; then run these tests again"
)
def test_ranks_with_different_kernels_say_so_and_none_mixes_pages() -> None:
    said = run_ranks(lacking, 2)
    assert said == [["ranks chose kernels cpu and sdpa: pass kernel=..."] * 2] * 2
