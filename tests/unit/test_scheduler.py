"""The scheduler against a pretended cluster whose memory remembers which token was stored where."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_cp.engine.params import SamplingParams
from ds_cp.engine.plan import Item, StepPlan, check_item, decode_plan, encode_plan
from ds_cp.engine.policy import ModePolicy
from ds_cp.engine.request import Request
from ds_cp.engine.scheduler import Limits, Scheduler
from ds_cp.errors import CapacityError, QueueFullError, RequestError
from ds_cp.layout import LAYOUTS, Runs, positions

VOCAB = 1000
EOS = 999
PLACEMENTS = ("fill_then_spill", "round_robin", "balanced")
MODES = (("auto", "auto"), ("local", "auto"), ("ring", "kv"), ("ring", "q"), ("tree", "auto"))


def expected_token(prompt: Sequence[int], index: int) -> int:
    """What the pretended model says: a function of the request alone, never the end token."""
    return (sum(prompt) * 31 + len(prompt) * 17 + index * 7919) % EOS


class Cluster:
    """Executes plans on a memory of slots. Whatever a plan reads must be what was written there
    for that very token, so KV that moved, was overwritten or was never computed is seen at once."""

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
        max_queue: int = 100,
        num_hosts: int = 1,
    ) -> None:
        self.scheduler = Scheduler(
            Limits(max_model_len, max_num_seqs, budget, max_queue, VOCAB, (EOS,)),
            blocks, block_size, placement, layout,
            ModePolicy(*mode, local_threshold, num_hosts, 4, 2),
            tuple(range(len(blocks))),
        )  # fmt: skip
        self.blocks = tuple(blocks)
        self.block_size = block_size
        self.mode = mode
        self.budget = budget
        self.requests: dict[int, Request] = {}
        self.memory: dict[tuple[int, int], tuple[int, int, int]] = {}  # slot -> request, pos, token
        self.started: list[int] = []  # request numbers in the order of their first step

    def add(self, prompt: Sequence[int], params: SamplingParams | None = None) -> Request:
        params = params or SamplingParams(max_tokens=3)
        request = self.scheduler.admit(f"r{len(self.requests)}", prompt, params, seed=11)
        self.requests[request.number] = request
        return request

    def step(self) -> StepPlan | None:
        """Schedule, pass the plan over the wire, execute and check it, give the tokens back."""
        before = {r.number: (r.num_computed, r.num_preemptions) for r in self.requests.values()}
        plan = self.scheduler.schedule()
        self.scheduler.check_integrity()
        if plan is None:
            return None
        assert plan.kind == "run" and plan.items
        assert decode_plan(encode_plan(plan)) == plan
        numbers = [item.request for item in plan.items]
        assert len(numbers) == len(set(numbers)), "a request twice in one step"
        decodes = sum(len(item.tokens) == 1 for item in plan.items)
        assert sum(len(item.tokens) for item in plan.items) <= max(self.budget, decodes)
        assert len(self.scheduler.running) <= self.scheduler.limits.max_num_seqs
        for request in self.scheduler.running:
            if request.num_computed == request.num_tokens:
                assert not any(request.spare.values()), "blocks held for tokens that came by"
        for item in plan.items:
            computed, preemptions = before[item.request]
            request = self.requests[item.request]
            assert item.start == (computed if request.num_preemptions == preemptions else 0)
            self._execute(item, request)
        for item in plan.items:
            if item.sampling is not None:
                request = self.requests[item.request]
                assert item.sampling.index == len(request.output)
                token = expected_token(request.prompt, item.sampling.index)
                self.scheduler.took(request, EOS if self._ends(request) else token)
        self.scheduler.check_integrity()
        return plan

    def _ends(self, request: Request) -> bool:
        """Prompts that begin with 7 get the end token as their third."""
        return request.prompt[0] == 7 and len(request.output) == 2

    def _execute(self, item: Item, request: Request) -> None:
        check_item(item)
        if item.request not in self.started:
            self.started.append(item.request)
        known = [*request.prompt, *request.output]
        assert list(item.tokens) == known[item.start : item.start + len(item.tokens)]
        whole = item.start + len(item.tokens) == len(known)
        assert (item.sampling is not None) == whole, "sampled iff every known token is computed"
        self._check_mode(item)
        held: list[int] = []
        for shard in item.shards:
            assert 0 <= shard.rank < len(self.blocks)
            places = list(zip(positions(shard.k_runs), positions(shard.extents), strict=True))
            for pos, slot in places[len(places) - shard.new :]:
                assert 0 <= slot < self.blocks[shard.rank] * self.block_size
                assert item.start <= pos
                self.memory[shard.rank, slot] = (item.request, pos, known[pos])
            for pos, slot in places:
                assert self.memory[shard.rank, slot] == (item.request, pos, known[pos])
            held += [pos for pos, _ in places]
        assert sorted(held) == list(range(item.start + len(item.tokens)))

    def _check_mode(self, item: Item) -> None:
        mode, ring_pass = self.mode
        if mode == "auto":
            ranks, new = len(item.shards), len(item.tokens)
            assert item.mode == ("local" if ranks == 1 else "tree" if new == 1 else "ring")
        else:
            assert item.mode == mode
        if mode == "local":
            assert len(item.shards) == 1
        if item.mode == "ring" and ring_pass != "auto":
            assert item.ring_pass == ring_pass

    def drain(self, limit: int = 3000) -> list[StepPlan]:
        """Step until nothing is left to do. The scheduler may say "nothing now" once in a row,
        when the only request gave its blocks back."""
        plans: list[StepPlan] = []
        silent = 0
        while self.scheduler.has_work:
            plan = self.step()
            silent = 0 if plan else silent + 1
            assert silent < 2, "work is waiting and nothing runs"
            if plan:
                plans.append(plan)
            assert len(plans) < limit, "it does not end"
        assert sum(map(self.used, range(len(self.blocks)))) == 0, "blocks leaked"
        return plans

    def used(self, rank: int) -> int:
        return self.scheduler.allocator.num_used(rank)

    def check_output(self, request: Request) -> None:
        """Every token is the one the request alone would have got."""
        count = request.max_tokens
        want = [expected_token(request.prompt, i) for i in range(count)]
        reason = "length"
        if request.prompt[0] == 7 and count >= 3:
            want, reason = [*want[:2], EOS], "stop"
        assert request.output == want and request.finish_reason == reason


def prompt(length: int, first: int = 1) -> list[int]:
    return [first, *range(2, length + 1)]


def greedy(max_tokens: int | None, **more: Any) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0.0, **more)


# --- order and batching


def test_first_come_first_served_and_decode_batches_everybody() -> None:
    cluster = Cluster([100], budget=40, max_num_seqs=3)
    asked = [cluster.add(prompt(10 + i), greedy(4)) for i in range(5)]
    first = cluster.step()
    assert first and [i.request for i in first.items] == [1, 2, 3]
    assert [len(i.tokens) for i in first.items] == [10, 11, 12]
    second = cluster.step()
    assert second and [len(i.tokens) for i in second.items] == [1, 1, 1], "one decode step for all"
    cluster.drain()
    assert cluster.started == [1, 2, 3, 4, 5]
    for request in asked:
        cluster.check_output(request)


def test_chunked_prefill_shares_the_step_with_decode() -> None:
    cluster = Cluster([100], budget=16)
    short, long = cluster.add(prompt(6), greedy(8)), cluster.add(prompt(50), greedy(2))
    plans = cluster.drain()
    chunks = [
        len(item.tokens) for plan in plans for item in plan.items if item.request == long.number
    ]
    assert chunks == [10, 15, 15, 10, 1], "what the budget leaves beside one decode token"
    assert all(short.number in [i.request for i in plan.items] for plan in plans[:8])
    sampled = [
        item.sampling is not None
        for plan in plans
        for item in plan.items
        if item.request == long.number
    ]
    assert sampled == [False, False, False, True, True]
    cluster.check_output(short)
    cluster.check_output(long)


def test_a_big_request_at_the_head_is_not_overtaken() -> None:
    cluster = Cluster([8], 4)
    first, big, small = (cluster.add(prompt(n), greedy(2)) for n in (12, 28, 4))
    cluster.step()
    assert cluster.scheduler.running == [first] and list(cluster.scheduler.waiting) == [big, small]
    cluster.drain()
    assert cluster.started == [1, 2, 3]


def test_end_token_stop_ids_and_min_tokens() -> None:
    cluster = Cluster([100])
    seven = cluster.add(prompt(9, first=7), greedy(20))
    ignoring = cluster.add(prompt(9, first=7), greedy(5, ignore_eos=True))
    held = cluster.add(prompt(9, first=7), greedy(5, min_tokens=4))
    word = expected_token(prompt(5), 1)
    stopped = cluster.add(prompt(5), greedy(9, stop_token_ids=(word,)))
    plans = cluster.drain()
    assert (seven.finish_reason, seven.stop_reason, len(seven.output)) == ("stop", None, 3)
    assert (ignoring.finish_reason, len(ignoring.output)) == ("length", 5)
    assert (held.finish_reason, len(held.output)) == ("length", 5), "too early an end is no end"
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", word)
    assert stopped.output[-1] == word and len(stopped.output) == 2
    banned = [i.sampling.banned for p in plans for i in p.items if i.request == held.number]  # type: ignore[union-attr]
    assert banned == [(EOS,), (EOS,), (EOS,), (), ()], "banned until the fourth token may be last"


def test_sampling_fields_travel() -> None:
    cluster = Cluster([10])
    cluster.add(prompt(3), SamplingParams(
        temperature=0.7, top_p=0.9, top_k=5, min_p=0.1, logprobs=2, logit_bias={9: -1.0, 4: 2.0},
        max_tokens=1,
    ))  # fmt: skip
    plan = cluster.step()
    assert plan and plan.items[0].sampling is not None
    how = plan.items[0].sampling
    assert (how.temperature, how.top_p, how.top_k, how.min_p) == (0.7, 0.9, 5, 0.1)
    assert (how.seed, how.index, how.logprobs) == (11, 0, 2)
    assert how.logit_bias == ((4, 2.0), (9, -1.0)) and how.banned == ()


# --- growing, placing


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_local_request_grows_in_place(placement: str) -> None:
    """Local while its rank has room, then over both ranks; what is stored stays where it is."""
    cluster = Cluster([3, 3], 4, placement=placement)
    request = cluster.add(prompt(5), greedy(20))
    spans, extents = [], []
    while cluster.scheduler.has_work:
        plan = cluster.step()
        assert plan
        spans.append(len(plan.items[0].shards))
        extents.append({s.rank: positions(s.extents) for s in plan.items[0].shards})
    home = plan.items[0].shards[0].rank if plan else 0
    assert spans == [1] * 8 + [2] * 12, "12 tokens fill a rank of three blocks"
    for earlier, later in itertools.pairwise(extents):
        for rank, slots in earlier.items():
            assert later[rank][: len(slots)] == slots
    assert len(extents[-1][home]) == 12
    assert request.modes == ["local", "tree"]
    cluster.check_output(request)


def test_local_requests_take_the_rank_with_most_room() -> None:
    cluster = Cluster([4, 8, 6], 4)
    for length in (4, 20, 4, 4):
        cluster.add(prompt(length), greedy(2))
    plan = cluster.step()
    assert plan and [[s.rank for s in item.shards] for item in plan.items] == [[1], [1], [2], [2]]


def test_unequal_budgets_add_up() -> None:
    """[x, 3x] holds 4x: the larger rank stores three quarters and computes half."""
    cluster = Cluster([16, 48], 4)
    request = cluster.add(prompt(4 * 64), greedy(1))
    plan = cluster.step()
    assert plan
    shards = plan.items[0].shards
    assert [sum(n for _, n in s.k_runs) for s in shards] == [64, 192]
    assert [sum(n for _, n in s.q_runs) for s in shards] == [128, 128]
    assert plan.items[0].ships and plan.items[0].mode == "ring"
    cluster.check_output(request)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_of_a_long_prompt(layout: str) -> None:
    cluster = Cluster([20, 20], 4, layout=layout, placement="balanced", mode=("ring", "kv"))
    cluster.add(prompt(64), greedy(1))
    plan = cluster.step()
    want: dict[str, list[Runs]] = {
        "zigzag": [((0, 16), (48, 16)), ((16, 32),)],
        "contiguous": [((0, 32),), ((32, 32),)],
    }
    assert plan and [s.q_runs for s in plan.items[0].shards] == want[layout]
    assert not plan.items[0].ships


def test_local_threshold() -> None:
    """Longer prompts are computed by all ranks although one could hold them."""
    cluster = Cluster([50, 50], 4, local_threshold=40)
    short, long = cluster.add(prompt(40), greedy(2)), cluster.add(prompt(80), greedy(2))
    plan = cluster.step()
    assert plan
    assert plan.items[0].mode == "local" and len(plan.items[0].shards) == 1
    assert plan.items[1].mode == "ring"
    assert [sum(n for _, n in s.q_runs) for s in plan.items[1].shards] == [40, 40]
    cluster.drain()
    assert short.modes == ["local"]
    assert long.modes[0] == "ring"


def test_auto_prefers_tree_over_several_hosts() -> None:
    cluster = Cluster([4, 4, 4], 4, num_hosts=2)
    cluster.mode = ("tree", "auto")  # what the rule must come to, in prefill and decode
    cluster.add(prompt(40), greedy(3))
    cluster.drain()


# --- refusals


def test_refusal_has_the_numbers() -> None:
    cluster = Cluster([2, 6], 4)
    cluster.check_output(run_alone(cluster, 30, 3))  # 30 + 3 - 1 = 32 fits exactly
    with pytest.raises(CapacityError) as caught:
        cluster.add(prompt(30), greedy(4))
    error = caught.value
    assert (error.need, error.have, error.largest) == (33, 32, 32)
    assert all(str(n) in str(error) for n in (33, 32)) and "\n" not in str(error)
    assert error.param == "max_tokens"
    assert not cluster.scheduler.has_work


def test_refusal_when_mode_is_local() -> None:
    """All ranks have 32 together, but one request can only have the largest rank's 24."""
    cluster = Cluster([2, 6], 4, mode=("local", "auto"))
    cluster.check_output(run_alone(cluster, 20, 5))
    with pytest.raises(CapacityError) as caught:
        cluster.add(prompt(20), greedy(6))
    assert (caught.value.need, caught.value.have, caught.value.largest) == (25, 32, 24)
    assert "all ranks together hold 24" not in str(caught.value)


