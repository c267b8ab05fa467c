"""The part of the start that a rank does by itself: its model is loaded, wired and packed.

``load`` and ``prepare`` are steps of ``build``, between which ranks agree. Where the model is on
the CPU and every rank holds it whole, ``Preloaded`` does both before the ranks meet; what goes
wrong is raised where they agree on it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from ds_cp.attention import LayerSpec
from ds_cp.comm.wire import World
from ds_cp.config import Config
from ds_cp.errors import ConfigError
from ds_cp.model.faults import decoder_at_fault
from ds_cp.model.invariant import restore_layers
from ds_cp.model.linear import unpack
from ds_cp.model.loading import choose_dtype, load_config, load_model
from ds_cp.model.shard import RowSums, shard_model
from ds_cp.model.source import ModelSource, find_model
from ds_cp.model.wiring import Decoder, check_positions, probe, probe_layers
from ds_cp.startup.exactness import Reference, reference_logits
from ds_cp.startup.fingerprint import Fingerprint, fingerprint
from ds_cp.startup.kv_budget import free_bytes
from ds_cp.startup.packing import MEMORY_SHARE, Packing, plan_packing
from ds_cp.topology.hosts import Topology
from ds_cp.topology.job import Job


@dataclass(frozen=True)
class Loaded:
    """A decoder, its attention modules by layer, the length that it is served with in tokens, and
    its fingerprint; ``notes``: on what of the checkpoint is not used."""

    decoder: Decoder
    modules: Sequence[nn.Module]
    max_model_len: int
    fingerprint: Fingerprint
    notes: Sequence[str]
    is_callers: bool


@dataclass(frozen=True)
class Prepared:
    """What each layer of a loaded decoder asks of attention, with this rank's head counts; what
    transformers computes with it; and what packs it."""

    layers: Sequence[LayerSpec]
    reference: Reference
    packing: Packing


def load(config: Config, model: Decoder | ModelSource | None, world: World) -> Loaded:
    """Load the model, ``None`` for the config's, and look at it. Raises ``ModelError``,
    ``UnsupportedModelError``, ``ConfigError``."""
    source = find_model(config.model) if model is None else model
    notes: list[str] = []
    decoder = _load(config, source, world, notes.append)
    # Refuses an architecture by its name before anything else is tried with it.
    with decoder_at_fault(decoder, "does not run"):
        modules = [module for _, module in probe(decoder)]
    text = decoder.config.get_text_config()
    length = _max_model_len(config, getattr(text, "max_position_embeddings", None))
    with decoder_at_fault(decoder, "has positions that cannot be"):
        check_positions(decoder, length)
    found = fingerprint(decoder, source if isinstance(source, ModelSource) else None)
    return Loaded(decoder, modules, length, found, notes, isinstance(model, Decoder))


def prepare(loaded: Loaded, config: Config, world: World, sums: RowSums) -> Prepared:
    """Run the model as transformers does, and shard it. Raises ``ConfigError``,
    ``UnsupportedModelError``."""
    decoder = loaded.decoder
    reference = reference_logits(decoder, loaded.modules)
    shard_model(decoder, sums)
    with sums.recording():
        packing = plan_packing(
            config.linear_layers, decoder, world, loaded.is_callers, config.attention.deterministic
        )
    with sums.recording():  # anew: what is kept are the sums of this one call of the model
        layers = probe_layers(decoder)
    _check_heads(decoder.config.get_text_config(), layers, sums.group.size)
    return Prepared(layers, reference, packing)


class Preloaded:
    """The model of ``config``, loaded and prepared in a world of this process alone, with
    ``threads`` CPU threads; ``job``: its place."""

    def __init__(self, config: Config, job: Job, threads: int) -> None:
        self._loaded: Loaded | None = None
        self._prepared: Prepared | None = None
        self._failure: Exception | None = None
        if torch.get_num_threads() != threads:  # to set it starts threads that do not end
            torch.set_num_threads(threads)
        world = World(
            0, Topology.from_hosts([job.host]), torch.device("cpu"), config.comm.timeout_s,
            joined=False, threads=threads,
        )  # fmt: skip
        try:
            self._loaded = loaded = load(config, None, world)
            if not _has_room(loaded.decoder, world, job):
                return
            self._prepared = ready = prepare(loaded, config, world, RowSums(world.everybody))
            line = ready.packing()
        except Exception as err:  # raised by ``load`` or ``prepare``
            self._failure = err
            return
        self._prepared = Prepared(ready.layers, ready.reference, lambda: line)

    @property
    def is_whole(self) -> bool:
        """Whether all was done, so that it can be shared with other processes."""
        return self._failure is None and self._prepared is not None

    def load(self) -> Loaded:
        """As the function of that name."""
        if self._loaded is None:
            assert self._failure is not None
            raise self._failure
        return self._loaded

    def prepare(self, again: Callable[[Loaded], Prepared] | None = None) -> Prepared:
        """As the function of that name. ``again``: what does it in the world of all ranks, where
        there was no room for packed weights before it was known what all of them take."""
        if self._failure is not None:
            raise self._failure
        if self._prepared is None:
            assert again is not None
            return again(self.load())
        return self._prepared


def _has_room(decoder: Decoder, world: World, job: Job) -> bool:
    """Whether packed weights have room on this host, whatever its other ranks take meanwhile."""
    size = sum(p.numel() * p.element_size() for p in decoder.parameters())
    return 2 * size * (job.local_world_size or 1) < MEMORY_SHARE * free_bytes(world)[0]


def _load(
    config: Config, model: Decoder | ModelSource, world: World, note: Callable[[str], None]
) -> Decoder:
    if isinstance(model, Decoder):
        unpack(model)  # what an earlier engine made of it
        restore_layers(model)
        return cast(Decoder, model.train(False))
    found = load_config(model)
    dtype = choose_dtype(config.dtype, getattr(found, "dtype", None), world.device)
    return load_model(model, dtype, world.device, note)


def _max_model_len(config: Config, limit: int | None) -> int:
    if config.max_model_len == "auto":
        if limit is None:
            raise ConfigError(
                "the model's config.json has no max_position_embeddings, "
                "so max_model_len cannot be auto: "
                "set it to the number of tokens that the model was made for"
            )
        return limit
    if limit is not None and config.max_model_len > limit:
        raise ConfigError(
            f"max_model_len is {config.max_model_len}, "
            f"but the model was made for {limit} positions; set it to at most {limit} or to auto"
        )
    return config.max_model_len


def _check_heads(text: Any, layers: Sequence[LayerSpec], tp_size: int) -> None:
    """Sharding that silently left a model whole would double every head: look at what came out."""
    want = text.num_attention_heads
    got = layers[0].num_q_heads * tp_size
    if tp_size > 1 and got != want:
        raise ConfigError(
            f"tensor_parallel.tp_size {tp_size}: {layers[0].num_q_heads} local query heads "
            f"do not make the model's {want}; set tp_size to 1"
        )
