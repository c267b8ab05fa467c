"""Llama 3.1 8B, as its config.json has it."""

from __future__ import annotations

from typing import Any

from ds_cp.sizing.model import shape_of

SMALL: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "vocab_size": 128256, "max_position_embeddings": 131072, "dtype": "bfloat16",
}  # fmt: skip
LLAMA_8B = shape_of(SMALL, "llama-8b", "config.json")