def run_alone(cluster: Cluster, length: int, max_tokens: int | None) -> Request:
    request = cluster.add(prompt(length), greedy(max_tokens))
    cluster.drain()
    return request


@pytest.mark.parametrize(
    ("blocks", "model_len", "length", "want"),
    [([2, 6], 10_000, 30, 3), ([2, 6], 10_000, 32, 1), ([2, 6], 20, 15, 5), ([99], 20, 19, 1)],
)
def test_max_tokens_none_is_what_fits(
    blocks: list[int], model_len: int, length: int, want: int
) -> None:
    cluster = Cluster(blocks, 4, max_model_len=model_len)
    request = run_alone(cluster, length, None)
    assert request.max_tokens == want
    cluster.check_output(request)


def test_other_refusals() -> None:
    cluster = Cluster([100], 4, max_model_len=50, max_queue=2)
    for ids, params, field in [
        ([], greedy(1), "prompt"),
        ([VOCAB], greedy(1), "prompt"),
        ([3, -1], greedy(1), "prompt"),
        (prompt(50), greedy(1), "prompt"),
        (prompt(50), greedy(None), "prompt"),
        (prompt(40), greedy(11), "max_tokens"),
        ([3], greedy(1, stop_token_ids=(VOCAB,)), "stop_token_ids"),
        ([3], greedy(1, logit_bias={VOCAB: 1.0}), "logit_bias"),
    ]:
        with pytest.raises(RequestError) as caught:
            cluster.add(ids, params)
        assert caught.value.param == field
        assert not isinstance(caught.value, CapacityError)
    cluster.add(prompt(40), greedy(10))
    cluster.add(prompt(4))
    with pytest.raises(QueueFullError, match="2 requests"):
        cluster.add(prompt(4))
    cluster.step()
    cluster.add(prompt(4))
    cluster.drain()


