"""An engine over the ranks that ``run_ranks`` started, and a small random model to run on it."""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ds_cp.comm.wire import World
from ds_cp.config import load_config
from ds_cp.engine.llm import LLMEngine
from ds_cp.model.loading import load_tokenizer
from ds_cp.model.source import ModelSource, find_model
from ds_cp.model.wiring import Decoder
from ds_cp.startup.build import build_worker


def tiny_llama(seed: int = 11, **changes: Any) -> LlamaForCausalLM:
    """A random fp32 Llama of 2 layers, 4 query and 2 KV heads of 16, 128 tokens, no end token.

    The same weights for the same seed on every rank. ``changes``: other ``LlamaConfig`` values.
    """
    sizes = {
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **changes})).eval()


def engine_on(
    world: World,
    model: Decoder | str | os.PathLike[str],
    config: Mapping[str, Any] | None = None,
    tokenizer: Any | None = None,
) -> LLMEngine:
    """``ds_cp.init_inference`` on a seat that is taken already. Every rank calls it.

    ``model``: a loaded decoder, or a path, whose tokenizer rank 0 then loads. ``config``: as in the
    JSON file, without ``model``. ``engine.shutdown()`` leaves the world, which ``run_ranks`` does
    anyway, so a test may build several engines on one world.
    """
    if isinstance(model, Decoder) and world.device.type != "cpu":
        model = copy.deepcopy(model).to(world.device)  # the caller's stays where its inputs are
    source = model if isinstance(model, Decoder) else find_model(os.fspath(model))
    name = "a loaded model" if isinstance(model, Decoder) else os.fspath(model)
    checked = load_config(config or {}, {"model": name})
    if tokenizer is None and isinstance(source, ModelSource) and world.rank == 0:
        tokenizer = load_tokenizer(source)
    worker, facts = build_worker(world, checked, source, torch.get_num_threads())
    # As on a machine with a core for each rank: where requests go must not depend on this one's.
    facts = dataclasses.replace(facts, ranks_at_once=world.size)
    return LLMEngine(world, worker, facts, checked, tokenizer)
