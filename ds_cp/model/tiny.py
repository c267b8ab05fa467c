"""A decoder of next to no work: what a layer costs in it is launches and Python."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ds_cp.model.wiring import Decoder


def tiny_decoder(layers: int, dtype: torch.dtype, device: torch.device) -> Decoder:
    """A Llama of random weights with ``layers`` layers, 4 query and 2 KV heads of 16 dims."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    made: Any = LlamaForCausalLM(config)
    model: Decoder = made.to(device, dtype).eval()
    return model