# --- giving way


def test_the_youngest_gives_way_and_comes_back_the_same() -> None:
    cluster = Cluster([6], 4)
    old, young = cluster.add(prompt(10), greedy(10)), cluster.add(prompt(9), greedy(10))
    seen: list[Item] = []
    while cluster.scheduler.has_work:
        plan = cluster.step()
        assert plan
        seen += [item for item in plan.items if item.request == young.number]
    assert (old.num_preemptions, young.num_preemptions) == (0, 1)
    assert cluster.scheduler.num_preemptions == 1
    again = [item for item in seen if item.start == 0]
    assert len(again) == 2
    before = seen[: seen.index(again[1])]
    assert again[1].tokens == tuple(t for item in before for t in item.tokens) + (
        expected_token(young.prompt, len(before) - 1),
    ), "recomputes what it had, and the token not yet stored"
    assert again[1].sampling and again[1].sampling.index == len(before)
    cluster.check_output(old)
    cluster.check_output(young)


def test_a_last_recomputed_chunk_of_one_token_uses_its_reserved_block() -> None:
    """It is no decode step: the block it needs is the last one, and taken already."""
    cluster = Cluster([2], 4, budget=4)
    request = cluster.add(prompt(4), greedy(5))
    cluster.step()
    cluster.scheduler._preempt(request)
    plans = cluster.drain()
    assert [len(plan.items[0].tokens) for plan in plans][:2] == [4, 1]
    assert request.num_preemptions == 1, "it does not give way to itself"
    cluster.check_output(request)


