"""Calls of an engine that fail in a step, or that meet each other."""

from __future__ import annotations

import pytest

from ds_cp.comm.wire import World
from ds_cp.engine.llm import PromptRequest
from ds_cp.sampling_params import RequestOptions, SamplingParams
from ds_cp.plan import Outcome, StepPlan
from ds_cp.errors import EngineDeadError, RequestError
from tests.helpers.engines import engine_on, tiny_llama
from tests.helpers.ranks import run_ranks

GREEDY = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
KV = {"kv_cache": {"tokens_per_rank": 128, "block_size": 4}}


def failing_step(world: World) -> None:
    """What was planned and never computed could be found in the prefix cache."""
    engine = engine_on(world, tiny_llama(), KV)
    whole, count = engine._worker.lead, 0

    def lead(plan: StepPlan) -> Outcome:
        nonlocal count
        count += isinstance(plan, StepPlan)
        if count == 2 and isinstance(plan, StepPlan):
            raise MemoryError("out of memory")
        return whole(plan)

    engine._worker.lead = lead  # type: ignore[method-assign]
    prompt = list(range(10, 40))
    with pytest.raises(MemoryError):
        engine.generate(prompt, GREEDY)
    with pytest.raises(EngineDeadError, match="step of an earlier call failed"):
        engine.generate(prompt, GREEDY)
    assert count == 2, "nothing more was run"


def meeting_calls(world: World) -> None:
    engine = engine_on(world, tiny_llama(), KV)
    prompt = list(range(10, 30))
    salted = RequestOptions(cache_salt="\ud800")  # half a character, which Python strings can hold
    requests = [PromptRequest(str(i), prompt, GREEDY, salted) for i in range(3)]
    stream = engine.stream(requests)
    first = next(stream)
    with pytest.raises(RequestError, match="another generate or stream"):
        engine.generate(prompt, GREEDY)
    rest = list(stream)
    said = [out.outputs[0].token_ids for out in (first, *rest)]  # type: ignore[union-attr]
    assert len(said) == 3 and len(set(said)) == 1
    [again] = engine.generate(prompt, GREEDY)
    assert again.outputs[0].token_ids == said[0]


@pytest.mark.parametrize("scene", [failing_step, meeting_calls])
def test_calls(scene: object) -> None:
    run_ranks(scene, 1)  # type: ignore[arg-type]
