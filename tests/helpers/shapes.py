"""Small configs of every family that ``ds_cp.sizing`` knows, and their models without memory."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from transformers import PreTrainedModel

from tests.helpers import head_dims

SMALL: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
BIASED = {"attention_bias": True}
EXPERTS = {"moe_intermediate_size": 48, "num_experts_per_tok": 2}
MIXED = ["sliding_attention", "full_attention"] * 2
WINDOW = {"sliding_window": 16}
# name of a case -> class in transformers, changes to the sizes above
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama with biases, tied": (
        "Llama", {**BIASED, "mlp_bias": True, "tie_word_embeddings": True, "head_dim": 24}
    ),
    "mistral": ("Mistral", {**WINDOW, "head_dim": 16}),
    "mixtral": ("Mixtral", {"num_local_experts": 4}),
    "qwen2": ("Qwen2", {}),
    "qwen2 with windows": ("Qwen2", {**WINDOW, "use_sliding_window": True, "max_window_layers": 2}),
    "qwen3": ("Qwen3", {"head_dim": 16, **BIASED}),
    "qwen2_moe": (
        "Qwen2Moe", {**EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 24}
    ),
    "qwen2_moe, half dense": (
        "Qwen2Moe", {**EXPERTS, "num_experts": 4, "decoder_sparse_step": 2, "qkv_bias": False}
    ),
    "qwen3_moe": (
        "Qwen3Moe", {**EXPERTS, "head_dim": 16, "num_experts": 4, "mlp_only_layers": [1]}
    ),
    "gemma": ("Gemma", {"head_dim": 32}),
    "gemma2": ("Gemma2", {**WINDOW, "head_dim": 16, "layer_types": MIXED}),
    "gemma3": ("Gemma3", {**WINDOW, "head_dim": 16, "layer_types": MIXED}),
    "phi": ("Phi", {}),
    "phi3": ("Phi3", WINDOW),
    "olmo": ("Olmo", {}),
    "olmo2": ("Olmo2", {}),
    "olmo3": ("Olmo3", WINDOW),
    "olmoe": ("Olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
    "starcoder2": ("Starcoder2", {**WINDOW, "use_bias": True}),
    "cohere": ("Cohere", {}),
    "cohere with norms": ("Cohere", {"use_qk_norm": True}),
    "cohere2": ("Cohere2", WINDOW),
    "granite": ("Granite", {**BIASED, "mlp_bias": True}),
    "granitemoe": ("GraniteMoe", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "glm": ("Glm", {"head_dim": 16}),
    "glm4": ("Glm4", {"head_dim": 16}),
    "glm4_moe": ("Glm4Moe", {**EXPERTS, "n_routed_experts": 4, "use_qk_norm": True}),
    "smollm3": ("SmolLM3", {}),
    "seed_oss": ("SeedOss", {"attention_out_bias": True, "head_dim": 16}),
    "arcee": ("Arcee", {"mlp_bias": True}),
    "exaone4": ("Exaone4", WINDOW),
    "gpt_neox": ("GPTNeoX", {}),
    "opt": ("OPT", {"ffn_dim": 80, "word_embed_proj_dim": 64, "num_key_value_heads": 4}),
    "gpt_oss": (
        "GptOss",
        {**WINDOW, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2,
         "layer_types": MIXED},
    ),
    "ernie4_5": ("Ernie4_5", {"head_dim": 16, "use_bias": True}),
    "ernie4_5_moe": (
        "Ernie4_5_Moe",
        {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16, "moe_num_shared_experts": 2,
         "moe_layer_start_index": 1},
    ),
}  # fmt: skip
GPT2_KEYS = {"vocab_size": 128, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
CASES["gpt2"] = ("GPT2", GPT2_KEYS)
LATENT = tuple(head_dims.FAMILIES)
ALL = (*CASES, *LATENT)


def config_of(case: str) -> Any:
    """The config of a case, an object of transformers."""
    if case in LATENT:
        sizes = {**head_dims.SIZES, **head_dims.FAMILIES[case]}
        if case == "LongcatFlash":
            del sizes["num_hidden_layers"]
        return getattr(hf, case + "Config")(**sizes)
    name, changes = CASES[case]
    ids = {k: v for k, v in SMALL.items() if k.endswith("token_id")}
    sizes = ids if name == "GPT2" else SMALL
    kind = "TextConfig" if name == "Gemma3" else "Config"
    return getattr(hf, name + kind)(**{**sizes, **changes})


def model_of(case: str, config: Any, device: str = "meta") -> PreTrainedModel:
    """The model of a config; on the meta device, shapes without memory."""
    name = case if case in LATENT else CASES[case][0]
    suffix = "LMHeadModel" if name == "GPT2" else "ForCausalLM"
    with torch.device(device):
        model: PreTrainedModel = getattr(hf, name + suffix)(config)
    return model.eval()