def test_under_mode_local_only_a_neighbour_gives_way() -> None:
    """The rank of the first two requests fills up; the youngest, elsewhere, would be no help."""
    cluster = Cluster([6, 3], 4, mode=("local", "auto"))
    asked = [cluster.add(prompt(n), greedy(k)) for n, k in ((9, 14), (4, 12), (4, 9))]
    plan = cluster.step()
    assert plan and [i.shards[0].rank for i in plan.items] == [0, 0, 1]
    cluster.drain()
    assert [request.num_preemptions > 0 for request in asked] == [False, True, False]
    for request in asked:
        cluster.check_output(request)


@pytest.mark.parametrize("state", ["waiting", "prefilling", "decoding", "preempted"])
def test_abort_in_every_state(state: str) -> None:
    cluster = Cluster([8], 4, budget=8, max_num_seqs=2)
    other = cluster.add(prompt(4), greedy(20))
    request = cluster.add(prompt(14), greedy(5))
    if state != "waiting":
        cluster.step()
    if state == "decoding":
        cluster.step()
        cluster.step()
        assert request.output
    if state == "preempted":
        cluster.scheduler._preempt(request)
    cluster.scheduler.finish(request, "abort")
    cluster.scheduler.check_integrity()
    cluster.scheduler.finish(request, "error")  # a second end changes nothing
    assert request.finish_reason == "abort" and request.finished_time is not None
    assert request.num_computed == 0
    cluster.drain()
    cluster.check_output(other)


