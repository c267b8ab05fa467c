"""What ``attention()`` refuses: fused operators do not check shapes and would read beyond them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ds_cp.attention import LayerSpec, Span, attention
from ds_cp.comm.wire import Group, World
from ds_cp.topology.hosts import Topology

T, S, H, G, D = 5, 7, 4, 2, 16
SPAN = Span((((2, T),),), (((0, S),),))


@pytest.fixture
def alone() -> Group:
    world = World(0, Topology(("here",)), torch.device("cpu"), 60.0, joined=False)
    return world.group("cp", [[0]])


def call(group: Group, **other: torch.Tensor) -> torch.Tensor:
    named: dict[str, Any] = {
        "q": torch.zeros(T, H, D), "k": torch.zeros(S, G, D), "v": torch.zeros(S, G, D), **other
    }  # fmt: skip
    return attention(*named.values(), SPAN, group, LayerSpec(H, G, D, 0.25))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("q", (T, H + 1, D)), ("q", (T, H, D + 1)), ("q", (H, D)), ("q", (1, T, H, D)),
        ("k", (S, H, D)), ("k", (S, G, D - 8)), ("k", (S - 1, G, D)), ("v", (S - 1, G, D)),
        ("v", (S, 1, D)), ("v", (S, G, 2 * D)), ("v", ()),
    ],
)  # fmt: skip
def test_shapes_that_do_not_fit(alone: Group, name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError) as caught:
        call(alone, **{name: torch.zeros(shape)})
    text = str(caught.value)
    assert f"{name} {list(shape)}" in text and "q must be [T, 4, 16], k and v [S, 2, 16]" in text


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_dtypes_and_devices_that_differ(alone: Group, name: str) -> None:
    fit = {"q": (T, H, D), "k": (S, G, D), "v": (S, G, D)}[name]
    with pytest.raises(ValueError, match="one dtype, got .*bfloat16"):
        call(alone, **{name: torch.zeros(fit, dtype=torch.bfloat16)})
    with pytest.raises(ValueError, match="one device, got .*meta"):
        call(alone, **{name: torch.zeros(fit, device="meta")})


def test_positions_that_do_not_fit(alone: Group) -> None:
    with pytest.raises(ValueError, match="5 queries and 7 keys on this rank, the tensors have 6"):
        call(alone, q=torch.zeros(T + 1, H, D))


def test_what_fits(alone: Group) -> None:
    assert call(alone).shape == (T, H, D)
