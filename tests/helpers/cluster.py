"""A simulated cluster: the real engine core and scheduler, a real worker state per rank, and
memories that remember what was stored in every slot.

What KV holds is modelled as the *content* of a position: a hash of all tokens up to and including
it, for that is what KV depends on. It knows no request, so requests may share blocks, and a block
that was shared wrongly, copied too late, overwritten, lost in a move or never computed is seen by
the first request that reads it. The simulated model draws a token from the content of the last
position and the request's own random numbers, so what a request gets alone is known without any
cluster.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace

import msgspec

from ds_cp.cost import CostModel
from ds_cp.engine.core import EngineCore
from ds_cp.layout import Blocks, Home, host_slot, on_host, positions
from ds_cp.outputs import Delta
from ds_cp.plan import Outcome, Sampled, Scored, StepPlan, Transfer, decode_plan, encode_plan
from ds_cp.sampling_params import RequestOptions, SamplingParams
from ds_cp.scheduler.admission import Limits
from ds_cp.scheduler.host_moves import HostRules
from ds_cp.scheduler.mode_policy import ModePolicy, Seats
from ds_cp.scheduler.pacing import ChunkPacer
from ds_cp.scheduler.request import Request
from ds_cp.scheduler.scheduler import Scheduler
from ds_cp.worker.state import Item, RunningSequence, StepWork, WorkerState, check_item

VOCAB = 1000
EOS = 999
SEED = 11
PLACEMENTS = ("fill_then_spill", "round_robin", "balanced")
MODES = (("auto", "auto"), ("local", "auto"), ("ring", "kv"), ("ring", "q"), ("tree", "auto"))
ROOT = 0  # the content before the first position


def follow(content: int, token: int) -> int:
    """The content of a position, from that of the position before it. Hashes of integers are the
    same in every process."""
    return hash((content, token))


def contents(tokens: Sequence[int]) -> list[int]:
    """The content of every position."""
    found, content = [], ROOT
    for token in tokens:
        content = follow(content, token)
        found.append(content)
    return found


@dataclass(frozen=True)
class Model:
    """The simulated model. ``eos_every``: one draw in this many is the end token, 0 for none."""

    eos_every: int = 0

    def token(self, content: int, stream: int, index: int, looked_at: tuple, banned: tuple) -> int:
        """A draw after ``content``. ``stream``: the random stream, 0 for greedy; ``looked_at``: the
        earlier tokens that penalties count; ``banned``: what may not be drawn."""
        x = hash((content, stream, index if stream else 0, looked_at))
        while True:
            ends = self.eos_every and EOS not in banned and x % self.eos_every == 0
            token = EOS if ends else x // 64 % EOS
            if token not in banned:
                return token
            x = hash((x, token))

    def alone(
        self, prompt: Sequence[int], params: SamplingParams, seed: int, max_tokens: int
    ) -> tuple[list[int], str, int | None]:
        """What a request gets without others: (tokens, finish reason, stop reason)."""
        content = contents(prompt)[-1]
        ends = () if params.ignore_eos else (EOS,)
        banned = (EOS, *params.stop_token_ids)
        output: list[int] = []
        while True:
            early = len(output) < params.min_tokens
            token = self.token(
                content, seed if params.temperature else 0, len(output),
                (tuple(prompt), tuple(output)) if penalizes(params) else (),
                banned if early else (),
            )  # fmt: skip
            output.append(token)
            content = follow(content, token)
            if not early and token in params.stop_token_ids:
                return output, "stop", token
            if not early and token in ends:
                return output, "stop", None
            if len(output) == max_tokens:
                return output, "length", None


def penalizes(params: SamplingParams) -> bool:
    penalties = (params.presence_penalty, params.frequency_penalty, params.repetition_penalty)
    return penalties != (0.0, 0.0, 1.0)


def score(content: int, token: int) -> float:
    """The simulated log-probability of ``token`` after ``content``."""
    return -(follow(content, token) % 1000) / 100


@dataclass
class Life:
    """What the cluster itself knows of one request: every token there is, also those that rank 0
    does not know yet, and what the caller received."""

    request: Request
    tokens: list[int]
    contents: list[int]
    received: list[int] = field(default_factory=list)
    reason: str | None = None
    cached_tokens: int | None = None
    scores: tuple | None = None
    aborted: bool = False
    not_finite_at: int | None = None  # index of the output whose logits are NaN
    gap: int = 0  # steps since the last token, while it decodes
    most_decodes: int = 0  # of the steps of that gap
    started: bool = False


class SimulatedRanks:
    """The worker states of ``ranks``, kept up by plans as they arrive over the wire. For whatever
    simulates ranks: it knows no scheduler."""

    def __init__(self, ranks: Iterable[int], block_size: int) -> None:
        self.states = [WorkerState(rank, block_size) for rank in ranks]

    def apply(self, plan: StepPlan) -> list[StepWork]:
        """What the plan means for each rank."""
        received = decode_plan(encode_plan(plan))
        assert received == plan, "the wire form loses something"
        return [state.apply(received) for state in self.states]


def in_every_step(plan: StepPlan, number: int) -> bool:
    """A request that ends workers whenever it is computed; the next two, only then."""
    return True


def in_its_last_chunk(plan: StepPlan, number: int) -> bool:
    """When its prompt, or what it is computed again, is complete."""
    return any(chunk.request == number and chunk.samples for chunk in plan.chunks)


def in_its_decodes(plan: StepPlan, number: int) -> bool:
    """When it draws a token after another one."""
    return any(number in decodes.requests for decodes in plan.decodes)


class Cluster:
    """Executes plans, checking all that every plan must satisfy.

    ``depth``: how many steps are under way at most. 1: a step's tokens are known before the next
    is planned; 2: as the engine does, one step runs while the next one is planned.
    """

    def __init__(
        self,
        blocks: Sequence[int],
        block_size: int = 4,
        *,
        placement: str = "fill_then_spill",
        layout: str = "zigzag",
        mode: tuple[str, str] = ("auto", "auto"),
        local_threshold: int | None = None,
        max_model_len: int = 10_000,
        max_num_seqs: int = 16,
        budget: int = 10_000,
        max_queue: int = 1000,
        num_hosts: int = 1,
        depth: int = 1,
        eos_every: int = 0,
        cost: CostModel | None = None,
        pacer: ChunkPacer | None = None,
        seats: Seats | None = None,
        prefix_caching: bool = True,
        host: HostRules | None = None,
    ) -> None:
        self.scheduler = Scheduler(
            Limits(max_model_len, max_num_seqs, budget, max_queue, VOCAB, (EOS,)),
            blocks, block_size, placement, layout,
            ModePolicy(*mode, local_threshold, num_hosts, 4, 2, cost),
            tuple(range(len(blocks))), prefix_caching=prefix_caching, pacer=pacer,
            seats=seats, host=host,
        )  # fmt: skip
        self.core = EngineCore(self.scheduler, None)
        self.blocks = tuple(blocks)
        self.block_size = block_size
        self.mode = mode
        self.num_hosts = num_hosts
        self.cost = cost
        self.budget = budget
        self.depth = depth
        self.model = Model(eos_every)
        self.patience = (
            pacer.tuning.patience_steps if pacer is not None else 0
        )  # steps that a prompt may be held
        self.held = 0
        self.first_prompt: int | None = None  # its number
        self.ranks = SimulatedRanks(range(len(blocks)), block_size)
        self.memory: list[list[int | None]] = [[None] * (n * block_size) for n in blocks]
        slots = host.slots_per_rank if host is not None else ()
        self.host: list[list[int | None]] = [[None] * (n * block_size) for n in slots]
        self.kinds: list[str] = []  # of every copy: within the device, to the host, or back
        self.tier = self.scheduler.block_manager.host.tier
        self.lives: dict[int, Life] = {}  # by request number
        self.started: list[int] = []  # request numbers in the order of their first step
        self.items: list[dict[int, Item]] = []  # of every step, by request number
        self.owned: list[list[int]] = []  # of every step, tokens computed by each rank
        self.flying: deque[Outcome] = deque()
        self.before: deque[list[list[int | None]]] = deque()  # memories before each flying step
        self.again: set[int] = set()  # requests that ranks have forgotten, and begin again
        self.away: set[int] = set()  # ranks without which the others have met
        self.refused = 0  # answers that were ended since they did not fit on the others
        self.poison: set[int] = set()  # requests whose steps kill the worker of rank 0, where
        self.strikes: Callable[[StepPlan, int], bool] = in_every_step  # says so
        self.seconds: Callable[[StepPlan], float] = lambda plan: 0.0
        self._answers: dict[str, list[Life]] = {}
        self._asked = 0
        self._steps = 0

    # --- requests

    def ask(
        self,
        prompt: Sequence[int],
        params: SamplingParams | None = None,
        *,
        priority: int = 0,
        salt: str = "",
        client: str = "",
    ) -> list[Request]:
        """Queue a request; all its answers."""
        params = params or SamplingParams(max_tokens=3)
        if params.seed is None:
            params = replace(params, seed=SEED)
        self._asked += 1
        options = RequestOptions(priority=priority, cache_salt=salt, client=client)
        self.core.check(prompt, params)
        answers = self.core.add(f"r{self._asked}", prompt, params, options)
        for request in answers:
            self.lives[request.number] = Life(request, list(prompt), contents(prompt))
        self._answers[answers[0].request_id] = [self.lives[r.number] for r in answers]
        return answers

    def add(
        self, prompt: Sequence[int], params: SamplingParams | None = None, **options: object
    ) -> Request:
        """Queue a request; its first answer."""
        return self.ask(prompt, params, **options)[0]  # type: ignore[arg-type]

    def abort(self, request: Request) -> bool:
        """As when the caller goes away: all answers end."""
        for life in self._answers[request.request_id]:
            life.aborted = life.aborted or life.reason is None
        return self.core.abort(request.request_id)

    def abort_answer(self, request: Request) -> None:
        """End one answer of several, as a stop string or bad logits do."""
        self.lives[request.number].aborted = True
        self.scheduler.finish(request, "abort")
        self.core._forget(self.core._answers[request.number])

    def not_finite(self, request: Request, index: int) -> None:
        """Let the logits of output ``index``, not drawn yet, be no numbers."""
        life = self.lives[request.number]
        assert index >= len(life.tokens) - len(request.prompt)
        if -1 not in life.tokens:
            life.not_finite_at = index

    def used(self) -> list[int]:
        return [self.scheduler.allocator.num_used(rank) for rank in range(len(self.blocks))]

    def cached(self) -> list[int]:
        return [self.scheduler.allocator.num_cached(rank) for rank in range(len(self.blocks))]

    # --- ranks die

    def die(
        self,
        lost: Collection[int],
        is_done: Callable[[], bool],
        away: Collection[int] | None = None,
    ) -> None:
        """The workers of ``lost`` are new and empty, and all have met again, but those of ``away``,
        where that is given. Of what the steps in flight write, ``is_done`` says slot by slot
        whether it was; their tokens are lost."""
        for life in self.lives.values():
            request = life.request
            if life.reason is None and not life.aborted:
                del life.tokens[request.num_tokens :], life.contents[request.num_tokens :]
            life.gap = life.most_decodes = 0
        if self.before:
            for memory, old in zip((*self.memory, *self.host), self.before[0], strict=True):
                for slot, content in enumerate(old):
                    if memory[slot] != content and not is_done():
                        memory[slot] = content
        for rank in lost:
            self.memory[rank] = [None] * len(self.memory[rank])
            if self.host:
                self.host[rank] = [None] * len(self.host[rank])
        self.flying.clear()
        self.before.clear()
        self.ranks = SimulatedRanks(range(len(self.blocks)), self.block_size)
        self.away = self.away if away is None else set(away)
        ends, refused = self.core.recover(lost, self.away)
        for delta in ends:
            self._receive(delta)
        for request_id, err in refused:
            assert self.away and err.need > err.largest == self.scheduler.largest_tokens
            for life in self._answers[request_id]:
                life.aborted = life.aborted or life.reason is None
                self.refused += life.aborted
        self.scheduler.check_integrity()
        self.again = {request.number for request in self.scheduler.running}
        self.held, self.first_prompt = 0, None

    # --- steps

    def step(self) -> StepPlan | None:
        """Plan a step and run it; apply the oldest outcome when enough are under way, or nothing
        could be planned."""
        scheduler = self.scheduler
        queue = [r.order for r in scheduler.running]
        prompts = [r for r in scheduler.running if r.prefilling]
        due = [
            r for r in scheduler.running
            if not r.prefilling and len(r.output) + r.in_flight < r.max_tokens
        ]  # fmt: skip
        preempted = {r.number: r.num_preemptions for r in scheduler.running}
        used = self.used()
        plan = self.core.plan()
        scheduler.check_integrity()
        for rank in self.away:
            assert not self.used()[rank] and not self.cached()[rank], (
                "blocks on a rank that is away"
            )
        for rank in scheduler.block_manager.closed:
            # A request that must be local grows where it is, until there is room to move it whole.
            taken = 0
            if self.mode[0] == "local" and plan is not None:
                taken += sum(home[0] == rank for _, home in plan.grown)
                taken += sum(t.source[0] == t.target[0] == rank for t in plan.transfers)
            assert self.used()[rank] <= used[rank] + taken, "blocks were allocated on a closed rank"
        gone = [
            life.request.order for number, n in preempted.items()
            if (life := self.lives[number]).request.num_preemptions > n
        ]  # fmt: skip
        if self.mode[0] != "local":
            assert sorted(gone) == queue[len(queue) - len(gone) :], "not the last were preempted"
        for number in preempted:
            if self.lives[number].request.table is None:
                self.lives[number].gap = self.lives[number].most_decodes = 0
        if plan is not None:
            started = {begin.request for begin in plan.begins} - self.again
            self.again -= {begin.request for begin in plan.begins}
            if gone:
                assert not started, "a request started on blocks freed in the same step"
            self._check_fairness(plan, due, prompts, started)
            computed = {chunk.request for chunk in plan.chunks}
            computed = computed.union(*(decodes.requests for decodes in plan.decodes))
            if any(self.strikes(plan, number) for number in self.poison & computed):
                self._steps += 1
                self.die([0], lambda: True)
                return plan
            self.before.append([list(memory) for memory in (*self.memory, *self.host)])
            outcome = self._execute(plan)
            self.flying.append(replace_seconds(outcome, self.seconds(plan)))
        if self.flying and (plan is None or len(self.flying) >= self.depth):
            self._apply(self.flying.popleft())
            self.before.popleft()
            scheduler.check_integrity()
        return plan

    def settle(self, limit: int | None = None) -> list[StepPlan]:
        """Step until nothing is left to do; everything has been given back then."""
        if limit is None:
            limit = 100 + 10 * sum(
                len(life.tokens) + life.request.max_tokens
                for life in self.lives.values() if life.reason is None
            )  # fmt: skip
        plans: list[StepPlan] = []
        silent = 0
        while self.scheduler.has_work or self.flying:
            plan = self.step()
            # A step in which those that would have run were preempted may be empty.
            silent = 0 if plan or self.flying else silent + 1
            assert silent <= self.scheduler.limits.max_num_seqs, "work waits and nothing runs"
            if plan:
                plans.append(plan)
            assert len(plans) < limit, "it does not end"
        scheduler = self.scheduler
        assert not any(self.used()), "blocks leaked"
        assert not scheduler._in_flight and not scheduler._looking_back, "the scheduler remembers"
        assert not scheduler.migration._moving and not self.core._calls and not self.core._answers
        assert self.ranks.states[0].sequences.keys() <= set(scheduler._ended)
        return plans

    def _apply(self, outcome: Outcome) -> None:
        for delta in self.core.apply(outcome):
            self._receive(delta)

    def _receive(self, delta: Delta) -> None:
        life = self._answers[delta.request_id][delta.index]
        assert life.reason is None and not life.aborted, "a token after the end"
        life.received += delta.token_ids
        life.reason = delta.finish_reason
        if delta.cached_tokens is not None:
            assert life.cached_tokens is None and len(life.received) == 1
            life.cached_tokens, life.scores = delta.cached_tokens, delta.prompt_logprobs

    # --- what came of it

    def check_output(self, request: Request) -> None:
        """Every token, and the end, as the request alone gets them; the caller received them."""
        life = self.lives[request.number]
        want, reason, stop = self.model.alone(
            request.prompt, request.params, request.seed, request.max_tokens
        )
        if life.not_finite_at is not None and life.not_finite_at < len(want):
            want, reason, stop = want[: life.not_finite_at], "error", None
        assert request.output == want, f"request {request.number}: {request.output}, not {want}"
        assert (request.finish_reason, request.stop_reason) == (reason, stop)
        assert (life.received, life.reason) == (want, reason)

    def check_outputs(self) -> int:
        """All that were not aborted; how many these are."""
        lives = [life for life in self.lives.values() if not life.aborted]
        for life in lives:
            if life.request.number in self.poison and life.reason == "error":
                assert life.received == life.request.output
                continue
            self.check_output(life.request)
        return len(lives)

    # --- what every plan must satisfy

    def _check_fairness(
        self, plan: StepPlan, due: Sequence[Request], prompts: Sequence[Request], started: set[int]
    ) -> None:
        """Decodes get their tokens, the first prompt gets on, requests start in order."""
        if self.scheduler._inquest.suspects:  # they run alone
            for life in self.lives.values():
                life.gap = life.most_decodes = 0
            self.held = 0
            return
        decoding = {number for decodes in plan.decodes for number in decodes.requests}
        # A quarter of the budget, at least one token, is for prompts.
        share = max(self.budget - max(self.budget // 4, 1), 1)
        for request in due:
            life = self.lives[request.number]
            life.most_decodes = max(life.most_decodes, len(due))
            life.gap += 1
            if request.number in decoding or request.table is None:
                life.gap = life.most_decodes = 0
            limit = -(-life.most_decodes // share) + 1
            assert life.gap <= limit, f"decode {request.number} got nothing in {life.gap} steps"
        first = prompts[0].number if prompts else None
        if first != self.first_prompt:
            self.first_prompt, self.held = first, 0
        if prompts and prompts[0].table is not None and self.budget > 1:
            urgent = any(
                self.lives[number].request.priority < prompts[0].priority for number in started
            )
            served = {chunk.request for chunk in plan.chunks}
            served |= {n for t in plan.transfers if on_host(t.source) for n in t.requests}
            told = not self.again & {request.number for request in self.scheduler.running}
            waits = told and not urgent and prompts[0].number not in served
            self.held = self.held + 1 if waits else 0
            assert self.held <= self.patience, "the first prompt starves"
        if started and len(self.scheduler.waiting):
            first = self.scheduler.waiting.first()
            last = max(self.lives[number].request.order for number in started)
            assert first is not None and last < first.order, "overtaken"
        assert len(self.scheduler.running) <= self.scheduler.limits.max_num_seqs

    def _execute(self, plan: StepPlan) -> Outcome:
        """Run a plan on all ranks as ``Worker.run`` does, and check what each rank sees."""
        self._steps += 1
        assert isinstance(plan, StepPlan) and plan.step == self._steps
        running = [c.request for c in plan.chunks]
        running += [n for decodes in plan.decodes for n in decodes.requests]
        assert len(running) == len(set(running)), "a request twice in one step"
        for begin in plan.begins:
            life = self.lives[begin.request]
            assert list(begin.tokens) == life.tokens, "it begins with other tokens than it has"
            assert begin.prompt_length == len(life.request.prompt)
            if not life.started:
                life.started = True
                self.started.append(begin.request)
        works = self.ranks.apply(plan)
        self._check_agreement(works)
        self._transfer(plan.transfers)
        self._hand_over(works)
        items = self._compute(works)
        self.items.append(items)
        sampled = [self._draw(work_draw.sequence.number, work_draw.rank, work_draw.index, items)
                   for work_draw in works[0].draws]  # fmt: skip
        scored = [
            self._score(stretch[0].number, *stretch[1:], items) for stretch in works[0].scored
        ]
        return Outcome(plan.step, tuple(sampled), tuple(scored))

    def _check_agreement(self, works: Sequence[StepWork]) -> None:
        """All ranks have the same state, that of the scheduler."""
        views = [
            (
                [(d.sequence.number, d.rank, d.index) for d in work.draws],
                [(h.sequence.number, h.source, h.target) for h in work.handoffs],
                [(s[0].number, *s[1:]) for s in work.scored],
            )
            for work in works
        ]
        assert all(view == views[0] for view in views), "ranks disagree"
        untold = {request.number for request in self.scheduler._forgotten.requests}
        running = {r.number: r for r in self.scheduler.running if r.number not in untold}
        for state in self.ranks.states:
            assert state.sequences.keys() == running.keys()
            for number, request in running.items():
                table = state.sequences[number].table
                assert request.table is not None
                assert table.homes == request.table.homes
                assert table.num_tokens == request.table.num_tokens

    def _transfer(self, transfers: Sequence[Transfer]) -> None:
        """As ``move_blocks``: in a batch all is read before anything is written."""
        size = self.block_size
        batch: list[Transfer] = []
        written: set[tuple[int, int]] = set()

        def where(home: Home) -> tuple[list[int | None], slice]:
            rank, number = home
            memory = self.host[rank] if on_host(home) else self.memory[rank]
            number = host_slot(number) if on_host(home) else number
            assert 0 <= number < len(memory) // size
            return memory, slice(number * size, (number + 1) * size)

        def run() -> None:
            content = []
            for transfer in batch:
                memory, at = where(transfer.source)
                content.append(memory[at])
            for transfer, data in zip(batch, content, strict=True):
                memory, at = where(transfer.target)
                memory[at] = data
            batch.clear()
            written.clear()

        for transfer in transfers:
            assert transfer.source != transfer.target
            to, back = on_host(transfer.target), on_host(transfer.source)
            self.kinds.append("spill" if to else "restore" if back else "copy")
            assert not (on_host(transfer.source) and on_host(transfer.target))
            assert not on_host(transfer.target) or transfer.source[0] == transfer.target[0]
            assert not self.away & {transfer.source[0], transfer.target[0]}
            if transfer.source in written or transfer.target in written:
                run()
            batch.append(transfer)
            written.add(transfer.target)
        run()

    def _hand_over(self, works: Sequence[StepWork]) -> None:
        """Each rank knows only the tokens that it drew or was handed."""
        pairs = list(zip(*(work.handoffs for work in works), strict=True))
        values = [views[views[0].source].sequence.last for views in pairs]
        for views, value in zip(pairs, values, strict=True):
            assert views[0].source != views[0].target
            views[views[0].target].sequence.last = value

    def _compute(self, works: Sequence[StepWork]) -> dict[int, Item]:
        """Every rank computes the tokens that it owns; all is stored before anything is read."""
        owned = [0] * len(self.blocks)
        items: dict[int, Item] = {}
        tokens: dict[tuple[int, int], int] = {}  # (request, position) -> what its owner computes
        for rank, work in enumerate(works):
            for sequence in work.decodes:
                position = sequence.table.num_tokens - 1
                tokens[sequence.number, position] = token_at(sequence, position)
                owned[rank] += 1
            for item in work.items:
                number = item.sequence.number
                if number in items:
                    assert (item.shards, item.mode, item.ring_pass, item.start, item.count) == (
                        items[number].shards, items[number].mode, items[number].ring_pass,
                        items[number].start, items[number].count,
                    ), "ranks disagree on an item"  # fmt: skip
                items[number] = item
                shard = item.shard(rank)
                for position in positions(shard.q_runs) if shard else ():
                    assert (number, position) not in tokens, "computed twice"
                    tokens[number, position] = token_at(item.sequence, position)
                    owned[rank] += 1
        for rank, count in enumerate(owned):
            assert count <= self.budget, f"rank {rank} computes {count} of {self.budget} tokens"
            assert not count or rank not in self.away, f"rank {rank} is away and computes"
        self.owned.append(owned)
        for (number, position), token in sorted(tokens.items()):
            life = self.lives[number]
            assert token == max(life.tokens[position], 0), f"request {number} is fed a wrong token"
            self._append(life, position, token)
        written: dict[tuple[int, int], int] = {}
        for item in items.values():
            self._check_item(item, works)
            known = self.lives[item.sequence.number].contents
            for shard in item.shards:
                for position in positions(shard.new_runs):
                    home, slot = item.sequence.table.slot(position)
                    assert home == shard.rank, "a token is stored elsewhere"
                    self._write(written, shard.rank, slot, known[position])
        for rank, work in enumerate(works):
            for sequence in work.decodes:
                position = sequence.table.num_tokens - 1
                home, slot = sequence.table.slot(position)
                assert home == rank and sequence.table.span == (rank,), (
                    "a local decode is not local"
                )
                self._write(written, rank, slot, self.lives[sequence.number].contents[position])
        for item in items.values():
            for shard in item.shards:
                self._read(item.sequence.number, shard.rank, shard.blocks)
        for rank, work in enumerate(works):
            for sequence in work.decodes:
                blocks = sequence.table.blocks_on(rank)
                assert blocks.runs() == ((0, sequence.table.num_tokens),)
                self._read(sequence.number, rank, blocks)
        return items

    @staticmethod
    def _append(life: Life, position: int, token: int) -> None:
        """Contents are known up to the last position that was ever computed."""
        if position == len(life.contents):
            life.contents.append(follow(life.contents[-1], token))
        assert position < len(life.contents), "a position before it was computed is missing"

    def _write(
        self, written: dict[tuple[int, int], int], rank: int, slot: int, content: int
    ) -> None:
        assert written.get((rank, slot), content) == content, "two write one slot"
        written[rank, slot] = content
        self.memory[rank][slot] = content

    def _read(self, number: int, rank: int, blocks: Blocks) -> None:
        memory, known = self.memory[rank], self.lives[number].contents
        slots = positions(blocks.extents(self.block_size))
        held = [memory[slot] for slot in slots]
        want = [known[position] for position in positions(blocks.runs())]
        assert held == want, f"request {number} reads what is not its own on rank {rank}"

    def _check_item(self, item: Item, works: Sequence[StepWork]) -> None:
        check_item(item)
        stored = sorted(run for shard in item.shards for run in shard.blocks.runs())
        at = 0
        for start, length in stored:
            assert start == at, "a position is stored twice or nowhere"
            at = start + length
        ranks = [shard.rank for shard in item.shards]
        assert ranks == sorted(set(ranks))
        mode, ring_pass = self.mode
        if mode == "auto":
            if len(ranks) == 1:
                want = "local"
            else:
                held = [len(shard.blocks) for shard in item.shards]
                share, n = max(held) / sum(held), len(held)
                level = share * n <= 1.25 or (
                    self.cost is not None
                    and self.cost.pass_q_pays(n, item.count, item.start, share)
                )
                over_hosts = len(ranks) > 2 and self.num_hosts > 1 and level
                by_tree = item.count == 1 or over_hosts
                want = "tree" if by_tree else "ring"
            assert item.mode == want
        else:
            assert item.mode == mode
        if item.mode == "local":
            assert len(ranks) == 1, "a local item on several ranks"
            involved = [rank for rank, work in enumerate(works) if item_of(work, item) is not None]
            assert involved == ranks
        else:
            assert all(item_of(work, item) is not None for work in works)
        if item.mode == "ring" and ring_pass != "auto":
            assert item.ring_pass == ring_pass

    def _draw(self, number: int, rank: int, index: int, items: dict[int, Item]) -> Sampled:
        """What the rank that computed a request's last token draws, from what this rank knows."""
        life, sequence = self.lives[number], self.ranks.states[rank].sequences[number]
        how, prompt = sequence.sampling, life.request.prompt
        assert index == len(life.tokens) - len(prompt), "a draw is missing or was made twice"
        assert sequence.table.num_tokens == len(life.tokens), "drawn before all is computed"
        if number in items:
            shard = items[number].shard(rank)
            assert items[number].draws and shard is not None
            assert len(life.tokens) - 1 in positions(shard.q_runs), (
                "drawn on a rank without its logits"
            )
        else:
            assert sequence.table.span == (rank,)
        output: list[int] = []
        if how.looks_back:
            known = sequence.outputs[:index]
            output = known if len(known) == index else [*known, sequence.last]
            assert output == life.tokens[len(prompt) :], "penalties count other tokens"
            assert tuple(sequence.prompt) == prompt
        token = self.model.token(
            life.contents[len(life.tokens) - 1], how.seed if how.temperature else 0, index,
            (tuple(prompt), tuple(output)) if how.looks_back else (),
            how.early_banned if index < how.min_tokens else (),
        )  # fmt: skip
        if life.not_finite_at == index:
            token = -1
        life.tokens.append(token)
        sequence.last = token
        return Sampled(number, token, -0.5)

    def _score(
        self, number: int, first: int, count: int, rank: int, items: dict[int, Item]
    ) -> Scored:
        """Log-probabilities of prompt tokens, from rows that the rank has in order."""
        life, shard = self.lives[number], items[number].shard(rank)
        assert shard is not None
        mine = positions(shard.q_runs)
        at = mine.index(first)
        assert mine[at : at + count] == list(range(first, first + count))
        assert first + count < len(life.request.prompt)
        rows = tuple(
            (score(life.contents[p], life.tokens[p + 1]), ()) for p in range(first, first + count)
        )
        return Scored(number, first + 1, rows)


def token_at(sequence: RunningSequence, position: int) -> int:
    """The token that a rank computes: one that all know, or the one drawn last, if it knows it."""
    if position < len(sequence.tokens):
        return sequence.tokens[position]
    return max(sequence.last, 0)


def item_of(work: StepWork, item: Item) -> Item | None:
    for other in work.items:
        if other.sequence.number == item.sequence.number:
            return other
    return None


def replace_seconds(outcome: Outcome, seconds: float) -> Outcome:
    return msgspec.structs.replace(outcome, seconds=seconds, model_seconds=seconds)


def prompt(length: int, first: int = 1) -> list[int]:
    """``length`` tokens; those with different ``first`` share no prefix."""
    return [first, *(n % 900 for n in range(2, length + 1))]


def greedy(max_tokens: int | None, **more: object) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0.0, **more)  # type: ignore[arg-type]


def sampled(max_tokens: int | None, **more: object) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=1.0, **more)  # type: ignore[arg-type]
