"""Prompts: which waiting requests start in a step, and the next chunk of each. No torch."""

from __future__ import annotations

from bisect import insort
from collections.abc import Collection

from ds_cp.clock import steady_time
from ds_cp.kv.table import SequenceTable
from ds_cp.plan import Sampling
from ds_cp.scheduler.admission import BEGIN_BYTES, Limits
from ds_cp.scheduler.block_manager import BlockManager
from ds_cp.scheduler.chunking import cut_chunk
from ds_cp.scheduler.draft import Draft
from ds_cp.scheduler.fairness import Shares, Turns
from ds_cp.scheduler.mode_policy import ModePolicy
from ds_cp.scheduler.queue import WaitingQueue
from ds_cp.scheduler.request import Request

LEAST_TOKENS = 4  # of the first chunk of a client's in a step, where its share is less
DECODE_LOAD = 64  # prompt tokens: what one running request adds to the load of its rank


class PrefillPlanner:
    """Enters starts and chunks into a draft. ``running`` and ``waiting`` are the scheduler's own.

    ``layout``: how a chunk's tokens are dealt out to ranks, as in ``ds_cp.layout.assign``;
    ``turns``: learns which requests were served; ``suspects``: requests that start in no company.
    """

    def __init__(
        self,
        limits: Limits,
        blocks: BlockManager,
        policy: ModePolicy,
        layout: str,
        running: list[Request],
        waiting: WaitingQueue,
        turns: Turns,
        suspects: Collection[int] = (),
    ) -> None:
        self._limits = limits
        self._blocks = blocks
        self._allocator = blocks.allocator
        self._policy = policy
        self._layout = layout
        self._running = running
        self._waiting = waiting
        self._turns = turns
        self._suspects = suspects
        self._shares: tuple[Shares, Shares] | None = None  # of this step's tokens, and of its work

    def add(self, draft: Draft, may_start: bool) -> None:
        """The next chunks of running prompts, in order, and with ``may_start`` the first chunks of
        waiting requests: each before the running prompts of a later priority. Clients of the first
        priority share the step."""
        prompts = [r for r in self._running if r.prefilling]
        self._shares = self._share(draft, prompts, may_start)
        for request in prompts:
            if may_start:
                self._start_waiting(draft, request.priority)
            self._advance(request, draft)
        if may_start:
            self._start_waiting(draft)

    def _advance(self, request: Request, draft: Draft) -> None:
        """The next chunk of a prompt, in what the budgets and the time leave, once all of its
        beginning is there."""
        if request.restoring and not self._blocks.host.bring_back(request, draft):
            return
        past = request.num_computed
        most = draft.tokens_in_time(request)
        if self._shares is not None:
            own = self._own_tokens(self._shares, request, draft)
            most = own if most is None else min(most, own)
        scores = request.params.prompt_logprobs is not None
        if scores:
            most = draft.rows_left if most is None else min(most, draft.rows_left)
        cut = cut_chunk(request, draft.left, self._layout, self._policy, most, draft.pairs)
        if cut is None:
            return
        draft.chunk(cut, past)
        assert request.table is not None
        draft.writes(request.table, past)
        if self._shares is not None:
            tokens, work = self._shares
            for rank, count in enumerate(cut.owned):
                tokens.spend(request.client, rank, count)
                work.spend(request.client, rank, draft.work_of(count, sum(cut.owned), past))
        if scores:  # a row scores the token after it, so the prompt's last one has none
            end = min(request.num_computed, len(request.prompt) - 1)
            draft.rows_left -= max(end - past, 0)
        if cut.chunk.mode not in request.modes:
            request.modes.append(cut.chunk.mode)
        self._blocks.prefix.enter(request)
        if cut.chunk.samples:
            self._turns.serve(request.turn)
            request.prefilling = False
            request.decode_key = None
            request.in_flight += 1
            request.served = draft.step  # or newcomers would always go first
            for sibling in request.siblings:
                if sibling.finish_reason is None:
                    self._fork(request, sibling, draft)
            request.siblings = []

    def advance_alone(self, request: Request, draft: Draft) -> None:
        """The next chunk of a prompt in a step that nobody else shares."""
        self._shares = None
        self._advance(request, draft)

    def start_alone(self, request: Request, draft: Draft) -> None:
        """Start the first that waits, if there is room, in a step that nobody else shares."""
        self._shares = None
        if 1 + len(request.siblings) <= self._seats():
            self._start(request, draft, self._load(), busy=True)

    def _share(
        self, draft: Draft, prompts: list[Request], may_start: bool
    ) -> tuple[Shares, Shares] | None:
        """What each client may have of this step, where prompts of several want it: those that run,
        and the next to start, unless it found no room before."""
        wanted = list(prompts)
        newcomer = self._waiting.first() if may_start else None
        if newcomer is not None and newcomer.refusal is None and self._seats() > 0:
            wanted.append(newcomer)
        if len({request.client for request in wanted}) < 2:
            return None
        first = min(request.priority for request in wanted)
        tokens: dict[str, list[float]] = {}
        work: dict[str, list[float]] = {}
        for request in (r for r in wanted if r.priority == first):
            past = request.num_computed
            rest = request.num_tokens - past
            # Where a newcomer will be is not known: a part is kept for it on every rank.
            ranks = request.workers if request.table else range(len(draft.left))
            each = rest / len(request.workers) if request.table else float(rest)
            for wants, amount in ((tokens, each), (work, draft.work_of(each, rest, past))):
                mine = wants.setdefault(request.client, [0.0] * len(draft.left))
                for rank in ranks:
                    mine[rank] += amount
        return Shares([float(n) for n in draft.left], tokens), Shares(draft.work_left(), work)

    def _own_tokens(self, shares: tuple[Shares, Shares], request: Request, draft: Draft) -> int:
        """How many tokens of ``request`` its client's shares leave."""
        tokens, work = shares
        client, ranks = request.client, request.workers
        least = LEAST_TOKENS if tokens.is_fresh(client) else 0
        left = work.most(client, ranks)
        if left == float("inf"):
            return request.num_tokens
        in_tokens = int(tokens.most(client, ranks) * len(ranks))
        return max(least, min(in_tokens, draft.tokens_of(left, request.num_computed, len(ranks))))

    def _seats(self) -> int:
        """Requests that may still start."""
        seats = self._limits.max_num_seqs - len(self._running)
        return seats - sum(s.finish_reason is None for r in self._running for s in r.siblings)

    def _fork(self, parent: Request, child: Request, draft: Draft) -> None:
        """Another answer to the same prompt: it shares the blocks of all but the last token."""
        assert parent.table is not None
        size, known = self._allocator.block_size, len(parent.prompt) - 1
        shared = parent.table.homes[: -(-known // size)]
        for home in shared:
            self._allocator.share(home)
        child.table = SequenceTable(size, shared, known)
        child.prefilling, child.served = False, parent.served
        child.workers, child.num_keyed = parent.workers, known // size
        child.why_span = parent.why_span
        if parent.keys is not None:  # the same up to there, its own from there on
            child.keys = parent.keys.fork(known // size)
        child.first_scheduled_time = steady_time()
        if known % size:
            parent.shares_tail = child.shares_tail = True
        insort(self._running, child, key=lambda r: r.order)
        draft.fork(parent, child, self.sampling(child))

    def _start_waiting(self, draft: Draft, above: int | None = None) -> None:
        """Start waiting requests, in order, while there are seats, blocks and budget; with
        ``above`` only those of an earlier priority."""
        seats = self._seats()
        load: list[int] | None = None
        while max(draft.left) > 0 and (request := self._waiting.first()) is not None:
            if above is not None and request.priority >= above or request.number in self._suspects:
                return
            load = self._load() if load is None else load
            # Decodes want every rank a moment each step, and the pacer sees to them. A prompt that
            # spans takes of each rank what they leave; on one rank the others would idle meanwhile.
            prompts = draft.has_prompts or any(r.prefilling for r in self._running)
            busy = len(self._waiting) > 1 or prompts
            need = 1 + len(request.siblings)  # these may start, and leave it, as it does
            if need > seats or request.in_flight:
                return
            if not self._start(request, draft, load, busy):
                return
            seats -= need

    def _start(self, request: Request, draft: Draft, load: list[int], busy: bool) -> bool:
        """Its first chunk; False when there is no room for it, or none in the plan."""
        size = self._limits.begin_bytes(
            request.num_tokens, self._allocator.block_size, request.params
        )
        if draft.begin_bytes and draft.begin_bytes + size > BEGIN_BYTES:
            return False
        copies = self._blocks.start(request, load, busy)
        if copies is None:
            return False
        draft.begin_bytes += size
        draft.transfers += copies
        self._waiting.remove(request)
        insort(self._running, request, key=lambda r: r.order)
        request.prefilling = True
        request.first_scheduled_time = request.first_scheduled_time or steady_time()
        request.num_notified = len(request.output)
        draft.begin(request, self.sampling(request))
        self._add_load(request, load)
        self._advance(request, draft)
        return True

    def _load(self) -> list[int]:
        """The work that waits on each rank, in prompt tokens."""
        load = [0] * self._blocks.num_ranks
        for request in self._running:
            assert request.table is not None
            if request.prefilling:
                self._add_load(request, load)
            elif request.table.homes:  # a fork of one token has none yet
                load[request.table.last_rank] += DECODE_LOAD
        return load

    @staticmethod
    def _add_load(request: Request, load: list[int]) -> None:
        """Add the work of a prompt to the ranks that compute it."""
        work = request.num_tokens - request.num_computed
        for rank in request.workers:
            load[rank] += DECODE_LOAD + work // len(request.workers)

    def sampling(self, request: Request) -> Sampling:
        """How the ranks choose its tokens. End tokens are banned early also under ``ignore_eos``,
        as in vLLM and transformers."""
        params = request.params
        ends = {*self._limits.eos_token_ids, *params.stop_token_ids}
        return Sampling(
            temperature=params.temperature, top_p=params.top_p, top_k=params.top_k,
            min_p=params.min_p, seed=request.seed,
            logprobs=-1 if params.logprobs is None else params.logprobs,
            prompt_logprobs=-1 if params.prompt_logprobs is None else params.prompt_logprobs,
            logit_bias=tuple(sorted(params.logit_bias.items())),
            min_tokens=params.min_tokens,
            early_banned=tuple(sorted(ends)) if params.min_tokens else (),
            presence_penalty=params.presence_penalty, frequency_penalty=params.frequency_penalty,
            repetition_penalty=params.repetition_penalty,
            grammar=request.grammar, ends=tuple(sorted(ends)) if request.grammar else (),
        )  # fmt: skip
