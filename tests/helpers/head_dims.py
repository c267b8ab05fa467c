"""Small random models whose values have another head dim than their keys."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from transformers import PreTrainedModel

VOCAB = 128
WINDOW = 16
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
LATENT = {"q_lora_rank": 24, "kv_lora_rank": 20, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16,
          "v_head_dim": 12}  # fmt: skip
EXPERTS = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "n_group": 1,
    "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1,
}  # fmt: skip
# Name in transformers -> changes to the sizes above. All but the last expand a latent into keys and
# values; the last has twice the KV heads, a window and sinks in its sliding layers.
FAMILIES: dict[str, dict[str, Any]] = {
    "DeepseekV2": {**LATENT, **EXPERTS},
    "DeepseekV3": {**LATENT, **EXPERTS},
    "Glm4MoeLite": {**LATENT, **EXPERTS},
    "AXK1": {**LATENT, **EXPERTS},
    "Youtu": LATENT,
    "MiniCPM3": LATENT,
    "LongcatFlash": {
        **LATENT, "num_layers": 2, "head_dim": 8, "ffn_hidden_size": 96, "moe_topk": 2,
        "expert_ffn_hidden_size": 48, "n_routed_experts": 4, "zero_expert_num": 1,
    },
    "MiMoV2Flash": {
        "num_key_value_heads": 2, "head_dim": 16, "v_head_dim": 12, "sliding_window": WINDOW,
        "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48,
        "layer_types": ["full_attention", "sliding_attention"],
    },
}  # fmt: skip


def make_model(family: str, **changes: Any) -> PreTrainedModel:
    """Random weights, the same in every process; norms, biases and sinks are random too, so that
    leaving one out would show."""
    sizes = {**SIZES, **FAMILIES[family], **changes}
    if family == "LongcatFlash":
        del sizes["num_hidden_layers"]  # counts attention layers there, two a layer
    config = getattr(hf, family + "Config")(**sizes)
    config._attn_implementation = "eager"
    torch.manual_seed(5)
    model = getattr(hf, family + "ForCausalLM")(config).eval().float()
    generator = torch.Generator().manual_seed(6)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model
