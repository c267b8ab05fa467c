"""Random lives of requests on three ranks: they come, fork, share prefixes, grow, are preempted,
aborted, and moved while ranks are drained, reopened and made level.

After every step the scheduler's ledger balances, and rank 0's worker state equals it. A request's
tokens are those that it gets alone in an engine without a prefix cache; those of an aborted one are
their beginning.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from ds_cp.comm.wire import World
from ds_cp.engine.core import EngineCore
from ds_cp.scheduler.build import build_scheduler
from ds_cp.engine.loop import PipelinedLoop, ThreadRunner
from ds_cp.engine.llm import LLMEngine
from ds_cp.outputs import Delta
from ds_cp.sampling_params import RequestOptions
from ds_cp.layout import Home
from ds_cp.plan import Outcome, StepPlan, Stop
from ds_cp.scheduler.request import Request
from ds_cp.scheduler.scheduler import Scheduler
from ds_cp.worker.worker import Worker
from ds_cp.errors import CapacityError
from tests.dist.test_engine_company import KINDS, STOPS, Answer, Case, draft, settle, the_model
from tests.helpers.engines import engine_on
from tests.helpers.ranks import run_ranks

States = dict[int, tuple[tuple[Home, ...], int]]  # request -> homes of its blocks, tokens in them


class _Recorder(ThreadRunner):
    """Runs plans, keeps them, and compares the worker state with the scheduler's after each."""

    def __init__(self, worker: Worker, scheduler: Scheduler) -> None:
        super().__init__(self._lead)
        self._worker = worker
        self._scheduler = scheduler
        self.plans: list[StepPlan] = []
        self.states: list[States] = []  # as they have to be after each plan

    def submit(self, plan: StepPlan) -> None:
        self.plans.append(plan)
        self.states.append({
            request.number: (tuple(request.table.homes), request.table.num_tokens)
            for request in self._scheduler.running
            if request.table is not None
        })  # fmt: skip
        super().submit(plan)

    def _lead(self, plan: StepPlan) -> Outcome:
        outcome = self._worker.lead(plan)
        sequences = self._worker.state.sequences
        mine = {n: (tuple(s.table.homes), s.table.num_tokens) for n, s in sequences.items()}
        assert mine == self.states[plan.step - 1], f"states differ after step {plan.step}"
        return outcome


class Driver:
    """An engine on rank 0, step by step, with chunks that are paced as for clients that wait. The
    other ranks are in ``engine._worker.follow()``."""

    def __init__(self, engine: LLMEngine) -> None:
        self.core = EngineCore(build_scheduler(engine._config, engine.facts, paced=True), None)
        self.scheduler = self.core.scheduler
        self.allocator = self.scheduler.allocator
        self.ranks = range(engine.facts.cp_size)
        self.answers: dict[str, list[Request]] = {}
        self.live: set[str] = set()
        self._said: dict[str, list[list[int]]] = {}
        self._worker = engine._worker
        self._runner = _Recorder(engine._worker, self.scheduler)
        self._loop = PipelinedLoop(self.core, self._runner)

    @property
    def plans(self) -> list[StepPlan]:
        return self._runner.plans

    @property
    def states(self) -> list[States]:
        return self._runner.states

    def add(self, name: str, case: Case, options: RequestOptions | None = None) -> list[Request]:
        """Queue a request; its answers."""
        answers = self.core.add(name, case.prompt, case.params, options)
        self.answers[name] = answers
        self._said[name] = [[] for _ in answers]
        self.live.add(name)
        return answers

    def abort(self, name: str) -> None:
        assert self.core.abort(name)
        self.live.discard(name)

    def step(self) -> list[Delta]:
        """Plan a step, and apply the oldest outcome when two are under way."""
        deltas = self._loop.advance()
        self.scheduler.check_integrity()
        for delta in deltas:
            said = self._said[delta.request_id][delta.index]
            said += delta.token_ids
            assert said == self.answers[delta.request_id][delta.index].output
            if all(request.finish_reason for request in self.answers[delta.request_id]):
                self.live.discard(delta.request_id)
        return deltas

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.step()

    def finish(self, most: int = 2000) -> None:
        """Step until no request is left."""
        for _ in range(most):
            if not (self.core.has_work or self._loop.num_in_flight):
                break
            self.step()
        assert not self.live and not self.core.has_work, f"{self.live} did not end"
        assert self.used == [0] * len(self.ranks)

    def close(self) -> None:
        """Let the other ranks go."""
        self._loop.settle()
        self._runner.close()
        self._worker.lead(Stop())

    @property
    def used(self) -> list[int]:
        """Blocks in use, by rank."""
        return [self.allocator.num_used(rank) for rank in self.ranks]

    def said(self, name: str) -> tuple[Answer, ...]:
        """(tokens, finish reason) of each answer."""
        return tuple((tuple(r.output), r.finish_reason or "") for r in self.answers[name])

    def num_planned(self, number: int, before: int | None = None) -> int:
        """How many tokens of a request the first ``before`` plans draw, or all."""
        return sum(
            sum(c.request == number and c.samples for c in plan.chunks)
            + sum(number in decodes.requests for decodes in plan.decodes)
            for plan in self.plans[:before]
        )


