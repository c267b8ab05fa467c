"""Parameters that a token passes, against the sizes in the config."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf

from ds_cp.startup.weights import active_weights, count_weights
from tests.helpers.engines import tiny_llama

V, H, L = 64, 32, 3  # vocabulary, hidden size, layers
SIZES: dict[str, Any] = {
    "vocab_size": V, "hidden_size": H, "num_hidden_layers": L, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}  # fmt: skip
ATTENTION = 2 * H * H + 2 * H * 16


def test_dense() -> None:
    model = tiny_llama()
    assert active_weights(model) == sum(p.numel() for p in model.parameters())


def mixtral() -> tuple[Any, int]:
    model = hf.MixtralForCausalLM(hf.MixtralConfig(
        **SIZES, intermediate_size=48, num_local_experts=8, num_experts_per_tok=2))  # fmt: skip
    layer = ATTENTION + 2 * H + 8 * H + 2 * (3 * H * 48)
    return model, L * layer + 2 * V * H + H


def qwen_moe() -> tuple[Any, int]:
    """4 of 60 experts, and a shared one that every token passes."""
    model = hf.Qwen2MoeForCausalLM(hf.Qwen2MoeConfig(
        **SIZES, intermediate_size=48, moe_intermediate_size=16, num_experts=60,
        num_experts_per_tok=4, shared_expert_intermediate_size=24))  # fmt: skip
    shared = 3 * H * 24 + H
    layer = ATTENTION + H + 2 * 16 + 2 * H + 60 * H + 4 * (3 * H * 16) + shared
    return model, L * layer + 2 * V * H + H


def gpt_oss() -> tuple[Any, int]:
    model = hf.GptOssForCausalLM(hf.GptOssConfig(
        **SIZES, intermediate_size=48, num_local_experts=32, num_experts_per_tok=4,
        layer_types=["full_attention"] * L, pad_token_id=None))  # fmt: skip
    attention = ATTENTION + 2 * H + 2 * 16 + 4  # biases of q, o, k, v; sinks
    expert = 2 * H * 48 + 2 * 48 + 48 * H + H
    return model, L * (attention + 2 * H + 32 * H + 32 + 4 * expert) + 2 * V * H + H


def ernie() -> tuple[Any, int]:
    """Its config says moe_num_experts and moe_k; the first layer is dense."""
    model = hf.Ernie4_5_MoeForCausalLM(hf.Ernie4_5_MoeConfig(
        **SIZES, intermediate_size=48, moe_intermediate_size=16, moe_num_experts=64, moe_k=6,
        moe_num_shared_experts=2, moe_layer_start_index=1))  # fmt: skip
    experts = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    assert experts == 2 * 64 * 3 * H * 16
    whole = sum(p.numel() for p in model.parameters())
    return model, whole - 2 * 58 * 3 * H * 16


@pytest.mark.parametrize("make", [mixtral, qwen_moe, gpt_oss, ernie])
def test_of_experts_those_that_are_picked(make: Any) -> None:
    with torch.device("meta"):
        model, want = make()
    assert active_weights(model) == want < sum(p.numel() for p in model.parameters())


def test_layers_and_head_apart() -> None:
    """Embeddings are looked up; one that is the head as well counts as that."""
    with torch.device("meta"):
        model, active = mixtral()
        tied = hf.LlamaForCausalLM(
            hf.LlamaConfig(**SIZES | {"tie_word_embeddings": True}, intermediate_size=48)
        )
    found = count_weights(model)
    experts = L * 6 * 3 * H * 48
    assert (found.active, found.layers, found.head) == (active, active - 2 * V * H, V * H)
    assert found.stored == found.layers + experts
    found = count_weights(tied)
    assert found.head == V * H and found.layers == found.stored == found.active - V * H
