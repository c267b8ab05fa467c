"""One token of every decoding request: which of them run in a step, and where their KV goes. No
torch."""

from __future__ import annotations

from collections.abc import Callable

from ds_cp.layout import Home
from ds_cp.scheduler.admission import Limits
from ds_cp.scheduler.block_manager import BlockManager
from ds_cp.scheduler.draft import Draft
from ds_cp.scheduler.mode_policy import ModePolicy
from ds_cp.scheduler.queue import WaitingQueue
from ds_cp.scheduler.reasons import SpanReason
from ds_cp.scheduler.request import Request

PROMPT_SHARE = 0.25  # share of a rank's token budget kept for prompts when decodes would fill it


class DecodePlanner:
    """Enters decodes into a draft. ``running`` and ``waiting`` are the scheduler's own.

    ``preempt_for(request)``: makes room for a block that ``request`` needs by preempting a running
    request, and returns that one, which may be ``request`` itself.
    """

    def __init__(
        self,
        limits: Limits,
        blocks: BlockManager,
        policy: ModePolicy,
        running: list[Request],
        waiting: WaitingQueue,
        preempt_for: Callable[[Request], Request],
    ) -> None:
        self._limits = limits
        self._blocks = blocks
        self._allocator = blocks.allocator
        self._policy = policy
        self._running = running
        self._waiting = waiting
        self._preempt_for = preempt_for

    def add(self, draft: Draft, only: Request | None = None) -> None:
        """One token of every request that is due, or of those whose turn it is; or ``only`` of
        one."""
        size, left, decodes = self._allocator.block_size, draft.left, draft.decodes
        written = draft.written
        for request in self._due(draft.step):
            if only is not None and request is not only:
                continue
            table = request.table
            if table is None:  # preempted a moment ago, for an older one
                continue
            if table.num_tokens % size == 0 or request.shares_tail:
                if not self._open_block(request, draft):
                    continue
            else:
                table.append_one()
            key = request.decode_key or self._choose_mode(request)
            if key in decodes:
                decodes[key].append(request.number)
            else:
                decodes[key] = [request.number]
            home = table.homes[-1]
            written.append((home, (table.num_tokens - 1) % size))
            left[home[0]] -= 1
            request.in_flight += 1
            draft.reached[request.number] = table.num_tokens

    def _due(self, step: int) -> list[Request]:
        """Requests whose next token is due: all of them, or when a rank's budget is too small for
        all beside a prompt, those that waited longest."""
        due = [
            r for r in self._running
            if not r.prefilling and len(r.output) + r.in_flight < r.max_tokens
        ]  # fmt: skip
        budget = self._limits.max_num_batched_tokens
        prompts = len(self._running) > len(due) or len(self._waiting) > 0
        spare = max(1, int(budget * PROMPT_SHARE)) if prompts else 0
        if len(due) + spare <= budget:
            return due
        left = [max(budget - spare, 1)] * self._blocks.num_ranks
        chosen = []
        for request in sorted(due, key=lambda r: (r.served, r.order)):
            table = request.table
            assert table is not None
            opens = table.num_tokens % table.block_size == 0 or request.shares_tail
            ranks = range(len(left)) if opens else (table.last_rank,)  # it may land on any
            if all(left[rank] > 0 for rank in ranks):
                for rank in ranks:
                    left[rank] -= 1
                request.served = step
                chosen.append(request)
        return sorted(chosen, key=lambda r: r.order)

    def _open_block(self, request: Request, draft: Draft) -> bool:
        """Give the next token a block to be written to: a new one, or a copy of one that others
        share. False when ``request`` was preempted instead."""
        table = request.table
        assert table is not None
        if table.num_tokens % table.block_size:
            if self._allocator.references(table.homes[-1]) > 1:
                return self._copy_tail(request, draft)
            request.shares_tail = False
            table.append((), 1)
            return True
        request.shares_tail = False
        while (home := self._blocks.grow(request)) is None:
            if self._preempt_for(request) is request:
                return False
        width = table.width
        table.append((home,), 1)
        if table.width != width:
            request.decode_key = None
            if width:
                request.why_span = SpanReason.GREW
        draft.grown.append((request.number, home))
        return True

    def _copy_tail(self, request: Request, draft: Draft) -> bool:
        """Copy on write: the last block becomes the request's own. False when ``request`` was
        preempted instead."""
        table = request.table
        assert table is not None
        source = table.homes[-1]
        while (home := self._home_of_copy(source)) is None:
            if self._preempt_for(request) is request:
                return False
            if self._allocator.references(source) == 1:
                break  # its other holders were preempted: it is the request's own now
        if home is not None:
            index = len(table.homes) - 1
            draft.transfers += self._blocks.host.copies((request.number,), index, source, home)
            self._allocator.release([source])
            table.replace(index, home)
            request.decode_key = None
        request.shares_tail = False
        table.append((), 1)
        return True

    def _home_of_copy(self, source: Home) -> Home | None:
        """A block for a copy: on the same rank, or unless all must be local on any other."""
        ranks = [source[0]]
        if not self._blocks.only_local:
            ranks += [rank for rank in range(self._blocks.num_ranks) if rank != source[0]]
        return self._blocks.block_on(ranks, source)

    def _choose_mode(self, request: Request) -> tuple[str, str]:
        """Mode and ring pass of its decodes, remembered until its span changes."""
        assert request.table is not None
        choice = self._policy.decide(request.table.width, 1, request.table.num_tokens - 1)
        key, request.why_mode = choice.key, choice.why
        if key[0] not in request.modes:
            request.modes.append(key[0])
        request.decode_key = key
        return key
