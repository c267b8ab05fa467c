"""A request's tokens do not depend on the requests beside it.

The same 50 requests say the same one by one, all at once, in any order, arriving while others run,
in a pool so small that they preempt each other, under each placement and mode, with and without
the prefix cache, on 1 rank and on 3. What they should say comes from transformers' logits on one
process. Greedy tokens are chosen here by a few lines of their own; sampled ones by the sampler,
which has its own test. A request for which rounding could decide (``CLEAR``, ``NOISE``) is
replaced.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

from ds_cp.comm.wire import World
from ds_cp.engine.core import EngineCore
from ds_cp.scheduler.build import build_scheduler
from ds_cp.engine.llm import LLMEngine, PromptRequest
from ds_cp.sampling_params import RequestOptions, SamplingParams
from ds_cp.outputs import RequestOutput, TokenLogprob
from ds_cp.plan import Sampling
from ds_cp.worker.sampler import History, Row, sample_rows
from tests.helpers.engines import engine_on, tiny_llama
from tests.helpers.ranks import run_ranks

Ids = tuple[int, ...]
Answer = tuple[Ids, str]  # tokens, finish reason
COUNT = 50
LENGTHS = (1, 200, 2, 3, 4, 5, 7, 8, 9, 12, 13, 16, 17, 20, 24, 25, 29, 32, 33, 41, 48, 60, 64, 85)
CLEAR = 1e-4  # least gap of the two best scores of a greedy step
NOISE = 3e-5  # of logits, that must not change a draw
VOCAB = 128
STOPS = tuple(range(3, VOCAB, 4))  # a quarter of all tokens
EVERYWHERE = (("auto", "auto"), ("local", "auto"), ("ring", "kv"), ("ring", "q"), ("tree", "auto"))
PLACEMENTS = ("fill_then_spill", "round_robin", "balanced")


def the_model(**changes: Any) -> PreTrainedModel:
    """A wide initial spread: the logits of the default are so level that rounding would decide."""
    return tiny_llama(initializer_range=0.2, **changes)


# --- the requests


@dataclass(frozen=True)
class Case:
    """One request and what it says."""

    prompt: Ids
    params: SamplingParams
    want: tuple[Answer, ...] = ()

    @property
    def tokens(self) -> int:
        """KV that its longest answer needs."""
        assert self.params.max_tokens is not None
        return len(self.prompt) + self.params.max_tokens - 1


KINDS: tuple[Mapping[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 0.8},
    {"temperature": 0.0, "repetition_penalty": 1.4},
    {"temperature": 1.0, "top_k": 40, "top_p": 0.9, "min_p": 0.01},
    {"temperature": 0.0, "presence_penalty": 0.7, "frequency_penalty": 1.5},
    {"temperature": 1.2, "n": 2},
    {"temperature": 0.0, "min_tokens": 3, "stop_token_ids": STOPS},
    {"temperature": 0.9, "top_p": 0.8, "repetition_penalty": 1.2, "frequency_penalty": 0.8,
     "logit_bias": {7: 3.0, 8: -100.0}},
    {"temperature": 0.0, "logit_bias": {5: 4.0, 9: -3.0, 70: 1.5}, "n": 2},
    {"temperature": 1.5, "top_k": 12, "min_tokens": 4, "stop_token_ids": STOPS, "n": 2},
)  # fmt: skip


def draft(number: int, attempt: int, kinds: Sequence[Mapping[str, Any]]) -> Case:
    """Request ``number`` without its answer. Some prompts begin like others."""
    rng = random.Random(100 * number + attempt)
    length = LENGTHS[number % len(LENGTHS)]
    prompt = [rng.randrange(1, VOCAB) for _ in range(length)]
    if number % 3 == 1:
        shared = random.Random(number % 2)
        begin = [shared.randrange(1, VOCAB) for _ in range((26, 60)[number % 2])]
        prompt = [*begin, *prompt][: 200 if length == 200 else length + 40]
    return Case(
        tuple(prompt),
        SamplingParams(
            max_tokens=rng.randrange(6, 20), seed=10**13 * (number - 20) + attempt,
            **kinds[number % len(kinds)],
        ),
    )  # fmt: skip


# --- what transformers says


@contextmanager
def one_thread() -> Iterator[None]:
    """A model this small is slower on several, most of all when other processes compute too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@torch.inference_mode()
