"""The live picture: what an operator may see of an engine at one moment, as plain data.

Bounded whatever the job's size. There is no text and no token of any request in it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

MAX_RANKS = 256  # ranks that are drawn
MAX_RUNNING = 48  # running requests that are listed, in the order of service
MAX_WAITING = 16  # waiting requests that are listed, the next ones first
MAX_RECENT = 8  # requests that ended last
MAX_CELLS = 8192  # cells of all ranks' maps together
CELLS = range(16, 257)  # cells of one rank's map, but never more than it has blocks
# What a cell of a map shows that is not one listed request's.
FREE, CACHED, SHARED, OTHER = -1, -2, -3, -4
RESERVED = 1000  # added to a request's place in the list: blocks for the rest of its prompt


@dataclass(frozen=True)
class RankPicture:
    """One context-parallel rank and its KV pool. ``state``: "open", "draining", "drained" or
    "away".

    ``used``, ``cached`` and ``total`` are blocks, exact. ``cells``: the pool in the order of its
    block numbers, run-length coded as (what, how many cells); what: the place of a request in
    ``Picture.requests`` (plus ``RESERVED``: held for the rest of its prompt), or one of ``FREE``,
    ``CACHED`` (no request, kept for its prefix), ``SHARED`` (several requests) and ``OTHER`` (one
    that is not listed). A cell is one block where the pool is small; else it stands for
    ``blocks_per_cell`` and shows what most of them are. ``host_used`` of ``host_total`` blocks are
    kept in the rank's host memory.
    """

    rank: int
    host: str
    state: str
    used: int
    cached: int
    total: int
    blocks_per_cell: float
    cells: tuple[tuple[int, int], ...]
    host_used: int = 0
    host_total: int = 0


@dataclass(frozen=True)
class RequestPicture:
    """One answer that is being made. ``id``: the engine's, which begins with the id of the HTTP
    answer. ``phase``: "waiting", "prefill" or "decode".

    ``mode``, ``ring_pass`` and ``mode_reason`` are of its newest step, ``span_reason`` of its
    ranks, None before it starts; ``why``: both reasons as a sentence. ``ranks`` hold its KV or
    compute it, ascending; ``owner`` computes its next token, None in its prefill. ``working``: the
    newest step has it and has not ended. ``computed``: tokens of the prompt (and, once preempted,
    of the output) whose KV is stored, of ``to_compute``. Times in seconds; ``age_s`` since its
    arrival, ``tpot_s`` the mean time between its tokens.
    """

    number: int
    id: str
    index: int
    phase: str
    mode: str | None
    ring_pass: str | None
    mode_reason: str | None
    span_reason: str | None
    why: str
    ranks: tuple[int, ...]
    owner: int | None
    working: bool
    prompt_tokens: int
    cached_tokens: int
    computed: int
    to_compute: int
    new_tokens: int
    max_tokens: int
    blocks: int
    preemptions: int
    age_s: float
    ttft_s: float | None
    tpot_s: float | None


@dataclass(frozen=True)
class EndedPicture:
    """One answer that has ended. Times in seconds, None for what it did not come to."""

    id: str
    index: int
    finish_reason: str
    modes: tuple[str, ...]
    prompt_tokens: int
    new_tokens: int
    ttft_s: float | None
    tpot_s: float | None
    e2e_s: float


@dataclass(frozen=True)
class Counters:
    """What only grows: tokens, steps, seconds of steps, bytes that rank 0 sent by scheme."""

    generation_tokens: int = 0
    prefill_tokens: int = 0
    steps: int = 0
    step_seconds: float = 0.0
    num_preemptions: int = 0
    blocks_moved: int = 0
    host_blocks_spilled: int = 0
    host_blocks_restored: int = 0
    prefix_cache_host_hits: int = 0
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0
    mode_counts: dict[str, int] = field(default_factory=dict)
    comm_bytes: dict[str, int] = field(default_factory=dict)
    comm_exchanges: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Picture:
    """An engine at one moment. ``ring_order``: the order in which KV or queries go round.

    ``num_ranks``, ``num_running`` and ``num_waiting`` count also what is not listed.
    """

    block_size: int
    num_ranks: int
    ranks: tuple[RankPicture, ...]
    ring_order: tuple[int, ...]
    num_running: int
    num_waiting: int
    requests: tuple[RequestPicture, ...]
    recent: tuple[EndedPicture, ...]
    counters: Counters
