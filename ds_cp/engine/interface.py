"""What the HTTP application may know about an engine: its facts, its counters, its calls."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from ds_cp.engine.picture import Picture
from ds_cp.journal.stats import JournalStats
from ds_cp.outputs import Delta, EndedRequest, PromptProgress
from ds_cp.sampling_params import RequestOptions, SamplingParams
from ds_cp.templates.chat import ChatTemplate


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
    host_capacity_tokens: int = 0  # whose KV host memory keeps, beside that


@dataclass(frozen=True)
class EngineStats:
    """A snapshot for /metrics. Counters only grow; gauges are of now."""

    num_requests_running: int = 0
    num_requests_waiting: int = 0
    kv_blocks_used: tuple[int, ...] = ()  # one per rank
    kv_blocks_cached: tuple[int, ...] = ()  # unreferenced, kept for their prefix
    kv_blocks_total: tuple[int, ...] = ()  # 0 for a rank that is away
    host_blocks_used: tuple[int, ...] = ()  # in host memory, one per rank; () for none anywhere
    host_blocks_total: tuple[int, ...] = ()  # as used, where it failed or the rank is away
    host_blocks_failed: tuple[int, ...] = ()  # that could not be copied there or back
    host_blocks_spilled: int = 0  # copies of blocks to host memory
    host_blocks_restored: int = 0  # and back
    prefix_cache_host_hits: int = 0  # prompt tokens found there
    ranks_drained: tuple[int, ...] = ()  # closed ranks: they take no new KV
    ranks_draining: tuple[int, ...] = ()  # closed ranks that are not empty yet
    ranks_away: tuple[int, ...] = ()  # closed ranks whose supervisor is gone
    prefix_cache_queries: int = 0  # prompt tokens looked up
    prefix_cache_hits: int = 0  # prompt tokens found
    blocks_moved: int = 0  # by drain and rebalance
    prompt_tokens: int = 0
    generation_tokens: int = 0
    prefill_tokens: int = 0  # prompt tokens that steps computed: without what was cached
    num_preemptions: int = 0
    num_interruptions: int = 0  # times that the ranks met again
    num_refused: int = 0  # requests for which there was no place, or too long a wait
    queue_wait_seconds: float = 0.0  # predicted, of a new client's request that came now
    num_strangers: int = 0  # connections to the ranks' port that were dropped
    steps: int = 0
    step_seconds: float = 0.0
    step_age_seconds: float = 0.0  # of the step that runs now; 0 between steps
    finished: dict[str, int] = field(default_factory=dict)  # finish_reason -> count
    mode_counts: dict[str, int] = field(default_factory=dict)  # scheduled items by mode
    comm_bytes: dict[str, int] = field(default_factory=dict)  # rank 0's sent bytes by scheme
    comm_exchanges: dict[str, int] = field(default_factory=dict)
    rank_steps: tuple[int, ...] = ()  # steps in which the rank had work
    rank_seconds: tuple[float, ...] = ()  # of these
    rank_waits: tuple[float, ...] = ()  # seconds of these in which it waited for other ranks
    skew_seconds: float = 0.0  # the busiest rank's own work beyond the mean, over all steps
    skew: float = 1.0  # the busiest rank's own work over the mean, in the newest step of several
    attention_bytes: dict[str, int] = field(default_factory=dict)  # all ranks, by scheme
    predicted_bytes: dict[str, int] = field(default_factory=dict)  # the same by the formulas
    grammar_requests: int = 0  # answers under a grammar
    grammar_failures: int = 0  # of these, ended because it allowed no token or passed its bounds
    journal: JournalStats | None = None  # None where there is no journal

    def rank_state(self, rank: int) -> str:
        """ "open", "draining" (closed, and not empty yet), "drained" (closed and empty) or "away"
        (its supervisor is gone)."""
        if rank in self.ranks_away:
            return "away"
        if rank in self.ranks_draining:
            return "draining"
        return "drained" if rank in self.ranks_drained else "open"


@dataclass(frozen=True)
class EngineHealth:
    """What load balancers ask. ``is_overloaded``: a request was refused for want of room lately;
    ``ranks_away``: ranks without which the job goes on, so that the capacity is smaller."""

    state: str
    is_overloaded: bool = False
    ranks_away: tuple[int, ...] = ()


class EngineInterface(Protocol):
    """What the server needs. ``generate`` raises ``RequestError`` (``CapacityError``),
    ``QueueFullError`` or ``EngineDeadError`` before its first delta; closing the iterator
    aborts all ``params.n`` answers. The iterator ends after the last delta of every index."""

    info: EngineInfo
    tokenizer: Any  # a transformers tokenizer
    chat_template: ChatTemplate  # of the tokenizer

    def check(self, prompt_token_ids: Sequence[int], params: SamplingParams) -> None:
        """Raise ``RequestError``, with its field, for a request that is not acceptable whatever the
        engine does at the moment. To be called once, before ``generate``."""
        ...

    @property
    def state(self) -> str:
        """ "starting"; "ready"; "recovering" while the ranks meet again after a worker has died, or
        a step has failed on one, for which requests wait; "stalled" while one step takes longer
        than ``server.stall_s``; "stopping" once the server is being stopped; "dead"."""
        ...

    @property
    def health(self) -> EngineHealth:
        """The state, and what goes with it. Waits for nothing."""
        ...

    def check_room(self, options: RequestOptions, answers: int = 1) -> None:
        """Raise ``QueueFullError`` where ``generate`` would, whatever the prompt, for so many
        answers: before it is rendered and tokenized."""
        ...

    def generate(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        params: SamplingParams,
        options: RequestOptions = ...,
    ) -> AsyncIterator[Delta]:
        """Deltas until the last one of every answer. Raises as the class says."""
        ...

    def on_ended(self, listener: Callable[[EndedRequest], None]) -> None:
        """Have ``listener`` called, in the event loop, once for each answer that ends. Before the
        first request."""
        ...

    def progress(self, request_id: str) -> PromptProgress | None:
        """How far a request's prompt has come; None before it starts and after its first token."""
        ...

    def abort(self, request_id: str) -> None:
        """End a request, all its answers; does nothing when it has finished."""
        ...

    def stats(self) -> EngineStats:
        """A snapshot of counters and gauges."""
        ...

    def picture(self) -> Picture | None:
        """The live picture of now, made in a few milliseconds; None before the engine is ready. May
        be called in any thread."""
        ...

    def drain(self, rank: int) -> None:
        """Begin to move everything off a rank, live, and place nothing there; prefixes that nothing
        runs with are forgotten, those in its host memory too. It is done when
        ``stats().ranks_draining`` does not have the rank any more. ``RequestError`` when there is
        no such rank; ``CapacityError`` when no other rank is open, or those that are cannot hold
        what runs."""
        ...

    def reopen(self, rank: int) -> None:
        """Let a drained rank take KV again. ``RequestError`` when there is no such rank."""
        ...

    def rebalance(self) -> int:
        """Move blocks from full ranks to empty ones; returns how many will move."""
        ...

    def reset_prefix_cache(self) -> int:
        """Forget every prefix: no later request shares a block that is computed now. Blocks in use
        stay with who uses them; returns how many unused ones became free."""
        ...
