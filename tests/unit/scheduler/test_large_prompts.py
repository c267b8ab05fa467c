"""Prompts of many tokens: what they cost to begin, to copy, and to look up while they wait."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_cp.comm.control import Control
from ds_cp.errors import RequestError
from ds_cp.plan import MAX_PLAN_BYTES, Begin, StepPlan
from ds_cp.sampling_params import SamplingParams
from ds_cp.scheduler import admission, prefill
from ds_cp.scheduler.admission import BEGIN_BYTES, Limits
from ds_cp.scheduler.prefill import PrefillPlanner
from ds_cp.scheduler.request import KnownTokens, Request
from ds_cp.serve import channel
from tests.helpers.cluster import Cluster, greedy, prompt, sampled

# --- what a plan carries


def test_every_channel_carries_what_the_scheduler_may_plan() -> None:
    assert BEGIN_BYTES < MAX_PLAN_BYTES == Control.LIMIT
    assert channel.LIMIT == MAX_PLAN_BYTES + channel.GENERATION_BYTES


@pytest.mark.parametrize(("vocab", "least"), [(128, 50e6), (50_000, 18e6), (200_000, 11e6)])
def test_ten_million_tokens_fit_in_a_plan(vocab: int, least: float) -> None:
    limits = Limits(10**9, 8, 8192, 8, vocab, (2,))
    most = limits.begin_tokens(64, SamplingParams())
    assert most >= least
    assert limits.begin_bytes(most, 64, SamplingParams()) <= BEGIN_BYTES
    assert limits.begin_bytes(most + 64, 64, SamplingParams()) > BEGIN_BYTES


@given(
    vocab=st.sampled_from([2, 128, 129, 256, 257, 65_536, 65_537, 300_000]),
    length=st.integers(1, 300),
    size=st.integers(1, 64),
    bias=st.integers(0, 20),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_no_begin_is_larger_than_reckoned(
    vocab: int, length: int, size: int, bias: int, data: st.DataObject
) -> None:
    """With the largest ids, ranks and blocks, all of the prompt found, and every field in use."""
    limits = Limits(10**9, 8, 8192, 8, vocab, (vocab - 1,))
    params = SamplingParams(
        temperature=0.123456789, top_p=0.5, top_k=2**31 - 1, min_p=0.25, logprobs=20,
        prompt_logprobs=20, logit_bias={vocab + 2**30 + i: -1.5 for i in range(bias)},
        min_tokens=2**31 - 1, max_tokens=2**31 - 1,
        stop_token_ids=tuple(2**30 + i for i in range(bias)),
        presence_penalty=1.25, frequency_penalty=-1.25, repetition_penalty=1.1,
    )  # fmt: skip
    planner = PrefillPlanner.__new__(PrefillPlanner)
    planner._limits = limits
    request = Request(2**40, "x", (vocab - 1,) * length, params, 9, -(2**63))
    sampling = planner.sampling(request)
    homes = tuple((2**16 - 1, 2**32 - 1) for _ in range(length // size))
    begin = Begin(request.number, request.prompt, length, homes, length // size * size, sampling)
    assert len(msgspec.msgpack.encode(begin)) <= limits.begin_bytes(length, size, params)


@pytest.fixture
def small_plans(monkeypatch: pytest.MonkeyPatch) -> int:
    """Begins of a plan may have 4,000 bytes: about 750 tokens of three bytes in blocks of four."""
    for module in (admission, prefill):
        monkeypatch.setattr(module, "BEGIN_BYTES", 4000)
    return 4000


def begin_bytes(plan: StepPlan) -> int:
    return len(msgspec.msgpack.encode(plan.begins))


@pytest.mark.parametrize("depth", [1, 2])
def test_prompts_that_do_not_fit_in_one_plan_begin_in_several(small_plans: int, depth: int) -> None:
    """Two prompts of ten million tokens in one step ended the engine."""
    cluster = Cluster([2000], depth=depth)
    asked = [cluster.add(prompt(length, i), greedy(3)) for i, length in enumerate((500, 500, 90))]
    plans = cluster.settle()
    begins = [[b.request for b in plan.begins] for plan in plans if plan.begins]
    assert begins == [[asked[0].number], [asked[1].number, asked[2].number]], "in their order"
    assert all(begin_bytes(plan) <= small_plans for plan in plans)
    assert cluster.check_outputs() == 3


def test_one_prompt_that_fits_in_no_plan_is_refused_with_the_numbers(small_plans: int) -> None:
    """Counting what it may have grown to when it is preempted and begins again."""
    cluster = Cluster([4000])
    most = cluster.scheduler.limits.begin_tokens(4, greedy(1))
    assert 600 < most < 800
    with pytest.raises(RequestError, match=f"{most + 1} tokens") as caught:
        cluster.add(prompt(most + 1), greedy(1))
    assert str(most) in str(caught.value) and "4000 bytes" in str(caught.value)
    assert caught.value.param == "prompt"
    with pytest.raises(RequestError, match=f"at most {most} ") as caught:
        cluster.add(prompt(most - 9), greedy(11))
    assert caught.value.param == "max_tokens"
    request = cluster.add(prompt(most - 9), greedy(None))
    assert request.max_tokens == 10
    while len(request.output) < 9:
        cluster.step()
    cluster.scheduler._preempt(request)
    plans = cluster.settle()
    assert max(map(begin_bytes, plans)) <= small_plans
    cluster.check_outputs()


# --- what it costs to keep


@given(st.lists(st.integers(0, 9), max_size=8), st.lists(st.integers(0, 9), max_size=8), st.data())
def test_known_tokens_are_those_of_a_list(
    first: list[int], output: list[int], data: st.DataObject
) -> None:
    tokens, want = KnownTokens(tuple(first), output), [*first, *output]
    assert len(tokens) == len(want) and list(tokens) == want
    some = data.draw(st.slices(len(want)))
    assert list(tokens[some]) == want[some]
    for index in range(-len(want), len(want)):
        assert tokens[index] == want[index]
    for index in (len(want), -len(want) - 1):
        with pytest.raises(IndexError):
            tokens[index]


def test_the_answers_to_a_prompt_share_it() -> None:
    """64 answers to a prompt of 100,000 tokens: one copy of 0.8 MB, where there were 128."""
    cluster = Cluster([200_000], max_num_seqs=64, max_model_len=10**6)
    ids = [7] * 100_000
    tracemalloc.start()
    first = cluster.scheduler.admit("a", ids, sampled(2, n=64), 1)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert all(r.prompt is first.prompt for r in first.siblings) and len(first.siblings) == 63
    assert peak < 2 * 8 * 100_000


# --- what it costs to wait


def counting(cluster: Cluster) -> Callable[[], int]:
    """How many keys have been looked up since the last call."""
    allocator, counts = cluster.scheduler.allocator, [0]
    find = allocator.find

    def counted(key: bytes) -> tuple[int, int] | None:
        counts[0] += 1
        return find(key)

    allocator.find = counted  # type: ignore[method-assign]

    def since() -> int:
        count, counts[0] = counts[0], 0
        return count

    return since


@pytest.mark.parametrize("depth", [1, 2])
def test_the_prefix_of_a_waiting_request_is_not_looked_up_in_every_step(depth: int) -> None:
    """300,000 tokens on eight ranks: 28 ms a step, thousands of keys for each rank."""
    cluster = Cluster([100] * 8, 4, depth=depth)
    base = prompt(1200)
    first = cluster.add(base, greedy(400))
    other = cluster.add(prompt(1400, 9), greedy(400))
    while first.prefilling or other.prefilling:
        cluster.step()
    waiting = cluster.add([*base, *[7] * 800], greedy(5))
    cluster.step()
    assert waiting in cluster.scheduler.waiting
    since = counting(cluster)
    for _ in range(20):
        cluster.step()
    assert since() <= 20 * 8, "a few keys a step: those of blocks that become full, and one more"
    cluster.abort(other)
    cluster.step()
    assert waiting.cached_tokens == 1200, "it starts as soon as there is room"
    cluster.settle()
    cluster.check_outputs()


def test_a_waiting_request_starts_when_its_prefix_appears() -> None:
    """No rank gets more room; what it lacks is computed by another request meanwhile."""
    cluster = Cluster([40], 4, budget=20)
    shared = prompt(100)
    first = cluster.add(shared, greedy(4))
    cluster.step()
    waiting = cluster.add([*shared, *[7] * 20], greedy(5))
    cluster.step()
    assert waiting in cluster.scheduler.waiting and first.prefilling
    while first.prefilling:
        cluster.step()
    cluster.step()
    assert waiting not in cluster.scheduler.waiting and waiting.cached_tokens == 100
    cluster.settle()
    cluster.check_outputs()


@pytest.mark.parametrize("how", ["reopen", "finish", "alone"])
def test_a_refusal_ends_with_its_reason(how: str) -> None:
    cluster = Cluster([30, 30], 4)
    running = cluster.add(prompt(60), greedy(60))
    cluster.step()
    if how == "reopen":
        (rank,) = {rank for rank, _ in running.table.homes}
        cluster.scheduler.drain(1 - rank)
    waiting = cluster.add(prompt(90 if how == "reopen" else 200, 5), greedy(4))
    for _ in range(3):
        cluster.step()
        assert waiting in cluster.scheduler.waiting
    if how == "reopen":
        cluster.scheduler.reopen(1 - rank)
    elif how == "finish":
        cluster.abort(running)
    else:
        cluster.scheduler._preempt(running)
        assert cluster.scheduler.waiting.first() is running
    cluster.settle()
    assert cluster.check_outputs() == 2 - (how == "finish")


def test_a_refusal_ends_when_its_prefix_is_in_use() -> None:
    """Cached blocks count as room until others share them: no more of it, and yet it fits."""
    cluster = Cluster([20], 4)
    shared = prompt(24)
    before = cluster.add(shared, greedy(1))
    cluster.settle()
    assert before.finish_reason == "length"
    ends, stays = cluster.add([9] * 20, greedy(10)), cluster.add([8] * 12, greedy(10))
    cluster.step()
    waiting = cluster.add([*shared, *[7] * 20], greedy(4))
    cluster.step()
    assert waiting in cluster.scheduler.waiting and waiting.refusal is not None
    room = waiting.refusal.room
    sharing = cluster.add([*shared, 6], greedy(3), priority=-1)
    cluster.step()
    assert sharing in cluster.scheduler.running
    cluster.abort(ends)
    assert cluster.scheduler.block_manager.room()[0] <= room[0]
    cluster.step()
    assert stays in cluster.scheduler.running
    assert waiting in cluster.scheduler.running
    cluster.settle()
    cluster.check_outputs()
