"""Requests that go on with the tokens that they had: the same follows as without the break."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from ds_cp.engine.core import EngineCore
from ds_cp.errors import RequestError
from ds_cp.outputs import Delta
from ds_cp.plan import Outcome, Sampled
from ds_cp.sampling_params import KnownAnswer, RequestOptions, SamplingParams
from tests.helpers.cluster import Cluster
from tests.unit.engine.test_core import BROKEN, BrokenTokenizer, run

PROMPT = list(range(10, 20))
TEXT = "one two STOP three"


def core_of() -> EngineCore:
    return EngineCore(Cluster([64], 4).scheduler, BrokenTokenizer())


def whole(deltas: Sequence[Delta]) -> tuple[list[int], str, str | None]:
    ids = [token for delta in deltas for token in delta.token_ids]
    return ids, "".join(d.text for d in deltas), deltas[-1].finish_reason


@pytest.mark.parametrize("had", range(1, 8))
def test_what_follows_is_what_would_have(had: int) -> None:
    tokens = BrokenTokenizer().ids(TEXT)
    params = SamplingParams(max_tokens=50, stop=("STOP",))
    core = core_of()
    core.add("x", PROMPT, params)
    undisturbed = run(core, {"x": tokens})["x"]
    core = core_of()
    known = (KnownAnswer(tuple(tokens[:had])),)
    core.add("x", PROMPT, params, RequestOptions(known=known))
    assert core.progress("x") is None
    rest = run(core, {"x": tokens[had:]})["x"]
    assert whole([*undisturbed[:had], *rest]) == whole(undisturbed)
    assert [d.text for d in rest] == [d.text for d in undisturbed[had:]]
    assert rest[0].cached_tokens is None and undisturbed[0].cached_tokens == 0
    core.check_integrity()


def test_some_answers_had_ended() -> None:
    core = core_of()
    known = (
        KnownAnswer((30, 31), "stop", 31),
        KnownAnswer((40,)),
        KnownAnswer(),
    )
    options = RequestOptions(known=known)
    assert options.num_ended == 1
    requests = core.add("x", PROMPT, SamplingParams(n=3, max_tokens=4), options)
    assert [len(r.output) for r in requests] == [2, 1, 0]
    assert len(core.scheduler.waiting) == 2 and requests[0].finish_reason == "stop"
    deltas = []
    while core.has_work:
        plan = core.plan()
        assert plan is not None
        drawn = [c.request for c in plan.chunks if c.samples]
        drawn += [n for d in plan.decodes for n in d.requests]
        deltas += core.apply(Outcome(plan.step, tuple(Sampled(n, 50, -1.0) for n in drawn)))
    by_index = {i: whole([d for d in deltas if d.index == i]) for i in (1, 2)}
    assert by_index[1][0] == [50] * 3 and by_index[2][0] == [50] * 4
    assert {d.index for d in deltas} == {1, 2}
    core.check_integrity()


def test_tokens_that_cannot_be_read() -> None:
    core = core_of()
    options = RequestOptions(known=(KnownAnswer((30, BROKEN)),))
    with pytest.raises(RequestError, match="cannot decode what the answer has"):
        core.add("x", PROMPT, SamplingParams(max_tokens=4), options)
    assert not core.has_work
