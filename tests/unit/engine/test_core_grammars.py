"""Constrained requests in plans: what travels with them, once, and what their failure ends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec
import pytest

from ds_cp.engine.core import EngineCore
from ds_cp.errors import GrammarBusyError, RequestError
from ds_cp.grammar.constraint import StructuredOutputsParams
from ds_cp.grammar.limits import MAX_GRAMMAR_BYTES
from ds_cp.grammar.vocabulary import Vocabulary
from ds_cp.outputs import Delta
from ds_cp.plan import NO_GRAMMAR, Outcome, Sampled, StepPlan
from ds_cp.sampling_params import SamplingParams
from ds_cp.worker.state import WorkerState
from tests.helpers.cluster import EOS, Cluster

WISH = StructuredOutputsParams(regex="a+")
VOCABULARY = Vocabulary.of([b"a", b"b"], [])
SEPARATE = 7  # a stop token of the request's own


@dataclass
class Desk:
    vocabulary: Vocabulary = VOCABULARY
    refusal: Exception | None = None

    def check(self, wanted: StructuredOutputsParams) -> str:
        if self.refusal:
            raise self.refusal
        return wanted.source


@pytest.fixture
def core() -> EngineCore:
    core = Cluster([64], 4).core
    core.grammars = Desk()  # type: ignore[assignment]
    return core


def constrained(n: int = 1, **more: Any) -> SamplingParams:
    return SamplingParams(structured_outputs=WISH, n=n, max_tokens=4, temperature=0.0, **more)


def add(core: EngineCore, name: str, params: SamplingParams) -> None:
    core.add(name, [9, 10, 11, 12, 13], params, None, core.grammar_of(params))


def step(core: EngineCore, token: int = 20, **others: int) -> tuple[StepPlan, list[Delta]]:
    """One step, in which every request draws ``token``, but those by name."""
    names = {r.number: r.request_id for r in (*core.scheduler.running, *core.scheduler.waiting)}
    plan = core.plan()
    assert plan is not None
    drawn = [chunk.request for chunk in plan.chunks if chunk.samples]
    drawn += [number for decodes in plan.decodes for number in decodes.requests]
    tokens = tuple(Sampled(n, others.get(names.get(n, ""), token), -1.0) for n in drawn)
    return plan, core.apply(Outcome(plan.step, tokens))


def test_the_vocabulary_travels_once_before_the_first_grammar(core: EngineCore) -> None:
    add(core, "free", SamplingParams(max_tokens=9))
    plan, _ = step(core)
    assert plan.vocabulary is None and plan.begins[0].sampling.grammar == ""
    add(core, "one", constrained(stop_token_ids=[SEPARATE]))
    plan, _ = step(core)
    assert plan.vocabulary == VOCABULARY
    (begin,) = plan.begins
    assert begin.sampling.grammar == WISH.source
    assert begin.sampling.ends == tuple(sorted((EOS, SEPARATE)))
    assert begin.sampling.looks_back and not begin.sampling.penalizes
    add(core, "two", constrained())
    for _ in range(3):
        plan, _ = step(core)
        assert plan.vocabulary is None


def test_a_vocabulary_goes_out_although_nothing_else_fits() -> None:
    core = Cluster([64], 4).core
    large = Vocabulary.of([b"x" * 60_000] * 200, [])
    core.scheduler.tell_vocabulary(large)
    plan = core.plan()
    assert plan is not None and plan.vocabulary == large and not plan.begins
    core.apply(Outcome(plan.step))
    assert core.plan() is None


def test_answers_to_one_prompt_have_one_grammar_on_the_wire(core: EngineCore) -> None:
    add(core, "three", constrained(n=3))
    state = WorkerState(0, 4)
    plan, _ = step(core)
    state.apply(plan)
    assert len(plan.forks) == 2
    assert all(fork.sampling.grammar == "" and fork.sampling.ends for fork in plan.forks)
    assert [s.sampling.grammar for s in state.sequences.values()] == [WISH.source] * 3
    # Ranks are told of outputs, as for penalties.
    plan, _ = step(core)
    assert {number for number, _, _ in plan.seen} >= {plan.seen[0][0]} and plan.seen


def test_a_grammar_that_fails_ends_one_answer_with_the_field(core: EngineCore) -> None:
    add(core, "good", constrained())
    add(core, "bad", constrained())
    step(core)
    _, deltas = step(core, bad=NO_GRAMMAR)
    ended = {delta.request_id: (delta.finish_reason, delta.stop_reason) for delta in deltas}
    assert ended == {"good": (None, None), "bad": ("error", "structured_outputs")}
    _, deltas = step(core)
    assert [delta.request_id for delta in deltas] == ["good"]


def test_end_tokens_and_stop_tokens_end_the_answer(core: EngineCore) -> None:
    add(core, "eos", constrained(stop_token_ids=[SEPARATE]))
    add(core, "stop", constrained(stop_token_ids=[SEPARATE]))
    step(core)
    _, deltas = step(core, eos=EOS, stop=SEPARATE)
    ended = {delta.request_id: (delta.finish_reason, delta.stop_reason) for delta in deltas}
    assert ended == {"eos": ("stop", None), "stop": ("stop", SEPARATE)}


def test_a_refused_grammar_is_a_request_error(core: EngineCore) -> None:
    assert core.grammar_of(SamplingParams()) == ""
    core.grammars = Desk(refusal=GrammarBusyError("busy"))  # type: ignore[assignment]
    with pytest.raises(RequestError, match="busy") as caught:
        core.grammar_of(constrained())
    assert caught.value.param == "structured_outputs"


def test_the_bound_of_a_begin_counts_its_grammar(core: EngineCore) -> None:
    limits = core.scheduler.limits
    most = limits.begin_bytes(5, 4, constrained())
    assert most - limits.begin_bytes(5, 4, SamplingParams()) == MAX_GRAMMAR_BYTES
    add(core, "one", constrained(stop_token_ids=list(range(60))))
    plan, _ = step(core)
    size = len(msgspec.msgpack.encode(plan.begins[0]))
    assert size <= limits.begin_bytes(5, 4, constrained(stop_token_ids=list(range(60))))