# --- random lives

BUDGETS = [112, 72, 48]  # tokens of KV
SETUPS: tuple[tuple[str, str, int, Mapping[str, Any]], ...] = (
    ("auto", "fill_then_spill", 110, {}),
    ("ring", "round_robin", 70, {"max_num_batched_tokens": 24}),
    ("tree", "balanced", 70, {"max_num_batched_tokens": 12}),
    ("local", "balanced", 70, {}),
)  # mode, placement, lifecycles, config.scheduler
LONGEST = 72  # tokens of a prompt
MORE_KINDS: tuple[Mapping[str, Any], ...] = (
    *KINDS,
    {"temperature": 0.7, "n": 3, "top_p": 0.95},
    {"temperature": 0.0, "n": 3, "min_tokens": 6, "stop_token_ids": STOPS, "logprobs": 1},
    {"temperature": 1.0, "prompt_logprobs": 0, "presence_penalty": -0.4},
)


def make_lives() -> list[Case]:
    """Different requests; each life draws one of them, again and again, so prefixes are found."""
    model, found = the_model(), []
    for number in range(52):
        drafts = (
            Case(case.prompt[:LONGEST], case.params)
            for case in (draft(number, attempt, MORE_KINDS) for attempt in range(40))
        )
        found.append(settle(model, drafts))
    return found


