"""From a place in the job to a worker that can run plans.

Every phase that can fail on one rank alone ends with an agreement: all ranks report to rank 0,
which speaks for them, and all leave together. So a missing file on one host is one line, not a
hang.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ds_cp.attention import LayerSpec, get_kernel
from ds_cp.attention.kernels import kernel_notes
from ds_cp.comm.links import measure_links
from ds_cp.comm.wire import World
from ds_cp.config import Config
from ds_cp.errors import (
    ConfigError,
)
from ds_cp.facts import Facts, LinkFacts
from ds_cp.kv.pool import KVPool, bytes_per_token
from ds_cp.model.end_tokens import model_end_tokens
from ds_cp.model.loading import choose_dtype, load_config, load_model
from ds_cp.model.shard import shard_model
from ds_cp.model.source import ModelSource, find_model
from ds_cp.model.wiring import Decoder, check_exact, check_positions, probe_layers
from ds_cp.startup.agreement import agreed, gather_blocks
from ds_cp.startup.flops import achieved_flops
from ds_cp.startup.kv_budget import tokens_of_rank
from ds_cp.startup.resources import ranks_at_once
from ds_cp.topology.hosts import resolve_grid
from ds_cp.worker.worker import Worker


def build_worker(
    world: World, config: Config, model: Decoder | ModelSource | None, threads: int
) -> tuple[Worker, Facts]:
    """Load, shard, check and wire the model, and allocate this rank's KV. Collective.

    ``model``: ``None`` for the config's, looked up here, so that a rank that does not find it can
    say so.
    """
    grid = resolve_grid(
        world.topology, config.context_parallel.size, config.tensor_parallel.tp_size
    )
    cp = world.group("cp", grid.cp_groups())
    tp = world.group("tp", grid.tp_groups())

    notes: list[str] = []

    def load() -> tuple[Decoder, list[LayerSpec], Any, str, int, float]:
        source = find_model(config.model) if model is None else model
        decoder = _load(config, source, world.device, notes.append)
        text = decoder.config.get_text_config()
        kernel_name, kernel = get_kernel(config.attention.backend, world.device, decoder.dtype)
        shard_model(decoder, tp)
        layers = probe_layers(decoder)
        _check_heads(text, layers, tp.size)
        length = _max_model_len(config, getattr(text, "max_position_embeddings", None))
        check_positions(decoder, length)
        error = check_exact(decoder, layers, kernel)
        return decoder, layers, kernel, kernel_name, length, error

    decoder, layers, kernel, kernel_name, length, error = agreed(world, load)
    per_token = bytes_per_token(layers, decoder.dtype)

    def allocate() -> KVPool:
        tokens = tokens_of_rank(config, world, grid, cp.rank, per_token, length)
        return KVPool(layers, tokens, decoder.dtype, world.device)

    size = config.kv_cache.block_size
    pool = agreed(world, allocate)
    blocks = gather_blocks(world, pool.num_slots // size)
    text = decoder.config.get_text_config()
    flops = achieved_flops(text.hidden_size, decoder.dtype, world.device)
    facts = Facts(
        hosts=world.topology.hosts,
        cp_size=cp.size,
        tp_size=tp.size,
        device=str(world.device.type),
        dtype=str(decoder.dtype).removeprefix("torch."),
        kernel=kernel_name,
        max_model_len=length,
        vocab_size=text.vocab_size,
        eos_token_ids=model_end_tokens(decoder),
        num_q_heads=layers[0].num_q_heads * tp.size,
        num_kv_heads=layers[0].num_kv_heads * tp.size,
        block_size=size,
        blocks_per_rank=tuple(blocks[c * tp.size] for c in range(cp.size)),
        bytes_per_token=per_token,
        num_layers=len(layers),
        threads=threads,
        ranks_at_once=ranks_at_once(world.device.type, threads, world.size),
        exactness=error,
        links=tuple(LinkFacts(x.name, x.latency_us, x.gb_per_s) for x in measure_links(world)),
        flops_per_s=flops,
        weights=sum(p.numel() for p in decoder.parameters()),
        head_dim=layers[0].head_dim,
        notes=(*notes, *kernel_notes(kernel_name, kernel, layers)),
    )
    return Worker(world, cp, tp, decoder, layers, pool, kernel, size), facts


def _load(
    config: Config,
    model: Decoder | ModelSource,
    device: torch.device,
    note: Callable[[str], None],
) -> Decoder:
    if isinstance(model, Decoder):
        return model.eval()
    found = load_config(model)
    dtype = choose_dtype(config.dtype, getattr(found, "dtype", None), device)
    return load_model(model, dtype, device, note)


def _max_model_len(config: Config, limit: int | None) -> int:
    if config.max_model_len == "auto":
        if limit is None:
            raise ConfigError(
                "the model's config.json has no max_position_embeddings, so max_model_len cannot "
                "be auto: set it to the number of tokens that the model was made for"
            )
        return limit
    if limit is not None and config.max_model_len > limit:
        raise ConfigError(
            f"max_model_len is {config.max_model_len}, but the model was made for {limit} "
            "positions; "
            f"set it to at most {limit} or to auto"
        )
    return config.max_model_len


def _check_heads(text: Any, layers: list[LayerSpec], tp_size: int) -> None:
    """Sharding that silently left a model whole would double every head: look at what came out."""
    want = text.num_attention_heads
    got = layers[0].num_q_heads * tp_size
    if tp_size > 1 and got != want:
        raise ConfigError(
            f"tensor_parallel.tp_size {tp_size}: {layers[0].num_q_heads} local query heads do "
            "not make the "
            f"model's {want}; set tp_size to 1"
        )
