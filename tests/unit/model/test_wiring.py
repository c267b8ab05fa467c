"""What a model's attention asks for; architectures that cannot be served exactly are refused by
name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf

from ds_cp.errors import UnsupportedModelError
from ds_cp.model.wiring import check_positions, probe_layers
from tests.helpers.engines import tiny_llama

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 32,
}


def unsupported(name: str) -> Any:
    torch.manual_seed(0)
    if name == "mamba":
        return hf.MambaForCausalLM(hf.MambaConfig(
            vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4))  # fmt: skip
    if name == "bloom":
        return hf.BloomForCausalLM(hf.BloomConfig(
            vocab_size=64, hidden_size=32, n_layer=2, n_head=4))  # fmt: skip
    if name == "llama4":
        return hf.Llama4ForCausalLM(hf.Llama4TextConfig(
            **SIZES, intermediate_size_mlp=32, num_key_value_heads=2, head_dim=8,
            num_local_experts=2, num_experts_per_tok=1, attention_chunk_size=16,
            moe_layers=[]))  # fmt: skip
    if name == "deepseek_v32":
        return hf.DeepseekV32ForCausalLM(hf.DeepseekV32Config(
            **SIZES, num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8,
            qk_nope_head_dim=8, v_head_dim=8, first_k_dense_replace=2, n_routed_experts=2,
            num_experts_per_tok=1, n_group=1, topk_group=1, n_shared_experts=1,
            moe_intermediate_size=16, index_topk=4, index_n_heads=2, index_head_dim=16,
        ))  # fmt: skip
    if name == "an indexer that the config does not tell":
        model = unsupported("deepseek_v32")
        model.config.layer_types = ["full_attention", "full_attention"]
        return model
    if name == "a window in the mask alone":
        return hf.PhimoeForCausalLM(hf.PhimoeConfig(
            **SIZES, num_key_value_heads=2, head_dim=8, num_local_experts=2, num_experts_per_tok=1,
            sliding_window=16, max_position_embeddings=64, bos_token_id=None, eos_token_id=None,
        ))  # fmt: skip
    if name == "qwen3_next":
        return hf.Qwen3NextForCausalLM(hf.Qwen3NextConfig(
            **SIZES, num_key_value_heads=2, head_dim=8, num_experts=2, num_experts_per_tok=1,
            moe_intermediate_size=16, shared_expert_intermediate_size=16,
            linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=8,
            linear_value_head_dim=8))  # fmt: skip
    raise ValueError(name)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("mamba", "MambaForCausalLM"),
        ("bloom", "BloomForCausalLM"),
        ("llama4", r"Llama4ForCausalLM has layers of type chunked_attention \(queries see"),
        (
            "deepseek_v32",
            r"DeepseekV32ForCausalLM has layers of type indexed_attention \(sparse",
        ),
        ("an indexer that the config does not tell", r"indexed_attention \(sparse: an indexer"),
        ("a window in the mask alone", "PhimoeForCausalLM masks all but 16 tokens, but its layers"),
        ("qwen3_next", r"Qwen3NextForCausalLM has layers of type linear_attention \(a recurrent"),
    ],
)
def test_unsupported_architectures_are_named(name: str, words: str) -> None:
    with pytest.raises(UnsupportedModelError, match=words) as caught:
        probe_layers(unsupported(name).eval())
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2


def test_a_window_as_long_as_the_model_masks_nothing() -> None:
    model = unsupported("a window in the mask alone").eval()
    model.config.sliding_window = model.config.max_position_embeddings
    assert [spec.window for spec in probe_layers(model)] == [None, None]
    assert "ds_cp_windows" not in vars(model.config)


def test_an_error_without_a_message_is_named_by_its_type(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ValueError

    model = tiny_llama()
    monkeypatch.setattr(model.model, "forward", fail)
    with pytest.raises(UnsupportedModelError, match="attention interface: ValueError"):
        probe_layers(model)


def test_what_a_supported_model_states() -> None:
    specs = probe_layers(tiny_llama())
    assert len(specs) == 2
    for spec in specs:
        assert (spec.num_q_heads, spec.num_kv_heads, spec.head_dim) == (4, 2, 16)
        assert spec.scale == pytest.approx(0.25)
        assert spec.window is None and spec.softcap is None and spec.sinks is None


def longrope() -> Any:
    half = 16 // 2
    return hf.Phi3ForCausalLM(hf.Phi3Config(
        **{**SIZES, "hidden_size": 64}, num_key_value_heads=2, pad_token_id=0,
        max_position_embeddings=512, original_max_position_embeddings=128,
        rope_parameters={
            "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * half,
            "long_factor": [2.0] * half, "original_max_position_embeddings": 128,
        },
    ))  # fmt: skip


def test_longrope_is_served_up_to_where_it_changes() -> None:
    model = longrope()
    check_positions(model, 128)
    with pytest.raises(UnsupportedModelError, match=r"longrope.*set max_model_len to at most 128"):
        check_positions(model, 129)


def test_dynamic_rope_is_served_up_to_where_it_changes() -> None:
    model = tiny_llama(
        rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    )
    check_positions(model, 512)
    with pytest.raises(UnsupportedModelError, match=r"dynamic.*at most 512"):
        check_positions(model, 513)


def test_other_ropes_do_not_depend_on_length() -> None:
    for rope in (
        {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
        {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
         "original_max_position_embeddings": 128},
    ):  # fmt: skip
        check_positions(tiny_llama(rope_parameters=rope), 512)
