"""Makes live pictures of an engine core: a short look under its lock, the drawing outside."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import islice

from ds_cp.clock import steady_time
from ds_cp.engine.core import EngineCore, StepItems
from ds_cp.engine.kv_map import MAX_BLOCKS, cell_count, draw_pool, owners_of
from ds_cp.engine.picture import (
    MAX_RANKS,
    MAX_RUNNING,
    MAX_WAITING,
    OTHER,
    RESERVED,
    Counters,
    EndedPicture,
    Picture,
    RankPicture,
    RequestPicture,
)
from ds_cp.engine.request_picture import request_picture
from ds_cp.layout import Home
from ds_cp.scheduler.request import Request


@dataclass(frozen=True)
class _Look:
    """What has to be read while nothing changes. ``held``: pairs (what, some blocks), each block
    for ``stride``."""

    requests: tuple[RequestPicture, ...]
    recent: tuple[EndedPicture, ...]
    num_running: int
    num_waiting: int
    held: list[tuple[int, Sequence[Home]]]
    stride: int
    free: list[list[tuple[int, int]]]  # of each rank
    used: tuple[int, ...]
    cached: tuple[int, ...]
    host: tuple[tuple[int, int], ...]  # of each rank, used and all; () for none anywhere
    states: tuple[str, ...]
    counters: Counters


class Observer:
    """``hosts``: of every context-parallel rank. ``guard`` is held while the core is read: under a
    millisecond, and some tens of nanoseconds for each running request, free run and rank. The
    blocks of a pool do not count."""

    def __init__(
        self, core: EngineCore, hosts: Sequence[str], guard: AbstractContextManager[object]
    ) -> None:
        self._core = core
        self._hosts = tuple(hosts)
        self._guard = guard

    def picture(
        self, step_seconds: float = 0.0, sent: dict[str, tuple[int, int]] | None = None
    ) -> Picture:
        """A picture of now; ``step_seconds`` and ``sent``, (bytes, exchanges) by scheme, are the
        caller's counters."""
        with self._guard:
            look = self._look(step_seconds, sent or {})
        scheduler = self._core.scheduler
        totals = scheduler.allocator.blocks_per_rank
        shown = range(min(len(totals), MAX_RANKS))
        owners: list[dict[int, int]] = [{} for _ in totals]
        for (rank, block), what in owners_of(look.held).items():
            owners[rank][block] = what
        return Picture(
            block_size=scheduler.allocator.block_size,
            num_ranks=len(totals),
            ranks=tuple(self._rank(look, rank, owners[rank], totals) for rank in shown),
            ring_order=scheduler.block_manager.order[:MAX_RANKS],
            num_running=look.num_running,
            num_waiting=look.num_waiting,
            requests=look.requests,
            recent=look.recent,
            counters=look.counters,
        )

    def _rank(
        self, look: _Look, rank: int, owners: dict[int, int], totals: Sequence[int]
    ) -> RankPicture:
        total = totals[rank]
        count = cell_count(total, len(totals))
        return RankPicture(
            rank, self._hosts[rank], look.states[rank], look.used[rank], look.cached[rank], total,
            round(total / count, 2) if count else 0.0,
            draw_pool(total, count, look.free[rank], owners, look.stride),
            *(look.host[rank] if look.host else (0, 0)),
        )  # fmt: skip

    def _look(self, step_seconds: float, sent: dict[str, tuple[int, int]]) -> _Look:
        core, now = self._core, steady_time()
        scheduler = core.scheduler
        allocator = scheduler.allocator
        stats = core.stats()
        running = scheduler.running
        steps = _steps_of(core.last_items)
        busy = scheduler.num_in_flight > 0
        waiting = scheduler.waiting.peek(MAX_WAITING)
        listed = [*running[:MAX_RUNNING], *waiting]
        stride = 1 + sum(len(r.table.homes) for r in running if r.table) // MAX_BLOCKS
        ranks = range(len(allocator.blocks_per_rank))
        return _Look(
            requests=tuple(request_picture(r, steps.get(r.number), busy, now) for r in listed),
            recent=tuple(core.recent),
            num_running=len(running),
            num_waiting=len(scheduler.waiting),
            held=list(_held(running, stride)),
            stride=stride,
            free=[allocator.free_runs(rank) for rank in ranks[:MAX_RANKS]],
            used=stats.kv_blocks_used,
            cached=stats.kv_blocks_cached,
            host=tuple(zip(stats.host_blocks_used, stats.host_blocks_total, strict=True)),
            states=tuple(map(stats.rank_state, ranks)),
            counters=Counters(
                generation_tokens=stats.generation_tokens,
                prefill_tokens=stats.prefill_tokens,
                steps=stats.steps,
                step_seconds=step_seconds,
                num_preemptions=stats.num_preemptions,
                blocks_moved=stats.blocks_moved,
                host_blocks_spilled=stats.host_blocks_spilled,
                host_blocks_restored=stats.host_blocks_restored,
                prefix_cache_host_hits=stats.prefix_cache_host_hits,
                prefix_cache_queries=stats.prefix_cache_queries,
                prefix_cache_hits=stats.prefix_cache_hits,
                mode_counts=stats.mode_counts,
                comm_bytes={scheme: n for scheme, (n, _) in sent.items()},
                comm_exchanges={scheme: n for scheme, (_, n) in sent.items()},
            ),
        )


def _held(running: Sequence[Request], stride: int) -> Iterator[tuple[int, Sequence[Home]]]:
    """Some blocks of every running request, by what they show. Slices of lists are cheap."""
    for place, request in enumerate(running):
        listed = place < MAX_RUNNING
        if request.table is not None:
            yield place if listed else OTHER, request.table.homes[::stride]
        for rank, blocks in request.reserved.items():
            what = place + RESERVED if listed else OTHER
            yield what, [(rank, block) for block in islice(blocks, 0, MAX_BLOCKS, stride)]


def _steps_of(items: StepItems) -> dict[int, tuple[str, str, tuple[int, ...]]]:
    """(mode, ring pass, ranks that compute) of each request in a step."""
    chunks, every = items
    found = {c.request: (c.mode, c.ring_pass, tuple(r for r, _ in c.owners)) for c in chunks}
    for decodes in every:
        for number in decodes.requests:
            found[number] = decodes.mode, decodes.ring_pass, ()
    return found