# --- random lives


@st.composite
def clusters(draw: st.DrawFn) -> Cluster:
    blocks = draw(st.lists(st.integers(0, 4), min_size=1, max_size=4).filter(any))
    return Cluster(
        blocks,
        draw(st.integers(1, 4)),
        placement=draw(st.sampled_from(PLACEMENTS)),
        layout=draw(st.sampled_from(LAYOUTS)),
        mode=draw(st.sampled_from(MODES)),
        local_threshold=draw(st.sampled_from([None, 0, 3, 20])),
        max_num_seqs=draw(st.integers(1, 5)),
        budget=draw(st.integers(1, 12) | st.just(1000)),
        max_queue=draw(st.integers(1, 8)),
    )


@given(clusters(), st.data())
@settings(max_examples=400)
def test_random_lives(cluster: Cluster, data: st.DataObject) -> None:
    """Requests come, run, are aborted at any moment and end: nothing leaks, all the rest finish,
    with the tokens they would have had alone."""
    largest = cluster.scheduler.largest_tokens
    rng = random.Random(data.draw(st.integers(0, 2**20)))
    for _ in range(data.draw(st.integers(1, 25))):
        what = rng.choice(["add", "add", "step", "step", "step", "abort"])
        if what == "step":
            cluster.step()
        elif what == "abort" and cluster.requests:
            cluster.scheduler.finish(rng.choice(list(cluster.requests.values())), "abort")
            cluster.scheduler.check_integrity()
        elif what == "add":
            length = rng.randint(1, largest + 1)
            tokens = rng.choice([1, 2, 3, largest - length + 1, rng.randint(1, largest + 1)])
            tokens = max(tokens, 1)
            need = length + tokens - 1
            full = len(cluster.scheduler.waiting) >= cluster.scheduler.limits.max_queue
            first = rng.choice([1, 3, 7])
            try:
                cluster.add(prompt(length, first), greedy(tokens))
            except CapacityError as err:
                assert need > largest
                assert (err.need, err.largest) == (need, largest)
            except QueueFullError:
                assert full and need <= largest
            else:
                assert not full and need <= largest
    cluster.drain()
    assert cluster.started == sorted(cluster.started), "first come first served"
    for request in cluster.requests.values():
        if request.finish_reason != "abort":
            cluster.check_output(request)


