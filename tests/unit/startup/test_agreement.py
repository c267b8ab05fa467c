"""What ranks tell each other at start."""

from __future__ import annotations

from typing import cast

import pytest
import torch

from ds_cp.comm.wire import World
from ds_cp.startup.agreement import MESSAGE, gather_told
from ds_cp.topology.hosts import Topology


@pytest.mark.parametrize("letter", ["a", "\N{CJK UNIFIED IDEOGRAPH-9577}"])
@pytest.mark.parametrize("count", [0, 1, 4, 5])
def test_no_reason_is_lost(letter: str, count: int) -> None:
    """However long the others are."""
    world = World(0, Topology(("here",)), torch.device("cpu"), 60.0, joined=False)
    reasons = {f"kernel{i}": f"{i} is\nnot right: " + letter * 900 for i in range(count)}
    [(names, told)] = gather_told(world, ("reference",), reasons)
    assert names == ("reference",) and list(told) == list(reasons)
    for i, reason in enumerate(cast(dict[str, str], told).values()):
        assert reason.startswith(f"{i} is not right: " + letter * 20)
    assert sum(len(f"{n} {r}".encode()) + 1 for n, r in told.items()) <= MESSAGE


def test_short_reasons_are_whole() -> None:
    world = World(0, Topology(("here",)), torch.device("cpu"), 60.0, joined=False)
    reasons = {"cuda": "x" * 150, "triton": "no compiler"}
    assert gather_told(world, (), reasons) == [((), reasons)]
