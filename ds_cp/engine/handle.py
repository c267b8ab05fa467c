"""The border between the HTTP front and the engine: what the server may know about it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from ds_cp.engine.params import Delta, SamplingParams


@dataclass(frozen=True)
class EngineInfo:
    """Facts that do not change while the engine lives. Lengths and capacities in tokens."""

    model: str
    max_model_len: int
    vocab_size: int
    kv_capacity_tokens: int
    largest_request_tokens: int
    ranks: int
    hosts: int
    dtype: str
    created: int  # seconds since the epoch


@dataclass(frozen=True)
class EngineStats:
    """A snapshot for /metrics. Counters only grow; gauges are of now."""

    num_requests_running: int = 0
    num_requests_waiting: int = 0
    kv_blocks_used: tuple[int, ...] = ()  # one per rank
    kv_blocks_total: tuple[int, ...] = ()
    prompt_tokens: int = 0
    generation_tokens: int = 0
    num_preemptions: int = 0
    steps: int = 0
    step_seconds: float = 0.0
    finished: dict[str, int] = field(default_factory=dict)  # finish_reason -> count
    mode_counts: dict[str, int] = field(default_factory=dict)  # scheduled items by mode
    comm_bytes: dict[str, int] = field(default_factory=dict)  # rank 0's sent bytes by scheme
    comm_exchanges: dict[str, int] = field(default_factory=dict)


class EngineHandle(Protocol):
    """What the server needs. ``generate`` raises ``RequestError`` (``CapacityError``),
    ``QueueFullError`` or ``EngineDeadError`` before its first delta; closing the iterator
    aborts."""

    info: EngineInfo
    tokenizer: Any  # a transformers tokenizer

    @property
    def state(self) -> str:
        """ "starting", "ready" or "dead"."""
        ...

    def generate(
        self, request_id: str, prompt_token_ids: list[int], params: SamplingParams
    ) -> AsyncIterator[Delta]: ...

    def abort(self, request_id: str) -> None: ...

    def stats(self) -> EngineStats: ...