class Lives:
    """Rank 0's part: random events between steps."""

    def __init__(self, driver: Driver, cases: Sequence[Case], total: int, seed: int) -> None:
        self.driver = driver
        self.cases = cases
        self.total = total
        self.rng = random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.bad: list[str] = []
        self.case_of: dict[str, Case] = {}
        self.aborted: set[str] = set()
        self.drained: set[int] = set()

    def run(self) -> None:
        driver, started = self.driver, 0
        for _ in range(200 * self.total):
            if started == self.total and not driver.live:
                break
            for _ in range(self.rng.choice((0, 0, 1, 1, 3))):
                if started < self.total and len(driver.live) < 12:
                    started += self._start(f"life {started}")
            self._disturb()
            seen = len(driver.plans)
            driver.step()
            for plan in driver.plans[seen:]:
                self._look_at(plan)
        driver.finish()
        self._compare()
        scheduler = driver.scheduler
        self.counts["lives"] = len(self.case_of)
        self.counts["preemptions"] = scheduler.num_preemptions
        self.counts["hits"] = scheduler.block_manager.hits
        self.counts["moved"] = scheduler.migration.num_moved

    def _start(self, name: str) -> bool:
        case, rng = self.rng.choice(self.cases), self.rng
        salt = "other" if rng.random() < 0.1 else ""
        options = RequestOptions(priority=rng.choice((0, 0, 0, -1, 2)), cache_salt=salt)
        try:
            self.driver.add(name, case, options)
        except CapacityError as err:  # while a large rank is drained
            assert err.need is not None and err.largest is not None
            assert err.need > err.largest and self.driver.scheduler.block_manager.closed
            self.counts["too large"] += 1
            return False
        self.case_of[name] = case
        return True

    def _disturb(self) -> None:
        driver, rng, scheduler = self.driver, self.rng, self.driver.scheduler
        closed = scheduler.block_manager.closed
        if driver.live and rng.random() < 0.06:
            name = rng.choice(sorted(driver.live))
            driver.abort(name)
            self.aborted.add(name)
        if rng.random() < 0.08:
            assert not driver.core.abort("nobody")
            self.counts["levelled"] += scheduler.rebalance() > 0
        for rank in list(closed):
            if scheduler.is_drained(rank):
                self.drained.add(rank)
            if rank in self.drained:
                assert not driver.used[rank], f"rank {rank} was drained and is in use again"
                if rng.random() < 0.3:
                    self.counts["drains"] += 1
                    self.drained.discard(rank)
                    scheduler.reopen(rank)
        if rng.random() < (0.1, 0.03, 0.0)[len(closed)]:
            before = driver.used, set(closed)
            try:
                scheduler.drain(rng.choice(list(driver.ranks)))
            except CapacityError:
                assert (driver.used, closed) == before
                self.counts["refused drains"] += 1

    def _look_at(self, plan: StepPlan) -> None:
        self.counts["forks"] += len(plan.forks)
        self.counts["resumed"] += sum(len(b.tokens) > b.prompt_length for b in plan.begins)
        tables = {r.number: r.table for r in self.driver.scheduler.running}
        for number, home in plan.grown:
            table = tables.get(number)
            if table is not None and table.width == 2 and table.num_blocks(home[0]) == 1:
                self.counts["growths"] += 1

    def _compare(self) -> None:
        for name, case in self.case_of.items():
            for n, (got, want) in enumerate(zip(self.driver.said(name), case.want, strict=True)):
                if name in self.aborted and got[1] == "abort":
                    self.counts["aborts"] += 1
                    good = got[0] == want[0][: len(got[0])]
                else:
                    self.counts["ends"] += 1
                    good = got == want
                if not good:
                    self.bad.append(f"{name}, answer {n} of {case}: {got}")


def say_alone(world: World, cases: Sequence[Case]) -> list[str]:
    """Each request on its own without a prefix cache, on all ranks that hold it."""
    kv = {"block_size": 4, "tokens_per_rank": BUDGETS, "prefix_caching": False}
    engine = engine_on(world, the_model(), {"kv_cache": kv})
    bad = []
    for case in cases:
        for output in engine.generate(case.prompt, case.params):
            got = tuple((a.token_ids, a.finish_reason) for a in output.outputs)
            bad += [] if got == case.want else [f"alone: {case}: {got}"]
    return bad


def live_on_ranks(world: World, cases: list[Case]) -> tuple[list[str], list[Counter[str]]]:
    model, bad, counts = the_model(), say_alone(world, cases), []
    for n, (mode, placement, total, scheduler) in enumerate(SETUPS):
        engine = engine_on(world, model, {
            "context_parallel": {"mode": mode},
            "kv_cache": {
                "block_size": 4, "tokens_per_rank": BUDGETS, "placement": placement,
            },
            "scheduler": scheduler,
        })  # fmt: skip
        if not engine.is_driver:
            engine._worker.follow()
            continue
        driver = Driver(engine)
        lives = Lives(driver, cases, total, seed=n)
        lives.run()
        driver.close()
        if mode == "local":
            homes = [table for states in driver.states for table, _ in states.values()]
            assert all(len({rank for rank, _ in table}) <= 1 for table in homes)
        bad += [f"{mode}: {line}" for line in lives.bad]
        counts.append(lives.counts)
    return bad, counts


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    return make_lives()


def test_300_random_lifecycles(cases: list[Case]) -> None:
    bad, counts = run_ranks(live_on_ranks, 3, cases, timeout=280)[0]
    assert not bad
    assert sum(c["lives"] for c in counts) >= 300
    total = sum(counts, Counter())
    assert total["ends"] >= 300 and total["aborts"] >= 20, total
    for each in counts:
        for event in ("preemptions", "forks", "hits", "drains", "moved", "resumed"):
            assert each[event] > 0, f"{event} never happened: {each}"
    assert counts[0]["growths"] > 0, "from local to spanning"
    for event in ("levelled", "refused drains"):
        assert total[event] > 0, f"{event} never happened: {total}"