def alone(model: PreTrainedModel, case: Case, index: int) -> Answer | None:
    """Answer ``index`` of a request, or None where rounding could decide."""
    params, ids, output = case.params, list(case.prompt), []
    cache = DynamicCache(config=model.config)
    eos = {model.config.eos_token_id} - {None}
    ends = {*params.stop_token_ids, *(() if params.ignore_eos else eos)}
    assert params.max_tokens is not None
    while len(output) < params.max_tokens:
        new = torch.tensor([ids[cache.get_seq_length() :]])
        logits = model(new, past_key_values=cache, logits_to_keep=1).logits[0, -1]
        banned = ends | eos if len(output) < params.min_tokens else set()
        choose = greedy_token if params.temperature == 0 else sampled_token
        token = choose(logits, case, index, output, banned)
        if token is None:
            return None
        ids.append(token)
        output.append(token)
        if token in ends and len(output) > params.min_tokens:
            return tuple(output), "stop"
    return tuple(output), "length"


def greedy_token(
    logits: torch.Tensor, case: Case, index: int, output: list[int], banned: set[int]
) -> int | None:
    params, scores = case.params, logits.double().tolist()
    for token, bias in params.logit_bias.items():
        scores[token] += bias
    for token in {*case.prompt, *output}:
        factor = params.repetition_penalty
        scores[token] = scores[token] / factor if scores[token] > 0 else scores[token] * factor
    for token in set(output):
        times = output.count(token)
        scores[token] -= params.presence_penalty + params.frequency_penalty * times
    for token in banned:
        scores[token] = -float("inf")
    second, best = sorted(scores)[-2:]
    return scores.index(best) if best - second > CLEAR else None


def sampled_token(
    logits: torch.Tensor, case: Case, index: int, output: list[int], banned: set[int]
) -> int | None:
    params = case.params
    assert params.seed is not None
    how = Sampling(
        temperature=params.temperature, top_p=params.top_p, top_k=params.top_k, min_p=params.min_p,
        seed=params.seed + index, logit_bias=tuple(sorted(params.logit_bias.items())),
        min_tokens=len(output) + 2 if banned else 0, early_banned=tuple(sorted(banned)),
        presence_penalty=params.presence_penalty, frequency_penalty=params.frequency_penalty,
        repetition_penalty=params.repetition_penalty,
    )  # fmt: skip
    row = Row(0, len(output), how, History(case.prompt, output))
    generator = torch.Generator().manual_seed(len(output))
    noise = NOISE * torch.randn(9, len(logits), generator=generator)
    noise[0] = 0.0
    tokens = {drawn.token for drawn in sample_rows(logits + noise, [row] * 9)}
    return tokens.pop() if len(tokens) == 1 else None


def settle(model: PreTrainedModel, drafts: Iterator[Case]) -> Case:
    """The first of ``drafts`` whose answers rounding cannot change, with the answers."""
    with one_thread():
        for case in itertools.islice(drafts, 40):
            answers = [alone(model, case, index) for index in range(case.params.n)]
            if None not in answers:
                return Case(case.prompt, case.params, tuple(a for a in answers if a is not None))
    raise AssertionError("no request with clear answers")


def make_cases(
    model: PreTrainedModel, count: int, kinds: Sequence[Mapping[str, Any]] = KINDS
) -> list[Case]:
    return [
        settle(model, (draft(number, attempt, kinds) for attempt in itertools.count()))
        for number in range(count)
    ]


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    found = make_cases(the_model(), COUNT)
    assert {len(case.prompt) for case in found} >= {1, 200}
    reasons = [reason for case in found for _, reason in case.want]
    assert reasons.count("stop") >= 10 and reasons.count("length") >= 30
    return found


# --- in the ranks


@dataclass(frozen=True)
class Run:
    """One way to run all the requests. ``order``: "alone", "together", "shuffled" or "trickle",
    where they come as others end. ``tiny``: they have to preempt each other."""

    order: str
    mode: tuple[str, str] = ("auto", "auto")
    placement: str = "fill_then_spill"
    tiny: bool = False
    caching: bool = True
    scheduler: Mapping[str, Any] = field(default_factory=dict)
    context_parallel: Mapping[str, Any] = field(default_factory=dict)


