"""Models whose values have another head dim than their keys: attention in fp64 by what the probe
recorded gives transformers' eager logits, in two chunks and one decode step."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from ds_cp.attention.spec import LayerSpec
from ds_cp.model.shard import RowSums, shard_model
from ds_cp.model.wiring import CONTEXT, probe_layers
from tests.helpers.head_dims import FAMILIES, VOCAB, WINDOW, make_model

STEPS = ((0, 23), (23, 41), (41, 42))
LIMIT = 2e-5  # of the largest logit


class Fp64Attention:
    """Plain attention over everything stored, as the layers state it."""

    def __init__(self, layers: list[LayerSpec]) -> None:
        self.layers = layers
        self.stored: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.first = 0

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if layer in self.stored:
            k, v = (
                torch.cat([old, new], 2)
                for old, new in zip(self.stored[layer], (k, v), strict=True)
            )
        self.stored[layer] = k, v
        spec, group = self.layers[layer], q.shape[1] // k.shape[1]
        keys, values = (x[0].double().repeat_interleave(group, 0) for x in (k, v))
        scores = q[0].double() @ keys.transpose(1, 2) * spec.scale
        distance = self.first + torch.arange(q.shape[2])[:, None] - torch.arange(k.shape[2])
        seen = (distance >= 0) & (distance < (spec.window or k.shape[2] + 1))
        weights = scores.masked_fill(~seen, float("-inf")).exp()
        total = weights.sum(-1, keepdim=True)
        if spec.sinks is not None:
            total = total + spec.sinks.double().exp()[:, None, None]
        out = (weights / total) @ values
        assert out.shape[2] == spec.v_dim
        return out.transpose(0, 1)[None].to(q.dtype).contiguous()


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(1, VOCAB, (1, STEPS[-1][1]), generator=generator)


@torch.inference_mode()
@pytest.mark.parametrize("family", FAMILIES)
def test_attention_by_what_was_recorded_gives_transformers_logits(
    family: str, ids: torch.Tensor
) -> None:
    model = make_model(family)
    want = model(ids, use_cache=False).logits[0]
    layers = probe_layers(model)
    assert all(spec.v_dim == 12 != spec.head_dim for spec in layers)
    attention = Fp64Attention(layers)
    for begin, end in STEPS:
        attention.first = begin
        position_ids = torch.arange(begin, end)[None]
        got = model(
            ids[:, begin:end], position_ids=position_ids, use_cache=False, **{CONTEXT: attention}
        ).logits[0]
        assert float((got - want[begin:end]).abs().max() / want.abs().max()) < LIMIT


def test_layers_with_different_kv_heads_are_recorded_each() -> None:
    full, sliding = probe_layers(make_model("MiMoV2Flash"))
    assert (full.num_q_heads, full.num_kv_heads, full.window, full.sinks) == (4, 2, None, None)
    assert (sliding.num_q_heads, sliding.num_kv_heads, sliding.window) == (4, 4, WINDOW)
    assert sliding.sinks is not None and sliding.sinks.shape == (4,)


def test_equal_dims_are_not_said_twice() -> None:
    [spec, _] = probe_layers(make_model("MiMoV2Flash", v_head_dim=16))
    assert spec.v_head_dim is None and spec.v_dim == 16


@pytest.mark.parametrize("family", ["Glm4MoeLite", "MiMoV2Flash"])
def test_a_tensor_parallel_share_has_its_heads_and_their_sinks(family: str) -> None:
    shares = []
    whole = probe_layers(make_model(family))
    for rank in range(2):
        model = make_model(family)
        sums = RowSums(SimpleNamespace(rank=rank, size=2))  # type: ignore[arg-type]
        shard_model(model, sums)
        with sums.recording():
            shares.append(probe_layers(model))
    for spec, *parts in zip(whole, *shares, strict=True):
        for part in parts:
            assert (part.num_q_heads, part.head_dim, part.v_dim) == (2, spec.head_dim, spec.v_dim)
            assert part.num_kv_heads == spec.num_kv_heads // 2
        if spec.sinks is not None:
            assert torch.equal(torch.cat([part.sinks for part in parts]), spec.sinks)
