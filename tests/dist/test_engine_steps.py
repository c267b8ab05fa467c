"""What rank 0 learns of a step: its time wherever the work was, and rows that failed. And a caller
of ``stream`` that takes its time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch

from ds_cp.comm.wire import World
from ds_cp.engine.core import EngineCore
from ds_cp.engine.llm import LLMEngine, PromptRequest
from ds_cp.engine.loop import InlineLoop
from ds_cp.outputs import RequestOutput
from ds_cp.plan import Outcome, Plan, StepPlan, Stop
from ds_cp.sampling_params import SamplingParams
from ds_cp.scheduler.build import build_scheduler
from ds_cp.worker import sampler
from ds_cp.worker import scored_rows
from ds_cp.worker.step_context import StepContext
from ds_cp.worker.worker import Worker
from tests.helpers.engines import engine_on, tiny_llama
from tests.helpers.ranks import run_ranks, run_ranks_briefly

GREEDY = SamplingParams(max_tokens=4, temperature=0.0)
SLEEP_S = 0.25  # of each forward call of the slow rank
QUIET_S, TOKEN_S = 0.03, 0.0005  # what a forward call costs, and each further token in it


def kv(tokens: int, **more: Any) -> dict[str, Any]:
    return {"kv_cache": {"tokens_per_rank": tokens, "block_size": 16}, **more}


# --- a step's time


class Timed(NamedTuple):
    """See ``timed_steps``."""

    seconds: float
    model_s: float
    own_model_s: float
    took: float
    drawn: int


def timed_steps(world: World, slow: int, mode: str) -> dict[int, Timed]:
    """By step: seconds that rank 0 reports; those in the model, that rank 0 reports and then that
    this rank was there; seconds that this rank's part took, seen from outside; and the tokens that
    were drawn. Rank ``slow`` sleeps in its forward calls."""
    sections: dict[str, Any] = {
        "context_parallel": {"mode": mode}, "scheduler": {"max_num_batched_tokens": 24}
    }  # fmt: skip
    engine = engine_on(world, tiny_llama(), kv(128, **sections))
    found: dict[int, Timed] = {}
    run, lead, forward = Worker.run, Worker.lead, Worker._forward

    def timed_run(self: Worker, plan: Plan, *rest: Any) -> Outcome:
        began, before = time.perf_counter(), self.model_seconds
        outcome = run(self, plan, *rest)
        if isinstance(plan, StepPlan) and world.rank != 0:
            took = time.perf_counter() - began
            found[plan.step] = Timed(0.0, 0.0, self.model_seconds - before, took, 0)
        return outcome

    def recorded_lead(self: Worker, plan: Plan) -> Outcome:
        began, before = time.perf_counter(), self.model_seconds
        outcome = lead(self, plan)
        if isinstance(plan, StepPlan):
            took = time.perf_counter() - began
            found[plan.step] = Timed(
                outcome.seconds, outcome.model_seconds, self.model_seconds - before, took,
                len(outcome.sampled),
            )  # fmt: skip
        return outcome

    def slow_forward(self: Worker, *rest: Any) -> torch.Tensor:
        if world.rank == slow:
            handle = self.model.register_forward_pre_hook(lambda *_: time.sleep(SLEEP_S))
        try:
            return forward(self, *rest)
        finally:
            if world.rank == slow:
                handle.remove()

    Worker.run = timed_run  # type: ignore[method-assign]
    Worker.lead = recorded_lead  # type: ignore[method-assign]
    Worker._forward = slow_forward  # type: ignore[method-assign]
    if world.rank == 0 and mode == "local":
        engine._driver.scheduler.block_manager.closed.add(1 - slow)
    engine.generate([[1] * 60], GREEDY)
    return found


@pytest.mark.parametrize(("slow", "mode"), [(1, "local"), (0, "local"), (1, "tree"), (1, "ring")])
def test_the_time_of_a_step_is_that_of_the_slowest_rank(slow: int, mode: str) -> None:
    reported, own = run_ranks(timed_steps, 2, slow, mode)
    drawn = [one.drawn for one in reported.values()]
    assert drawn.count(0) >= 1 and drawn.count(1) == 4, "chunks without and with a draw"
    for step, one in reported.items():
        works = slow == 0 or own[step].own_model_s > 0
        if mode == "local" or not one.drawn or works:
            assert SLEEP_S <= one.model_s, (step, one)
        # The slowest rank's in the model, to the bit; the step from its begin to the last result.
        assert one.model_s == max(one.own_model_s, own[step].own_model_s), (step, one, own[step])
        assert one.model_s <= one.seconds <= one.took, (step, one)


# --- one row does not end the engine


def failing_rows(world: World) -> list[tuple[str, int, bool]]:
    """(finish reason, number of tokens, whether it has scores) of four requests in one batch: the
    second cannot be drawn after two tokens, the third cannot be scored."""
    engine = engine_on(world, tiny_llama(), kv(256))
    draw, score = sampler.sample_one, sampler.score_prompt

    def bad_draw(logits_V: torch.Tensor, row: sampler.Row) -> Any:
        if row.how.seed == 22 and row.index == 2:
            raise RuntimeError("a row that cannot be drawn (pretended)")
        return draw(logits_V, row)

    def bad_score(logits_TV: torch.Tensor, tokens: Any, top: int) -> Any:
        if top == 3:
            raise RuntimeError("a row that cannot be scored (pretended)")
        return score(logits_TV, tokens, top)

    sampler.sample_one = bad_draw
    scored_rows.score_prompt = bad_score  # type: ignore[attr-defined]
    params = [
        SamplingParams(max_tokens=5, seed=11),
        SamplingParams(max_tokens=5, seed=22),
        SamplingParams(max_tokens=5, seed=33, prompt_logprobs=3),
        SamplingParams(max_tokens=5, seed=44, prompt_logprobs=2),
    ]
    prompts = [[i, 2 * i, 3 * i] for i in range(1, 5)]
    outputs = engine.generate(prompts, params)
    again = engine.generate(prompts[0], params[0])
    if world.rank == 0:
        assert again[0].outputs[0].token_ids == outputs[0].outputs[0].token_ids
    return [
        (out.outputs[0].finish_reason or "", len(out.outputs[0].token_ids),
         out.prompt_logprobs is not None)
        for out in outputs
    ]  # fmt: skip


@pytest.mark.parametrize("size", [1, 2])
def test_a_row_that_fails_ends_its_request_alone(size: int) -> None:
    found = run_ranks(failing_rows, size)
    assert found[0] == [
        ("length", 5, False), ("error", 2, False), ("error", 0, False), ("length", 5, True)
    ]  # fmt: skip


# --- a caller that takes its time


def slow_caller(world: World, limit: float, asks_slowly: bool) -> list[str]:
    """More than ``limit``, which ``comm.timeout_s`` is, passes between two outputs, or before the
    next request."""
    config = kv(512, comm={"timeout_s": limit})
    engine = engine_on(world, tiny_llama(), config)

    def requests() -> Iterator[PromptRequest]:
        for i in range(3):
            if asks_slowly and i:
                time.sleep(limit * 1.3)
            params = SamplingParams(max_tokens=4 + 30 * i, temperature=0.0)
            yield PromptRequest(str(i), [1 + i] * 20, params)

    names = []
    for output in engine.stream(requests()):
        names.append(output.request_id)
        if not asks_slowly and output.request_id == "0":
            time.sleep(limit * 1.5)
    again = engine.generate([[7] * 5], GREEDY)
    assert world.rank != 0 or len(again[0].outputs[0].token_ids) == 4
    return names


@pytest.mark.parametrize("asks_slowly", [False, True])
def test_a_slow_caller_does_not_end_the_job(asks_slowly: bool) -> None:
    _, found = run_ranks_briefly(slow_caller, 2, 6.0, asks_slowly)
    assert found == [["0", "1", "2"], []]


# --- pacing, over a clock that only forward calls move


def slowed(world: World, far: bool) -> list[float]:
    """Seconds, by the ranks' clocks, of every step in which a request decodes beside a prompt of
    7,500 tokens on its own rank, or on the other one."""
    engine = engine_on(
        world,
        tiny_llama(max_position_embeddings=8192),
        kv(8192, context_parallel={"mode": "local"}),
    )
    worker, forward, now = engine._worker, Worker._forward, 0.0
    worker.clock = lambda: now

    def costly_forward(self: Worker, step: StepContext, *rest: Any) -> torch.Tensor:
        nonlocal now
        now += QUIET_S + TOKEN_S * (step.num_rows - 1)
        return forward(self, step, *rest)

    Worker._forward = costly_forward  # type: ignore[method-assign]
    if world.rank != 0:
        worker.follow()
        return []
    steps: list[tuple[int, int, float]] = []  # decodes, chunks, seconds

    def lead(plan: StepPlan) -> Outcome:
        outcome = worker.lead(plan)
        decodes = sum(len(some.requests) for some in plan.decodes)
        steps.append((decodes, len(plan.chunks), outcome.seconds))
        return outcome

    core = EngineCore(build_scheduler(engine._config, engine.facts, paced=True), None)
    loop = InlineLoop(core, lead)
    core.add("decode", [1] * 20, SamplingParams(max_tokens=1500, temperature=0.0))
    if not far:
        core.scheduler.block_manager.closed.add(1)
    where: set[int] = set()
    while len(steps) < 40:
        loop.advance()
    core.add("prompt", [i % 120 + 1 for i in range(7500)], SamplingParams(max_tokens=1))
    while "prompt" not in {delta.request_id for delta in loop.advance()}:
        where.update(o for r in core.scheduler.running[1:] for o in r.workers)
    for name in ("decode", "prompt"):
        core.abort(name)
    loop.settle()
    worker.lead(Stop())
    assert where == {int(far)}
    beside = [i for i, (decodes, chunks, _) in enumerate(steps) if decodes and chunks]
    quiet = [seconds for decodes, chunks, seconds in steps if decodes and not chunks]
    assert quiet and max(quiet) == pytest.approx(QUIET_S) == min(quiet)
    during = steps[beside[0] : beside[-1] + 1]
    assert all(decodes == 1 for decodes, _, _ in during), "the other one has to wait"
    return [seconds for _, _, seconds in during]


@pytest.mark.parametrize("far", [False, True])
def test_decodes_are_slowed_alike_by_a_prompt_on_any_rank(far: bool) -> None:
    """At most twice as long on average, scheduler.decode_slowdown; and the prompt uses that."""
    found, _ = run_ranks(slowed, 2, far)
    settled = found[len(found) // 2 :]  # what a chunk costs is known by then
    assert 1.5 * QUIET_S <= sum(settled) / len(settled) <= 2.0 * QUIET_S