RUNS = (
    Run("alone"),
    Run("alone", mode=("tree", "auto"), placement="round_robin", caching=False),
    Run("together"),
    Run("together", placement="round_robin", scheduler={"max_num_batched_tokens": 2}),
    Run("together", placement="balanced", caching=False, scheduler={"decode_slowdown": 1.01}),
    Run("together", mode=("ring", "kv"), placement="round_robin", caching=False),
    Run("together", mode=("ring", "q"), placement="balanced"),
    Run("together", mode=("tree", "auto"), scheduler={"decode_slowdown": 100.0}),
    Run("shuffled", mode=("local", "auto")),
    Run("shuffled", placement="balanced", context_parallel={"local_threshold": 16}),
    Run("shuffled", mode=("tree", "auto"), placement="balanced",
        scheduler={"max_num_batched_tokens": 10}),
    Run("trickle", placement="round_robin", context_parallel={"layout": "contiguous"}),
    Run("trickle", mode=("ring", "q"), caching=False, scheduler={"max_num_batched_tokens": 30}),
    Run("together", tiny=True),
    Run("together", tiny=True, placement="round_robin", caching=False),
    Run("shuffled", tiny=True, placement="balanced", scheduler={"max_num_batched_tokens": 24}),
    Run("shuffled", tiny=True, mode=("local", "auto"), scheduler={"decode_slowdown": 1.01}),
    Run("trickle", tiny=True, mode=("ring", "kv"), placement="round_robin"),
    Run("together", tiny=True, mode=("tree", "auto"), placement="balanced",
        scheduler={"max_num_batched_tokens": 64}),
)  # fmt: skip
ON_ONE_RANK = (0, 3, 8, 11, 13, 15)


