"""The one mind: which requests run in the next step, and where every token goes. No torch.

First come first served within a priority. Each step carries a token of every request that streams
and, in what the budget of each rank leaves, the next chunks of prompts. It never waits for a
token's value: a draw that is under way counts as a token, so the next step can be planned while one
runs. When no rank has a block left, the youngest request of the lowest priority gives its blocks
back and is computed again later, with the same tokens.
"""

from __future__ import annotations

import time
from bisect import insort
from collections.abc import Sequence

from ds_cp.errors import QueueFullError
from ds_cp.kv.table import Home, SequenceTable
from ds_cp.plan import Begin, Chunk, Decodes, Fork, Sampling, StepPlan, Transfer
from ds_cp.sampling_params import RequestOptions, SamplingParams
from ds_cp.scheduler.admission import Limits, check_request
from ds_cp.scheduler.block_manager import BlockManager
from ds_cp.scheduler.chunking import cut_chunk
from ds_cp.scheduler.migration import Migration
from ds_cp.scheduler.mode_policy import ModePolicy, Seats
from ds_cp.scheduler.pacing import LEAST_CHUNK, ChunkPacer
from ds_cp.scheduler.queue import WaitingQueue
from ds_cp.scheduler.request import Request

DECODE_LOAD = 64  # a stream weighs on its rank like so many prompt tokens
PROMPT_SHARE = 0.25  # of the budget that streams leave to prompts that wait for it
SCORED_TOKENS = 256  # prompt tokens of one step whose logits are all wanted


