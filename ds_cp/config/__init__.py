"""The JSON config: ``load_config`` reads and checks a file; its sections are frozen models."""

from __future__ import annotations

from ds_cp.config.addresses import canonical_host, canonical_origin, split_authority
from ds_cp.config.kv_cache import KvCache
from ds_cp.config.load import config_schema, explain, load_config, looks_like_path
from ds_cp.config.models import (
    Attention,
    Comm,
    Config,
    ContextParallel,
    Scheduler,
    TensorParallel,
    Trace,
)
from ds_cp.config.server import Server, is_loopback

__all__ = [
    "Attention",
    "Comm",
    "Config",
    "ContextParallel",
    "KvCache",
    "Scheduler",
    "Server",
    "TensorParallel",
    "Trace",
    "canonical_host",
    "canonical_origin",
    "config_schema",
    "explain",
    "is_loopback",
    "load_config",
    "looks_like_path",
    "split_authority",
]