def engine_for(world: World, model: PreTrainedModel, cases: Sequence[Case], run: Run) -> LLMEngine:
    """Blocks of 4. A tiny pool holds the largest request and little more."""
    size = 1 if run.mode[0] == "local" else world.size
    total = max(case.tokens for case in cases) + 8 if run.tiny else 4800
    trickle = {"max_num_seqs": 6, "max_queue": 2} if run.order == "trickle" else {}
    engine = engine_on(world, model, {
        "context_parallel": {
            "mode": run.mode[0], "ring_pass": run.mode[1], **run.context_parallel
        },
        "kv_cache": {
            "block_size": 4, "tokens_per_rank": -(-total // size // 4) * 4 + 4,
            "placement": run.placement, "prefix_caching": run.caching,
        },
        "scheduler": {**trickle, **run.scheduler},
    })  # fmt: skip
    if engine.is_driver and "decode_slowdown" in run.scheduler:  # chunks paced as for clients
        scheduler = build_scheduler(engine._config, engine.facts, paced=True)
        engine._core = EngineCore(scheduler, None)
    return engine


def outputs_of(engine: LLMEngine, cases: Sequence[Case], run: Run) -> dict[int, RequestOutput]:
    """By the number of the case; empty on ranks that follow."""
    order = list(range(len(cases)))
    if run.order != "together":
        random.Random(len(run.placement)).shuffle(order)
    if run.order == "alone":
        alone = {n: engine.generate(cases[n].prompt, cases[n].params) for n in order}
        return {n: outputs[0] for n, outputs in alone.items() if outputs}
    requests = [
        PromptRequest(str(n), cases[n].prompt, cases[n].params, RequestOptions(priority=n % 2))
        for n in order
    ]
    found = {}
    for output in engine.stream(requests):
        assert isinstance(output, RequestOutput), output
        found[int(output.request_id)] = output
    return found


def in_company(world: World, cases: list[Case], runs: Sequence[Run]) -> list[str]:
    """One line per answer that differs."""
    model, bad = the_model(), []
    for run in runs:
        engine = engine_for(world, model, cases, run)
        outputs = outputs_of(engine, cases, run)
        if not engine.is_driver:
            assert not outputs
            continue
        assert outputs.keys() == set(range(len(cases)))
        for n, case in enumerate(cases):
            got = tuple((a.token_ids, a.finish_reason) for a in outputs[n].outputs)
            if got != case.want:
                bad.append(f"{world.size} ranks, {run}, request {n}: {got}, not {case.want}")
        metrics = [output.metrics for output in outputs.values()]
        assert (sum(m.cached_tokens for m in metrics) > 0) is run.caching, run
        preemptions = sum(m.num_preemptions for m in metrics)
        assert (preemptions > 0) is run.tiny, (run, preemptions)
        scheduler = engine._driver.scheduler
        scheduler.check_integrity()
        assert sum(map(scheduler.allocator.num_used, range(world.size))) == 0
    return bad


@pytest.mark.parametrize("size", [1, 3])
def test_tokens_are_independent_of_company(size: int, cases: list[Case]) -> None:
    runs = RUNS if size > 1 else [RUNS[n] for n in ON_ONE_RANK]
    assert {run.placement for run in runs} == set(PLACEMENTS)
    results = run_ranks(in_company, size, cases, runs, timeout=280)
    assert not sum(results, [])


# --- log-probabilities

SCORED = (
    SamplingParams(temperature=0.0, max_tokens=6, logprobs=5, prompt_logprobs=3),
    SamplingParams(temperature=0.0, max_tokens=5, logprobs=0, prompt_logprobs=0),
    SamplingParams(temperature=0.7, max_tokens=6, logprobs=20, prompt_logprobs=20, seed=3),
    SamplingParams(temperature=1.1, max_tokens=6, logprobs=2, seed=-9, top_k=30, n=2,
                   logit_bias={4: 2.5, 90: -100.0}, repetition_penalty=1.3),
    SamplingParams(temperature=0.0, max_tokens=6, prompt_logprobs=1, presence_penalty=1.0),
)  # fmt: skip
SCORED_LENGTHS = (150, 1, 66, 33, 90, 2, 17)
Scored = tuple[Ids, SamplingParams, RequestOutput]


def scored(world: World, prompts: list[Ids]) -> list[list[Scored]]:
    """Every run's outputs, on rank 0."""
    model, found = the_model(), []
    params = [SCORED[n % len(SCORED)] for n in range(len(prompts))]
    wide = [Case(prompt, how) for prompt, how in zip(prompts, params, strict=True)]
    for n, mode in enumerate(EVERYWHERE):
        budget = ("auto", 16, 50)[n % 3]
        run = Run("together", mode, PLACEMENTS[n % 3], tiny=n % 2 == 0,
                  scheduler={"max_num_batched_tokens": budget})  # fmt: skip
        outputs = outputs_of(engine_for(world, model, wide, run), wide, run)
        found.append([(c.prompt, c.params, outputs[i]) for i, c in enumerate(wide) if outputs])
    return found


def check_row(name: str, row: TokenLogprob, token: int, wish: int, want_V: torch.Tensor) -> None:
    """One token's log-probability and the best ``wish``, against the whole distribution."""
    assert row.token_id == token and len(row.top) == wish, name
    assert abs(row.logprob - float(want_V[token])) < 1e-4, (name, row.logprob, want_V[token])
    best = torch.topk(want_V, wish).values.tolist() if wish else []
    assert len({i for i, _ in row.top}) == wish, name
    for (i, value), ranked in zip(row.top, best, strict=True):
        assert abs(value - float(want_V[i])) < 1e-4, (name, i, value)
        assert abs(value - ranked) < 1e-4, f"{name}: the best first"


@torch.inference_mode()
def check_scores(name: str, model: PreTrainedModel, scored: Scored) -> int:
    """Compare one output with transformers' log_softmax of its own sequence; how many rows."""
    prompt, params, output = scored
    rows = 0
    for answer in output.outputs:
        ids = [*prompt, *answer.token_ids]
        logits_TV = model(torch.tensor([ids])).logits[0].double()
        plain_TV = torch.log_softmax(logits_TV, dim=-1)
        if params.prompt_logprobs is None:
            assert output.prompt_logprobs is None
        else:
            assert output.prompt_logprobs is not None
            first, *rest = output.prompt_logprobs
            assert first is None and len(rest) == len(prompt) - 1
            for n, row in enumerate(rest, 1):
                assert row is not None
                check_row(
                    f"{name} prompt {n}", row, ids[n], params.prompt_logprobs, plain_TV[n - 1]
                )
            rows += len(rest)
        for token, bias in params.logit_bias.items():
            logits_TV[:, token] += bias
        biased_TV = torch.log_softmax(logits_TV, dim=-1)
        if params.logprobs is None:
            assert answer.logprobs is None
            continue
        assert answer.logprobs is not None and len(answer.logprobs) == len(answer.token_ids) > 0
        for n, row in enumerate(answer.logprobs, len(prompt)):
            check_row(f"{name} answer {n}", row, ids[n], params.logprobs, biased_TV[n - 1])
        rows += len(answer.logprobs)
    return rows


@pytest.mark.parametrize("size", [1, 3])
def test_logprobs_equal_transformers(size: int) -> None:
    rng = random.Random(5)
    lengths = [SCORED_LENGTHS[n % len(SCORED_LENGTHS)] for n in range(2 * len(SCORED))]
    prompts = [tuple(rng.randrange(1, VOCAB) for _ in range(length)) for length in lengths]
    results = run_ranks(scored, size, prompts, timeout=200)
    model = the_model()
    for mode, outputs in zip(EVERYWHERE, results[0], strict=True):
        with one_thread():
            rows = [check_scores(f"{size} ranks {mode}", model, output) for output in outputs]
        assert len(rows) == len(prompts) and sum(rows) > 400