class _Draft:
    """The plan in the making."""

    def __init__(self, budget: Sequence[int]) -> None:
        self.left = list(budget)  # tokens that each rank may still compute
        self.work = [0.0] * len(budget)  # on prompts, of each rank
        self.allowance = 0.0  # what that may become
        self.transfers: list[Transfer] = []
        self.begins: list[Begin] = []
        self.grown: list[tuple[int, Home]] = []
        self.chunks: list[Chunk] = []
        self.decodes: dict[tuple[str, str], list[int]] = {}
        self.forks: list[Fork] = []


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
        *,
        prefix_caching: bool = True,
        pacer: ChunkPacer | None = None,
        seats: Seats | None = None,
    ) -> None:
        self.limits = limits
        self.waiting = WaitingQueue()
        self.running: list[Request] = []  # in the order of service
        self.num_preemptions = 0
        self.block_manager = BlockManager(
            blocks_per_rank, block_size, placement, ring_order, policy, prefix_caching, seats
        )
        self.allocator = self.block_manager.allocator
        self.migration = Migration(self.block_manager)
        self._layout = layout
        self._policy = policy
        self._pacer = pacer
        self._ranks = len(blocks_per_rank)
        self._numbers = 0
        self._steps = 0
        self._ended: list[int] = []  # requests that the ranks should forget
        self._looking_back: dict[int, Request] = {}  # whose draws depend on earlier tokens
        self._in_flight: dict[int, tuple[int, float]] = {}  # step -> streams, work on prompts

    # --- requests come and go

    @property
    def largest_tokens(self) -> int:
        """The most KV one request can have here: all ranks, or the largest one if mode is local."""
        return self.block_manager.largest_tokens

    def admit(
        self,
        request_id: str,
        prompt: Sequence[int],
        params: SamplingParams,
        seed: int,
        options: RequestOptions | None = None,
    ) -> Request:
        """Queue a request, or refuse it at once: as ``check`` does, or with ``QueueFullError``.

        With ``params.n`` above 1 its ``siblings`` answer the same prompt with the seeds that
        follow.
        """
        max_tokens = self.check(prompt, params)
        if len(self.waiting) >= self.limits.max_queue:
            raise QueueFullError(
                f"{len(self.waiting)} requests are waiting, the limit of scheduler.max_queue; "
                "try later"
            )
        options = options or RequestOptions()
        answers = []
        for index in range(params.n):
            self._numbers += 1
            answers.append(Request(
                self._numbers, request_id, tuple(prompt), params, max_tokens,
                (seed + index + 2**63) % 2**64 - 2**63, options.priority, options.cache_salt, index,
            ))  # fmt: skip
        first, first.siblings = answers[0], answers[1:]
        self.waiting.push(first)
        return first

    def check(self, prompt: Sequence[int], params: SamplingParams) -> int:
        """The request's ``max_tokens``, resolved, if it can ever be served here; see
        ``check_request`` for what it raises."""
        return check_request(self.limits, self.block_manager, prompt, params)

    def finish(self, request: Request, reason: str, stop_reason: int | str | None = None) -> None:
        """End a request in whatever state and free its blocks."""
        if request.finish_reason is not None:
            return
        if request.table is not None:
            self._stop(request, keep=reason != "error")
            for sibling in request.siblings:  # they go on without it, as requests of their own
                if sibling.finish_reason is None:
                    self.waiting.push(sibling)
        elif request in self.waiting:
            self.waiting.remove(request)
            heirs = [r for r in request.siblings if r.finish_reason is None]
            if heirs:
                heirs[0].siblings = heirs[1:]
                self.waiting.push(heirs[0])
        request.siblings = []
        self._looking_back.pop(request.number, None)
        request.finish_reason, request.stop_reason = reason, stop_reason
        request.finished_time = time.time()

    @property
    def has_work(self) -> bool:
        return bool(self.running or len(self.waiting))

    @property
    def num_in_flight(self) -> int:
        """Steps that were planned and are not known to have ended."""
        return len(self._in_flight)

    def drain(self, rank: int) -> None:
        """Empty ``rank`` while requests go on, and place nothing there; see ``Migration.drain``."""
        self.migration.drain(rank, [*self.running, *self.waiting])

    def is_drained(self, rank: int) -> bool:
        """Whether ``rank`` is closed and holds nothing any more."""
        return rank in self.block_manager.closed and not self.allocator.num_used(rank)

    def reopen(self, rank: int) -> None:
        """Let a drained rank take KV again."""
        self.migration.reopen(rank)

    def rebalance(self) -> int:
        """Move blocks from full ranks to empty ones in the next steps; returns how many."""
        return self.migration.rebalance(self.running)

    # --- one step

    def schedule(self) -> StepPlan | None:
        """The next step, or None when nothing can run (before the steps in flight are known)."""
        draft = _Draft([self.limits.max_num_batched_tokens] * self._ranks)
        before = self.num_preemptions
        self.block_manager.begin_step()
        if self.migration.is_moving:
            self._move(draft)
        self._decode(draft)
        streams = sum(map(len, draft.decodes.values()))
        if self._pacer is not None:
            draft.allowance = self._pacer.allowance(streams)
            if not draft.allowance:
                draft.left = [0] * self._ranks
        may_start = self.num_preemptions == before  # who just gave way must not take blocks back
        for request in [r for r in self.running if r.prefilling]:
            if may_start:
                self._admit_waiting(draft, request.priority)
            self._prefill(request, draft)
        if may_start:
            self._admit_waiting(draft)
        if not (draft.decodes or draft.chunks or draft.transfers or draft.begins):
            return None
        self._steps += 1
        self._in_flight[self._steps] = streams, max(draft.work)
        if self._pacer is not None:
            self._pacer.plan(streams, max(draft.work))
        plan = StepPlan(
            self._steps, tuple(self._ended), self._news(), tuple(draft.transfers),
            tuple(draft.begins), tuple(draft.grown), tuple(draft.chunks),
            tuple(Decodes(*key, tuple(numbers)) for key, numbers in draft.decodes.items()),
            tuple(draft.forks),
        )  # fmt: skip
        self._ended = []
        return plan

    def observe_step(self, step: int, seconds: float) -> None:
        """How long a step took, from which the next chunks are sized."""
        streams, work = self._in_flight.pop(step, (0, 0.0))
        if self._pacer is not None:
            self._pacer.note(seconds, streams, work)

    def record_token(self, request: Request, token: int) -> str | None:
        """Note a drawn token; returns the reason when it ends the request (stop strings apart)."""
        request.in_flight -= 1
        request.output.append(token)
        request.tokens.append(token)
        params, length = request.params, len(request.output)
        if length == 1:
            request.first_token_time = time.time()
        if request.table is not None and len(request.tokens) % self.allocator.block_size <= 1:
            self.block_manager.name_blocks(request)
        if length >= params.min_tokens:
            if params.stop_token_ids and token in params.stop_token_ids:
                self.finish(request, "stop", token)
            elif token in self.limits.eos_token_ids and not params.ignore_eos:
                self.finish(request, "stop")
        if length >= request.max_tokens:
            self.finish(request, "length")
        return request.finish_reason

    # --- streams

    def _decode(self, draft: _Draft) -> None:
        """One token of every request that streams, where its KV goes."""
        size, left, decodes = self.allocator.block_size, draft.left, draft.decodes
        for request in self._streams():
            table = request.table
            if table is None:  # gave way a moment ago
                continue
            if table.num_tokens % size == 0 or request.shares_tail:
                if not self._open_block(request, draft):
                    continue
            else:
                table.append_one()
            key = request.decode_key or self._decode_key(request)
            if key in decodes:
                decodes[key].append(request.number)
            else:
                decodes[key] = [request.number]
            left[table.homes[-1][0]] -= 1
            request.in_flight += 1

    def _streams(self) -> list[Request]:
        """Requests whose next token is due: all, or when a rank's budget is too small for them all
        beside a prompt, those who waited longest."""
        streams = [
            r for r in self.running
            if not r.prefilling and len(r.output) + r.in_flight < r.max_tokens
        ]  # fmt: skip
        budget = self.limits.max_num_batched_tokens
        prompts = len(self.running) > len(streams) or len(self.waiting) > 0
        spare = max(1, int(budget * PROMPT_SHARE)) if prompts else 0
        if len(streams) + spare <= budget:
            return streams
        left = [max(budget - spare, 1)] * self._ranks
        chosen = []
        for request in sorted(streams, key=lambda r: (r.served, r.order)):
            table = request.table
            assert table is not None
            opens = table.num_tokens % table.block_size == 0 or request.shares_tail
            ranks = range(self._ranks) if opens else (table.last_rank,)  # it may land on any
            if all(left[rank] > 0 for rank in ranks):
                for rank in ranks:
                    left[rank] -= 1
                request.served = self._steps + 1
                chosen.append(request)
        return sorted(chosen, key=lambda r: r.order)

    def _open_block(self, request: Request, draft: _Draft) -> bool:
        """A block to write the next token to: a new one, or a copy of one that others share. False
        when the request had to give way."""
        table = request.table
        assert table is not None
        if table.num_tokens % table.block_size:
            if self.allocator.references(table.homes[-1]) > 1:
                return self._copy_tail(request, draft)
            request.shares_tail = False
            table.append((), 1)
            return True
        request.shares_tail = False
        while (home := self.block_manager.grow(request)) is None:
            if self._give_way(request) is request:
                return False
        width = table.width
        table.append((home,), 1)
        if table.width != width:
            request.decode_key = None
        draft.grown.append((request.number, home))
        return True

    def _copy_tail(self, request: Request, draft: _Draft) -> bool:
        """Copy on write: the last block becomes the request's own."""
        table = request.table
        assert table is not None
        source = table.homes[-1]
        while (home := self._copy_home(source)) is None:
            if self._give_way(request) is request:
                return False
            if self.allocator.references(source) == 1:
                break  # the others gave way: it is its own now
        if home is not None:
            index = len(table.homes) - 1
            draft.transfers.append(Transfer((request.number,), index, source, home))
            self.allocator.release([source])
            table.replace(index, home)
            request.decode_key = None
        request.shares_tail = False
        table.append((), 1)
        return True

    def _copy_home(self, source: Home) -> Home | None:
        """A block for a copy: on the same rank, or unless all must be local on any other."""
        near = [source[0]]
        if not self.block_manager.only_local:
            near += [rank for rank in range(self._ranks) if rank != source[0]]
        return self.block_manager.block_on(near, source)

    def _decode_key(self, request: Request) -> tuple[str, str]:
        assert request.table is not None
        key = self._policy.choose(request.table.width, 1, request.table.num_tokens - 1)
        if key[0] not in request.modes:
            request.modes.append(key[0])
        request.decode_key = key
        return key

    # --- prompts

    def _prefill(self, request: Request, draft: _Draft) -> None:
        """The next chunk of a prompt, in what the budgets and the time leave."""
        past = request.num_computed
        most = self._most_tokens(request, past, draft)
        cut = cut_chunk(request, draft.left, self._layout, self._policy, most)
        if cut is None:
            return
        draft.chunks.append(cut.chunk)
        for rank, count in enumerate(cut.owned):
            draft.left[rank] -= count
            if self._pacer is not None and count:
                draft.work[rank] += self._pacer.work(count, sum(cut.owned), past)
                if draft.work[rank] + 1.0 > draft.allowance:
                    draft.left[rank] = 0
        if cut.chunk.mode not in request.modes:
            request.modes.append(cut.chunk.mode)
        self.block_manager.name_blocks(request)
        if cut.chunk.samples:
            request.prefilling = False
            request.decode_key = None
            request.in_flight += 1
            request.served = self._steps + 1  # or newcomers would always go first
            for sibling in request.siblings:
                if sibling.finish_reason is None:
                    self._fork(request, sibling, draft)
            request.siblings = []

    def _most_tokens(self, request: Request, past: int, draft: _Draft) -> int | None:
        """A limit to the next chunk, apart from the budgets: in time, and in logits to keep."""
        scored = SCORED_TOKENS if request.params.prompt_logprobs is not None else None
        if self._pacer is None:
            return scored
        done = max(draft.work[rank] for rank in request.workers)
        most = self._pacer.tokens(draft.allowance - done, past, len(request.workers))
        if not done:
            most = max(most, LEAST_CHUNK)
        return most if scored is None else min(most, scored)

    def _fork(self, parent: Request, child: Request, draft: _Draft) -> None:
        """Another answer to the same prompt: it shares the blocks of all but the last token."""
        assert parent.table is not None
        size, known = self.allocator.block_size, len(parent.prompt) - 1
        shared = parent.table.homes[: -(-known // size)]
        for home in shared:
            self.allocator.share(home)
        child.table = SequenceTable(size, shared, known)
        child.prefilling, child.served = False, parent.served
        child.workers, child.num_keyed = parent.workers, known // size
        if parent.keys is not None:  # the same up to there, its own from there on
            child.keys = parent.keys.fork(known // size)
        child.first_scheduled_time = time.time()
        if known % size:
            parent.shares_tail = child.shares_tail = True
        insort(self.running, child, key=lambda r: r.order)
        self._track_look_back(child)
        draft.forks.append(Fork(parent.number, child.number, self._sampling(child)))

    def _admit_waiting(self, draft: _Draft, above: int | None = None) -> None:
        """Start those who wait, in order, while there are seats, blocks and budget; with ``above``
        only those whose priority comes before it."""
        seats = self.limits.max_num_seqs - len(self.running)
        seats -= sum(s.finish_reason is None for r in self.running for s in r.siblings)
        load: list[int] | None = None
        while max(draft.left) > 0 and (request := self.waiting.first()) is not None:
            if above is not None and request.priority >= above:
                return
            load = self._load() if load is None else load
            busy = len(self.running) > 0 or len(self.waiting) > 1
            if 1 + len(request.siblings) > seats or request.in_flight:
                return
            copies = self.block_manager.start(request, load, busy)
            if copies is None:
                return
            draft.transfers += copies
            assert request.table is not None
            self.waiting.remove(request)
            insort(self.running, request, key=lambda r: r.order)
            seats -= 1 + len(request.siblings)
            request.prefilling = True
            request.first_scheduled_time = request.first_scheduled_time or time.time()
            request.num_notified = len(request.output)
            self._track_look_back(request)
            draft.begins.append(Begin(
                request.number, tuple(request.tokens), len(request.prompt),
                tuple(request.table.homes), request.table.num_tokens, self._sampling(request),
            ))  # fmt: skip
            work = request.num_tokens - request.num_computed
            for rank in request.workers:
                load[rank] += DECODE_LOAD + work // len(request.workers)
            self._prefill(request, draft)

    def _load(self) -> list[int]:
        """Tokens of work that wait on each rank."""
        load = [0] * self._ranks
        for request in self.running:
            assert request.table is not None
            if request.prefilling:
                work = request.num_tokens - request.num_computed
                for rank in request.workers:
                    load[rank] += DECODE_LOAD + work // len(request.workers)
            elif request.table.homes:  # a fork of one token has none yet
                load[request.table.last_rank] += DECODE_LOAD
        return load

    def _sampling(self, request: Request) -> Sampling:
        params = request.params
        eos = () if params.ignore_eos else self.limits.eos_token_ids
        return Sampling(
            temperature=params.temperature, top_p=params.top_p, top_k=params.top_k,
            min_p=params.min_p, seed=request.seed,
            logprobs=-1 if params.logprobs is None else params.logprobs,
            prompt_logprobs=-1 if params.prompt_logprobs is None else params.prompt_logprobs,
            logit_bias=tuple(sorted(params.logit_bias.items())),
            min_tokens=params.min_tokens,
            early_banned=tuple(sorted({*eos, *params.stop_token_ids})) if params.min_tokens else (),
            presence_penalty=params.presence_penalty, frequency_penalty=params.frequency_penalty,
            repetition_penalty=params.repetition_penalty,
        )  # fmt: skip

    def _track_look_back(self, request: Request) -> None:
        params = request.params
        if (params.presence_penalty, params.frequency_penalty, params.repetition_penalty) != (
            0,
            0,
            1,
        ):
            self._looking_back[request.number] = request

    def _news(self) -> tuple[tuple[int, int, int], ...]:
        """Tokens that the ranks have to hear of."""
        news = []
        for request in self._looking_back.values():
            if request.table is not None:
                for index in range(request.num_notified, len(request.output)):
                    news.append((request.number, index, request.output[index]))
                request.num_notified = len(request.output)
        return tuple(news)

    # --- giving way, moving

    def _give_way(self, request: Request) -> Request:
        """Preempt the last in the order of service (under mode local, on the request's rank)."""
        victim = self.running[-1]
        if self.block_manager.only_local:
            assert request.table is not None
            rank = request.table.last_rank
            here = [r for r in self.running if r.table and r.table.num_blocks(rank)]
            victim = request if rank in self.block_manager.closed or not here else here[-1]
        self._preempt(victim)
        return victim

    def _preempt(self, request: Request) -> None:
        self._stop(request, keep=True)
        self.waiting.push(request)
        request.num_preemptions += 1
        self.num_preemptions += 1

    def _stop(self, request: Request, keep: bool) -> None:
        self.running.remove(request)
        self.block_manager.release(request, keep)
        self.migration.forget(request)
        request.prefilling, request.decode_key = True, None
        self._ended.append(request.number)

    def _move(self, draft: _Draft) -> None:
        """Do a few of the moves that drain or rebalance want; make room when one is stuck."""
        moves, stuck = self.migration.transfers(self.running)
        draft.transfers += moves
        if stuck and len(self.running) > 0:
            self._preempt(self.running[-1])

    def check_integrity(self) -> None:
        """Balance the books: every reference has a holder, every block one state."""
        self.block_manager.check_integrity(self.running)
        assert all(request.table is None for request in self.waiting)
        assert self.running == sorted(self.running, key=lambda r: r.order)
        assert len(set(map(id, self.running))) == len(self.running)
