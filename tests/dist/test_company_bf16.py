"""In bf16 too a request's tokens and log-probabilities do not depend on the requests beside it.

26 requests on the same ranks, alone, together and in random orders: the same bits. bf16 rounds
coarsely, so a sum in another order would soon show as another token. It needs a kernel whose order
of sums follows from positions alone, and linear layers whose order does not follow from the number
of rows: the native library has both, and on CUDA ``attention.deterministic`` takes Triton's.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from ds_cp.comm.wire import World
from ds_cp.engine.llm import PromptRequest
from ds_cp.native import Library, load
from ds_cp.outputs import RequestOutput
from ds_cp.sampling_params import SamplingParams
from tests.helpers.engines import engine_on, tiny_llama
from tests.helpers.ranks import run_ranks

LIBRARY = load()
pytestmark = pytest.mark.cpu_only("the native CPU kernel; has a test of its own marked gpu")
COUNT, VOCAB = 26, 128
LENGTHS = (1, 2, 3, 5, 8, 13, 16, 17, 31, 47, 64, 90, 131)
Answer = tuple[tuple[int, ...], tuple[float, ...]]  # tokens, their log-probabilities


def requests() -> list[tuple[tuple[int, ...], SamplingParams]]:
    """Prompts of all lengths; half of them share a beginning; greedy and sampled ones."""
    draw = random.Random(7)
    shared = [draw.randrange(VOCAB) for _ in range(40)]
    made = []
    for n in range(COUNT):
        length = LENGTHS[n % len(LENGTHS)]
        own = [draw.randrange(VOCAB) for _ in range(length)]
        prompt = (shared + own)[:length] if n % 2 else own
        params = SamplingParams(
            max_tokens=6 + n % 9, temperature=0.8 if n % 3 == 2 else 0.0, seed=n, logprobs=2
        )
        made.append((tuple(prompt), params))
    return made


def answers(
    world: World, config: dict[str, Any], runs: tuple[str, ...], kernel: str = "cpu"
) -> list[list[Answer]]:
    """Of each run in ``runs``, by the number of the request; rank 0 only."""
    model = tiny_llama(initializer_range=0.2, hidden_size=72, intermediate_size=200, head_dim=16)
    model = model.to(torch.bfloat16)
    engine = engine_on(world, model, {"dtype": "bf16", **config})
    assert engine.facts.kernel == kernel
    cases = requests()
    found: list[list[Answer]] = []
    for run in runs:
        order = list(range(COUNT))
        if run != "together":
            random.Random(run).shuffle(order)
        if run == "alone":
            outputs = {n: out for n in order for out in engine.generate(*cases[n])}
        else:
            wanted = [PromptRequest(str(n), *cases[n]) for n in order]
            outputs = {}
            for output in engine.stream(wanted):
                assert isinstance(output, RequestOutput), output
                outputs[int(output.request_id)] = output
        if engine.is_driver:
            assert sorted(outputs) == list(range(COUNT))
            found.append([answer_of(outputs[n]) for n in range(COUNT)])
    return found


def answer_of(output: RequestOutput) -> Answer:
    [only] = output.outputs
    assert only.logprobs is not None
    return only.token_ids, tuple(one.logprob for one in only.logprobs)


RUNS = ("alone", "together", "one order", "another order")
CONFIG: dict[str, Any] = {
    "context_parallel": {"mode": "local"},
    "kv_cache": {"block_size": 16, "tokens_per_rank": 2048},
    "scheduler": {"max_num_batched_tokens": 100},
}


@pytest.mark.skipif(
    not isinstance(LIBRARY, Library) or LIBRARY.isas[0] == "baseline",
    reason=f"needs the native library and AVX2: {LIBRARY}",
)
@pytest.mark.parametrize("size", (1, 2))
def test_answers_in_bf16_are_the_same_in_any_company(size: int) -> None:
    config = {**CONFIG, "linear_layers": "packed"}
    compare(run_ranks(answers, size, config, RUNS, timeout=120)[0])


@pytest.mark.gpu
@pytest.mark.parametrize("size", (1, 2))
def test_answers_in_bf16_on_a_gpu(size: int) -> None:
    """Two ranks share it."""
    config = {**CONFIG, "attention": {"deterministic": True}}
    compare(run_ranks(answers, size, config, RUNS, "triton", timeout=280, device="cuda")[0])


def compare(answers: list[list[Answer]]) -> None:
    """Of ``RUNS``."""
    alone, *others = answers
    assert len({tokens for tokens, _ in alone}) > COUNT // 2, "the model says something"
    for run, found in zip(RUNS[1:], others, strict=True):
        differ = [n for n in range(COUNT) if found[n] != alone[n]]
        assert not differ, f"{run}: requests {differ}"
