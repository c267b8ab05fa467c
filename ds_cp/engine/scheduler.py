"""The one mind: which requests run in the next step, and where every token goes. No torch.

First come first served. Each step carries one token of every running request and, within the token
budget, the next chunk of prompts. A prompt's blocks are taken when it is admitted; an output
token's when it is due. When no rank has one left, the youngest request gives its blocks back and is
computed again later, with the same tokens.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from ds_cp.engine.params import SamplingParams
from ds_cp.engine.plan import Item, Sampling, Shard, StepPlan
from ds_cp.engine.policy import ModePolicy
from ds_cp.engine.request import Request
from ds_cp.errors import CapacityError, QueueFullError, RequestError
from ds_cp.kv.blocks import BlockAllocator
from ds_cp.kv.placement import largest_request, place
from ds_cp.kv.table import SequenceTable, new_blocks_needed
from ds_cp.layout import Runs, assign, contiguous, join, split_capped, split_even, total

LEVEL = 1.1  # homes this close to equal shares also own their tokens, so that no KV has to travel
MIN_SHARE = 16  # new tokens per rank below which spreading the work is not worth moving KV


@dataclass(frozen=True)
class Limits:
    """``max_model_len`` and ``max_num_batched_tokens`` in tokens (the latter per step, all
    ranks)."""

    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_queue: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]


class Scheduler:
    """Requests in, plans out, tokens in."""

    def __init__(
        self,
        limits: Limits,
        blocks_per_rank: Sequence[int],
        block_size: int,
        placement: str,
        layout: str,
        policy: ModePolicy,
        ring_order: Sequence[int],
    ) -> None:
        self.limits = limits
        self.allocator = BlockAllocator(blocks_per_rank, block_size)
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.num_preemptions = 0
        self._placement = placement
        self._layout = layout
        self._policy = policy
        self._order = tuple(ring_order)
        self._ranks = len(blocks_per_rank)
        self._numbers = 0
        self._steps = 0

    # --- requests come and go

    @property
    def largest_tokens(self) -> int:
        """The most KV one request can have here: all ranks, or the largest one if mode is local."""
        blocks = self.allocator.blocks_per_rank
        if self._policy.mode == "local":
            blocks = (max(blocks),)
        return largest_request(blocks, self.allocator.block_size)

    def admit(
        self, request_id: str, prompt: Sequence[int], params: SamplingParams, seed: int
    ) -> Request:
        """Queue a request, or refuse it at once: as ``check`` does, or with ``QueueFullError``."""
        max_tokens = self.check(prompt, params)
        if len(self.waiting) >= self.limits.max_queue:
            raise QueueFullError(
                f"{len(self.waiting)} requests are waiting, the limit of scheduler.max_queue; "
                "try later"
            )
        self._numbers += 1
        request = Request(self._numbers, request_id, tuple(prompt), params, max_tokens, seed)
        self.waiting.append(request)
        return request

    def check(self, prompt: Sequence[int], params: SamplingParams) -> int:
        """The request's ``max_tokens``, resolved, if it can ever be served here.

        The last token drawn needs no KV, so ``prompt + max_tokens - 1`` is what must fit. Raises
        ``RequestError``, or ``CapacityError`` with the numbers.
        """
        length, largest = len(prompt), self.largest_tokens
        if not length:
            raise RequestError("the prompt is empty; give at least one token", "prompt")
        if min(prompt) < 0 or max(prompt) >= self.limits.vocab_size:
            raise RequestError(
                "the prompt has a token id outside the vocabulary, 0 to "
                f"{self.limits.vocab_size - 1}",
                "prompt",
            )
        want = params.max_tokens if params.max_tokens is not None else 1
        model_len = self.limits.max_model_len
        need = length + want - 1
        if need > largest:
            local, have = self._policy.mode == "local", self.allocator.capacity_tokens
            why = " (mode local: one rank's)" if local else ""
            more = "use another mode" if local else "add ranks"
            raise CapacityError(
                f"the request needs KV for {need} tokens ({length} prompt + {want} new - 1), "
                f"but all ranks together hold {have}: the largest possible request here has "
                f"{largest} tokens{why}; shorten it, raise kv_cache, or {more}",
                need=need, have=have, largest=largest,
            )  # fmt: skip
        if length + want > model_len:
            raise RequestError(
                f"the request has {length} prompt + {want} new tokens, above the model's length "
                f"{model_len}; shorten it or lower max_tokens", "prompt" if length >= model_len
                else "max_tokens",
            )  # fmt: skip
        for token in (*params.stop_token_ids, *params.logit_bias):
            if token >= self.limits.vocab_size:
                raise RequestError(
                    f"token id {token} is outside the vocabulary, 0 to "
                    f"{self.limits.vocab_size - 1}",
                    "logit_bias" if token in params.logit_bias else "stop_token_ids",
                )
        return min(model_len - length, largest - length + 1) if params.max_tokens is None else want

    def finish(self, request: Request, reason: str, stop_reason: int | str | None = None) -> None:
        """End a request in whatever state and free its blocks."""
        if request.finish_reason is not None:
            return
        if request in self.running:
            self.running.remove(request)
            self._release(request)
        else:
            self.waiting.remove(request)
        request.finish_reason, request.stop_reason = reason, stop_reason
        request.finished_time = time.time()

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.waiting)

    # --- one step

    def schedule(self) -> StepPlan | None:
        """The next step, or None when nothing can run."""
        preempted_before = self.num_preemptions
        items: list[Item] = []
        for request in [r for r in self.running if not r.is_prefilling]:
            item = self._decode(request) if request.table is not None else None
            if item is not None:
                items.append(item)
        decoding = {item.request for item in items}
        budget = self.limits.max_num_batched_tokens - len(items)
        for request in self.running:
            if budget > 0 and request.number not in decoding:
                items.append(self._prefill(request, budget))
                budget -= len(items[-1].tokens)
        # Who just gave way must not take the freed blocks back in the same step.
        may_start = self.num_preemptions == preempted_before
        while may_start and budget > 0 and self.waiting:
            if len(self.running) >= self.limits.max_num_seqs or not self._start(self.waiting[0]):
                break
            request = self.waiting.popleft()
            self.running.append(request)
            items.append(self._prefill(request, budget))
            budget -= len(items[-1].tokens)
        if not items:
            return None
        self._steps += 1
        return StepPlan(self._steps, "run", tuple(items))

    def took(self, request: Request, token: int) -> str | None:
        """Note a sampled token; returns the reason when it ends the request (stop strings
        apart)."""
        now = time.time()
        request.first_token_time = request.first_token_time or now
        request.output.append(token)
        params, length = request.params, len(request.output)
        if length >= params.min_tokens:
            if token in params.stop_token_ids:
                self.finish(request, "stop", token)
            elif token in self.limits.eos_token_ids and not params.ignore_eos:
                self.finish(request, "stop")
        if request.finish_reason is None and length >= request.max_tokens:
            self.finish(request, "length")
        return request.finish_reason

    # --- placing

    def _start(self, request: Request) -> bool:
        """Take blocks for every token the request has; False when there is no room now."""
        tokens = request.num_tokens
        free = [self.allocator.num_free(r) for r in range(self._ranks)]
        size = self.allocator.block_size
        counts: tuple[int, ...] | None = None
        if self._policy.may_be_local(len(request.prompt)):
            roomy = max(self._order, key=lambda r: free[r])
            if free[roomy] * size >= tokens:
                counts = tuple(tokens if r == roomy else 0 for r in range(self._ranks))
        if counts is None and self._policy.mode != "local":
            counts = place(
                self._placement, tokens, open_slots=[0] * self._ranks, free_blocks=free,
                block_size=size, last_rank=-1, order=self._order,
            )  # fmt: skip
        if counts is None:
            return False
        request.table = SequenceTable(size, self._ranks)
        request.homes = list(counts)
        request.spare = {
            r: list(self.allocator.allocate(r, -(-n // size))) for r, n in enumerate(counts) if n
        }
        request.first_scheduled_time = request.first_scheduled_time or time.time()
        return True

    def _prefill(self, request: Request, budget: int) -> Item:
        """The next chunk: homes by placement, owners so that the work is level."""
        table = request.table
        assert table is not None
        start = table.num_tokens
        new = min(budget, request.num_tokens - start)
        homes = split_capped(new, request.homes, request.homes)
        owners = self._owners(new, homes, self._spreads(request))
        unit = self.allocator.block_size if new >= 2 * self._ranks * table.block_size else 1
        q_runs = assign(self._layout, start, owners, unit)
        home_runs = q_runs if owners == homes else contiguous(start, homes)
        for rank, count in enumerate(homes):
            if count:
                request.homes[rank] -= count
                take = new_blocks_needed(table, rank, count)
                blocks, request.spare[rank] = request.spare[rank][:take], request.spare[rank][take:]
                table.append(rank, home_runs[rank], blocks)
        return self._item(request, start, q_runs, homes)

    def _owners(self, new: int, homes: list[int], spread: bool) -> list[int]:
        """Tokens each rank computes. Nothing to spread: the homes; level homes: the same; else
        equal shares, and KV travels to its home once."""
        fair = new / self._ranks
        if not spread or max(homes) <= LEVEL * fair or fair < MIN_SHARE:
            return homes
        return split_even(new, self._ranks)

    def _spreads(self, request: Request) -> bool:
        """Whether a prompt's work is for all ranks: it has several homes, or must not be local."""
        table = request.table
        assert table is not None
        homes = {r for r, n in enumerate(request.homes) if n} | set(table.span)
        return len(homes) > 1 or not self._policy.may_be_local(len(request.prompt))

    def _decode(self, request: Request) -> Item | None:
        """One more token on the rank that placement says; None when the request had to give way."""
        table = request.table
        assert table is not None
        while (rank := self._next_home(table)) is None:
            victim = self._victim(table)
            self._preempt(victim)
            if victim is request:
                return None
        start = table.num_tokens
        needs = new_blocks_needed(table, rank, 1)
        held = table.blocks(rank)
        blocks = self.allocator.allocate(rank, needs, held[-1] if held else None) if needs else ()
        runs: Runs = ((start, 1),)
        table.append(rank, runs, blocks)
        counts = [int(r == rank) for r in range(self._ranks)]
        return self._item(
            request, start, tuple(runs if r == rank else () for r in range(self._ranks)), counts
        )

    def _next_home(self, table: SequenceTable) -> int | None:
        """Where the next token's KV goes: on in the same block; a local request stays while its
        rank has a free block; then placement decides, and the request spans from there on, in
        place."""
        last = table.last_rank
        if table.open_slots(last):
            return last
        local = table.span == (last,) and self._policy.mode in ("auto", "local")
        if local and self.allocator.num_free(last):
            return last
        if self._policy.mode == "local":
            return None
        counts = place(
            self._placement, 1,
            open_slots=[table.open_slots(r) for r in range(self._ranks)],
            free_blocks=[self.allocator.num_free(r) for r in range(self._ranks)],
            block_size=table.block_size, last_rank=last, order=self._order,
        )  # fmt: skip
        return None if counts is None else counts.index(1)

    def _item(
        self, request: Request, start: int, q_runs: Sequence[Runs], homes: Sequence[int]
    ) -> Item:
        table = request.table
        assert table is not None
        new = sum(homes)
        shards = tuple(
            Shard(r, join(q_runs[r]), table.runs(r), table.extents(r), homes[r])
            for r in range(self._ranks)
            if total(q_runs[r]) or table.stored(r)
        )
        mode, ring_pass = self._policy.choose(len(shards), new, start)
        if mode not in request.modes:
            request.modes.append(mode)
        done = table.num_tokens == request.num_tokens
        return Item(
            request.number, mode, ring_pass, start, request.slice(start, new), shards,
            self._sampling(request) if done else None,
        )  # fmt: skip

    def _sampling(self, request: Request) -> Sampling:
        params, index = request.params, len(request.output)
        banned: tuple[int, ...] = ()
        if index + 1 < params.min_tokens:
            eos = () if params.ignore_eos else self.limits.eos_token_ids
            banned = tuple(sorted({*eos, *params.stop_token_ids}))
        return Sampling(
            params.temperature, params.top_p, params.top_k, params.min_p, request.seed, index,
            -1 if params.logprobs is None else params.logprobs,
            tuple(sorted(params.logit_bias.items())), banned,
        )  # fmt: skip

    # --- giving back

    def _victim(self, table: SequenceTable) -> Request:
        """The youngest whose blocks help: anybody's, or under mode local the same rank's."""
        if self._policy.mode != "local":
            return self.running[-1]
        return next(r for r in self.running[::-1] if r.table and r.table.span == table.span)

    def _preempt(self, request: Request) -> None:
        self.running.remove(request)
        self._release(request)
        self.waiting.appendleft(request)
        request.num_preemptions += 1
        self.num_preemptions += 1

    def _release(self, request: Request) -> None:
        assert request.table is not None
        held = {r: list(blocks) for r, blocks in request.table.all_blocks().items()}
        for rank, blocks in request.spare.items():
            held.setdefault(rank, []).extend(blocks)
        self.allocator.free_all(held)
        request.table, request.spare, request.homes = None, {}, []

    def check_integrity(self) -> None:
        """Balance the books: every used block is held by exactly one running request."""
        self.allocator.check_integrity()
        for rank in range(self._ranks):
            held: list[int] = []
            for request in self.running:
                assert request.table is not None
                held += [*request.table.blocks(rank), *request.spare.get(rank, [])]
            assert len(held) == len(set(held)), f"rank {rank}: a block has two holders"
            assert len(held) == self.allocator.num_used(rank), f"rank {rank}: blocks without holder"
        assert all(request.table is None for request in self.waiting)