@given(clusters(), st.data())
@settings(max_examples=300)
def test_a_request_alone_reaches_the_full_capacity(cluster: Cluster, data: st.DataObject) -> None:
    blocks = [max(cluster.blocks)] if cluster.mode[0] == "local" else cluster.blocks
    capacity = sum(blocks) * cluster.block_size
    assert cluster.scheduler.largest_tokens == capacity
    length = data.draw(st.integers(1, capacity))
    request = cluster.add(prompt(length), greedy(capacity - length + 1))
    cluster.drain()
    cluster.check_output(request)
    assert request.num_preemptions == 0
    with pytest.raises(CapacityError):
        cluster.add(prompt(length), greedy(capacity - length + 2))


def test_every_combination_at_once() -> None:
    """Twelve requests in pools that hold three or so, for every placement, layout and mode."""
    for placement, layout, mode in itertools.product(PLACEMENTS, LAYOUTS, MODES):
        for blocks in ([9], [5, 4], [2, 7, 3], [3, 3, 3, 3]):
            cluster = Cluster(blocks, 4, placement=placement, layout=layout, mode=mode, budget=10)
            rng = random.Random(str((placement, layout, mode, blocks)))
            largest = cluster.scheduler.largest_tokens
            for _ in range(12):
                length = rng.randint(1, largest - 4)
                cluster.add(prompt(length), greedy(rng.randint(1, 5)))
            cluster.drain()
            for request in cluster.requests.values():
                cluster.check_output(request)
