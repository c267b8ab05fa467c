"""The scheduler on a simulated cluster: what runs when and where, is preempted, is shared.

Every step is checked by ``tests.helpers.cluster``: budgets, worker states, what each rank reads.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from concurrent.futures import Future

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_cp.cost import CostModel
from ds_cp.engine.loop import PipelinedLoop
from ds_cp.errors import CapacityError, IntegrityError, QueueFullError, RequestError
from ds_cp.kv.prefix import PrefixKeys
from ds_cp.layout import LAYOUTS, Runs, positions, total
from ds_cp.plan import Chunk, Outcome, Sampled, StepPlan
from ds_cp.sampling_params import SamplingParams
from ds_cp.scheduler.draft import SCORED_ROWS
from ds_cp.scheduler.mode_policy import Seats
from ds_cp.scheduler.pacing import ChunkPacer
from ds_cp.scheduler.request import Request
from tests.helpers.cluster import (
    EOS,
    MODES,
    PLACEMENTS,
    VOCAB,
    Cluster,
    Model,
    contents,
    greedy,
    prompt,
    sampled,
    score,
)


def stepped(cluster: Cluster) -> StepPlan:
    """A step that must run."""
    plan = cluster.step()
    assert plan is not None
    return plan


def chunks_of(plans: list[StepPlan], request: Request) -> list[int]:
    """Tokens in each chunk of a request's prompt."""
    chunks = [c for plan in plans for c in plan.chunks if c.request == request.number]
    return [sum(total(runs) for _, runs in chunk.owners) for chunk in chunks]


def decoding(plan: StepPlan) -> list[int]:
    return sorted(number for decodes in plan.decodes for number in decodes.requests)


def chunk_of(plan: StepPlan, request: Request) -> Chunk:
    (chunk,) = (c for c in plan.chunks if c.request == request.number)
    return chunk


def ranks_of(chunk: Chunk) -> list[int]:
    """The ranks that compute it."""
    return [rank for rank, _ in chunk.owners]


def held(request: Request) -> list[tuple[int, int]]:
    assert request.table is not None
    return list(request.table.homes)


# --- order and batching


def test_first_come_first_served_and_decode_batches_all() -> None:
    cluster = Cluster([100], budget=40, max_num_seqs=3)
    asked = [cluster.add(prompt(10 + i, i), greedy(4)) for i in range(5)]
    first = stepped(cluster)
    assert [c.request for c in first.chunks] == [1, 2, 3]
    assert [chunks_of([first], r) for r in asked[:3]] == [[10], [11], [12]]
    second = stepped(cluster)
    assert decoding(second) == [1, 2, 3] and len(second.decodes) == 1, "one decode step for all"
    assert not second.chunks
    cluster.settle()
    assert cluster.started == [1, 2, 3, 4, 5]
    cluster.check_outputs()


def test_a_lower_priority_number_goes_first_and_of_equals_the_older() -> None:
    cluster = Cluster([100], max_num_seqs=1)
    priorities = [0, 5, -1, 0, -1, 5]
    for i, priority in enumerate(priorities):
        cluster.add(prompt(5, i), greedy(2), priority=priority)
    cluster.settle()
    assert cluster.started == [3, 5, 1, 4, 2, 6]


def test_a_newcomer_of_higher_priority_goes_before_the_next_chunk_of_others() -> None:
    cluster = Cluster([100], budget=4)
    decode = cluster.add(prompt(3, 3), greedy(9))
    stepped(cluster)
    long, other = cluster.add(prompt(12), greedy(2)), cluster.add(prompt(8, 5), greedy(2))
    stepped(cluster)
    urgent = cluster.add(prompt(5, 9), greedy(1), priority=-1)
    plans = cluster.settle()
    assert [chunks_of([p], urgent) for p in plans[:3]] == [[3], [2], []]
    assert [chunks_of([p], long) for p in plans[:3]] == [[], [1], [3]]
    assert all(decode.number in decoding(p) for p in plans[:3]), "a decode it does not hold up"
    assert cluster.started == [decode.number, long.number, urgent.number, other.number]
    cluster.check_outputs()


def test_chunked_prefill_shares_the_step_with_decode() -> None:
    cluster = Cluster([100], budget=16)
    short, long = cluster.add(prompt(6), greedy(8)), cluster.add(prompt(50, 2), greedy(2))
    plans = cluster.settle()
    assert chunks_of(plans, long) == [10, 15, 15, 10], "what the budget leaves beside one token"
    assert all(decoding(plan)[:1] == [short.number] for plan in plans[1:8])
    samples = [c.samples for plan in plans for c in plan.chunks if c.request == long.number]
    assert samples == [False, False, False, True]
    cluster.check_outputs()


def test_a_big_request_at_the_head_is_not_overtaken() -> None:
    cluster = Cluster([8], 4)
    first, big, small = (cluster.add(prompt(n, n), greedy(2)) for n in (12, 28, 4))
    stepped(cluster)
    assert cluster.scheduler.running == [first] and list(cluster.scheduler.waiting) == [big, small]
    cluster.settle()
    assert cluster.started == [1, 2, 3]


def test_prompts_of_all_ranks_run_in_one_step() -> None:
    """The budget is per rank: N ranks do N times the short traffic."""
    for ranks in (1, 2, 4):
        cluster = Cluster([40] * ranks, budget=20)
        for i in range(2 * ranks):
            cluster.add(prompt(10, i), greedy(2))
        plan = stepped(cluster)
        assert len(plan.chunks) == 2 * ranks
        assert cluster.owned[0] == [20] * ranks
        assert [len(m.sequences) for m in cluster.ranks.states] == [2 * ranks] * ranks
        cluster.settle()
        cluster.check_outputs()


# --- no request starves


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize(("decodes", "budget"), [(3, 2), (9, 4), (13, 5), (8, 8), (9, 8)])
def test_more_decodes_than_budget_take_turns(depth: int, decodes: int, budget: int) -> None:
    """None waits longer than a round, and the whole budget is used."""
    cluster = Cluster([400], budget=budget, depth=depth, max_num_seqs=decodes)
    asked = [cluster.add(prompt(4, i), sampled(90)) for i in range(decodes)]
    while any(r.prefilling for r in asked):
        cluster.step()
    begun = [r.num_computed for r in asked]
    plans = [stepped(cluster) for _ in range(30)]
    for request in asked:
        turns = [i for i, plan in enumerate(plans) if request.number in decoding(plan)]
        gaps = [b - a for a, b in itertools.pairwise([-1, *turns])]
        assert max(gaps) <= -(-decodes // budget) + 1
    got = [r.num_computed - n for r, n in zip(asked, begun, strict=True)]
    assert min(got) >= 30 // -(-decodes // budget)
    assert all(len(decoding(plan)) == min(decodes, budget) for plan in plans)
    cluster.settle()
    cluster.check_outputs()


@pytest.mark.parametrize("depth", [1, 2])
def test_decodes_take_turns_while_others_come_and_go(depth: int) -> None:
    """A newcomer each step, gone soon: the long decode gets its share of a budget of two."""
    cluster = Cluster([100], budget=2, depth=depth, max_num_seqs=8)
    long = cluster.add(prompt(3), greedy(30))
    for i in range(60):
        cluster.add([i + 100], greedy(3))
        cluster.step()  # which checks that no decode waits longer than a round
    assert len(long.output) >= 60 // 8
    cluster.settle()
    cluster.check_outputs()


@pytest.mark.parametrize("depth", [1, 2])
def test_a_long_prompt_holds_up_no_decode(depth: int) -> None:
    cluster = Cluster([100, 100], budget=16, depth=depth, placement="balanced")
    decodes = [cluster.add(prompt(5, i), sampled(60)) for i in range(6)]
    for _ in range(3):
        cluster.step()
    long = cluster.add(prompt(500, 9), greedy(2))
    numbers = [r.number for r in decodes]
    count = 0
    while long.prefilling and long.finish_reason is None:
        plan = stepped(cluster)
        count += 1
        assert decoding(plan) == numbers
        assert max(cluster.owned[-1]) <= 16
    assert count == -(-500 // 24), "and it gets the whole blocks of what three decodes a rank leave"
    cluster.settle()
    cluster.check_outputs()


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("budget", [2, 3, 8])
def test_decodes_hold_up_no_prompt(budget: int, depth: int) -> None:
    """Twelve decodes want the whole budget; a prompt gets a quarter of it, one token at least."""
    cluster = Cluster([600], budget=budget, depth=depth, max_num_seqs=13)
    decodes = [cluster.add(prompt(4, i), sampled(100)) for i in range(12)]
    while any(r.prefilling for r in decodes):
        cluster.step()
    late = cluster.add(prompt(16, 99), greedy(1))
    share = max(1, budget // 4)
    plans = [stepped(cluster) for _ in range(16 // share)]
    assert chunks_of(plans, late) == [share] * (16 // share)
    cluster.settle()
    cluster.check_outputs()


def test_budgets_hold_when_decodes_open_blocks_on_other_ranks() -> None:
    """Twelve decodes, all on one rank, open blocks at once, by placement on the other ones."""
    for placement in ("round_robin", "balanced"):
        cluster = Cluster([40, 40, 40], 2, placement=placement, mode=("tree", "auto"), budget=6,
                          max_num_seqs=16)  # fmt: skip
        for i in range(16):
            cluster.add(prompt(3, i), sampled(12))
        cluster.settle()  # budgets are checked in every step
        assert max(max(owned) for owned in cluster.owned) == 6
        cluster.check_outputs()


def test_chunks_beside_decodes_are_paced_and_alone_they_are_not() -> None:
    """A step may take twice a quiet one, of 10 ms; a prompt token costs 1 ms: so ten tokens."""
    pacer = ChunkPacer(2.0)
    cluster = Cluster([400], budget=200, pacer=pacer)
    cluster.seconds = lambda plan: 0.010 * bool(plan.decodes) + 0.001 * _prompt_tokens(plan)
    decode = cluster.add(prompt(4), sampled(200))
    for _ in range(20):
        stepped(cluster)
    long = cluster.add(prompt(600, 5), greedy(1))
    plans = []
    while long.finish_reason is None:
        plans.append(stepped(cluster))
        assert decoding(plans[-1]) == [decode.number]
    sizes = chunks_of(plans, long)
    assert sizes[0] <= 2 * pacer.tuning.first_chunk_work, "before anything is measured"
    settled = sizes[3:-1]  # every fourth is half as long, or the least, to learn from
    assert all(pacer.tuning.least_chunk_tokens <= n <= 10 for n in settled)
    assert sum(n >= 7 for n in settled) >= 0.7 * len(settled), "the allowance is used"
    cluster.settle()
    cluster.check_outputs()


def _prompt_tokens(plan: StepPlan) -> int:
    return sum(total(runs) for chunk in plan.chunks for _, runs in chunk.owners)


# --- ends and sampling


def test_end_token_stop_ids_and_min_tokens() -> None:
    model = Model(eos_every=4)
    at = next(i for i in range(1, 99) if _ends_after(model, i) == 3)
    cluster = Cluster([100], eos_every=4)
    ended = cluster.add(prompt(9, at), greedy(20))
    ignoring = cluster.add(prompt(9, at), greedy(5, ignore_eos=True))
    barred = cluster.add(prompt(9, at), greedy(9, min_tokens=4))
    second = model.alone(prompt(9, at), greedy(9), 0, 9)[0][1]
    stopped = cluster.add(prompt(9, at), greedy(9, stop_token_ids=(second,)))
    late = cluster.add(prompt(9, at), greedy(9, stop_token_ids=(second,), min_tokens=3))
    plans = cluster.settle()
    cluster.check_outputs()
    assert (ended.finish_reason, ended.stop_reason, len(ended.output)) == ("stop", None, 3)
    assert ended.output[-1] == EOS
    assert len(ignoring.output) == 5 and EOS in ignoring.output
    assert len(barred.output) > 4 and EOS not in barred.output[:4]
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", second)
    assert stopped.output[-1] == second and len(stopped.output) == 2
    assert len(late.output) > 3 and second not in late.output[:3]
    how = {b.request: b.sampling for plan in plans for b in plan.begins}
    assert (how[ended.number].min_tokens, how[ended.number].early_banned) == (0, ())
    assert (how[barred.number].min_tokens, how[barred.number].early_banned) == (4, (EOS,))
    assert how[late.number].early_banned == tuple(sorted((second, EOS)))


def test_min_tokens_come_before_the_end() -> None:
    """A model that always ends: transformers' min_new_tokens=3 gives three tokens and the end."""
    cluster = Cluster([100], eos_every=1)
    lengths = {}
    for least in (0, 1, 3):
        request = cluster.add(prompt(9), greedy(10, min_tokens=least))
        cluster.settle()
        assert request.output.index(EOS) == least and request.finish_reason == "stop"
        lengths[least] = len(request.output)
    assert lengths == {0: 1, 1: 2, 3: 4}
    all_of_them = cluster.add(prompt(9), greedy(5, min_tokens=5))
    ignoring = cluster.add(prompt(9), greedy(6, min_tokens=3, ignore_eos=True))
    cluster.settle()
    assert EOS not in all_of_them.output and all_of_them.finish_reason == "length"
    assert EOS not in ignoring.output[:3] and ignoring.output[3:] == [EOS] * 3
    cluster.check_outputs()


def _ends_after(model: Model, first: int) -> int:
    return len(model.alone(prompt(9, first), greedy(20), 0, 20)[0])


def test_sampling_fields_travel_once() -> None:
    cluster = Cluster([10])
    request = cluster.add(prompt(3), SamplingParams(
        temperature=0.7, top_p=0.9, top_k=5, min_p=0.1, logprobs=2, logit_bias={9: -1.0, 4: 2.0},
        presence_penalty=0.25, frequency_penalty=-0.5, repetition_penalty=1.5, prompt_logprobs=3,
        min_tokens=1, stop_token_ids=(7, 3), max_tokens=3, seed=-5,
    ))  # fmt: skip
    plans = cluster.settle()
    (begin,) = (b for plan in plans for b in plan.begins)
    how = begin.sampling
    assert (how.temperature, how.top_p, how.top_k, how.min_p) == (0.7, 0.9, 5, 0.1)
    assert (how.seed, how.logprobs, how.prompt_logprobs) == (-5, 2, 3)
    assert how.logit_bias == ((4, 2.0), (9, -1.0))
    assert (how.presence_penalty, how.frequency_penalty, how.repetition_penalty) == (
        0.25,
        -0.5,
        1.5,
    )
    assert (how.min_tokens, how.early_banned) == (1, (3, 7, EOS))
    assert (begin.tokens, begin.prompt_length, begin.computed) == ((1, 2, 3), 3, 0)
    plain = Cluster([10]).add(prompt(3))
    assert plain.params.logprobs is None
    cluster.check_output(request)


@pytest.mark.parametrize("depth", [1, 2])
def test_penalties_count_the_same_tokens_on_every_rank(depth: int) -> None:
    """Local, growing over ranks, in turns, and after preemption: checked at every draw."""
    for mode, budget in itertools.product((("auto", "auto"), ("tree", "auto")), (2, 100)):
        cluster = Cluster([3, 3], 4, mode=mode, depth=depth, budget=budget)
        for i in range(6):
            how = {"repetition_penalty": 1.2} if i % 2 else {"presence_penalty": 0.5}
            cluster.add(prompt(6, i), sampled(12, **how))
        cluster.settle()
        assert cluster.scheduler.num_preemptions > 0
        cluster.check_outputs()


@pytest.mark.parametrize("depth", [1, 2])
def test_prompt_scores(depth: int) -> None:
    """Every token of the prompt but the first, over chunks and ranks, also after preemption."""
    for mode in MODES[:3]:
        cluster = Cluster([12, 12], 4, mode=mode, depth=depth, budget=7)
        decode = cluster.add(prompt(4, 9), sampled(30))
        asked = cluster.ask(prompt(41), sampled(3, prompt_logprobs=0, n=2))
        again = cluster.add(prompt(23), sampled(3, prompt_logprobs=0))
        cluster.step()
        cluster.step()
        if asked[0].table is not None:
            cluster.scheduler._preempt(asked[0])
        cluster.settle()
        cluster.check_outputs()
        for request in (asked[0], again):
            scores = cluster.lives[request.number].scores
            known = contents(request.prompt)
            assert scores is not None and scores[0] is None
            assert [s.token_id for s in scores[1:]] == list(request.prompt[1:])
            want = [score(c, t) for c, t in zip(known, request.prompt[1:], strict=False)]
            assert [s.logprob for s in scores[1:]] == want
        assert cluster.lives[asked[1].number].scores is None, "reported once"
        assert cluster.lives[decode.number].scores is None


def test_scored_prompts_have_short_chunks_and_take_no_hits() -> None:
    """All logits of a chunk are wanted, so its length is bounded; and every token is computed."""
    cluster = Cluster([300, 300], 4)
    cluster.add(prompt(700), greedy(1))
    cluster.settle()
    scored = cluster.add(prompt(700), greedy(1, prompt_logprobs=0))
    sizes = chunks_of(cluster.settle(), scored)
    assert sum(sizes) == 700 and max(sizes) <= SCORED_ROWS and len(sizes) == 3
    assert cluster.lives[scored.number].cached_tokens == 0


def scored_rows(cluster: Cluster, plan: StepPlan) -> int:
    """Rows of logits that the ranks keep in a step to score prompts: all but the last token's."""
    rows = 0
    for chunk in plan.chunks:
        request = cluster.lives[chunk.request].request
        if request.params.prompt_logprobs is not None:
            owned = [p for _, runs in chunk.owners for p in positions(runs)]
            rows += sum(p < len(request.prompt) - 1 for p in owned)
    return rows


@pytest.mark.parametrize("blocks", [[3000], [1600, 1600]])
def test_the_rows_that_score_prompts_are_bounded_for_all_requests_together(
    blocks: list[int],
) -> None:
    """32 prompts of 250 tokens had 7,242 rows of logits in one step."""
    cluster = Cluster(blocks, max_num_seqs=64)
    plain = cluster.add(prompt(3000, 999), greedy(1))
    asked = [cluster.add(prompt(250, i), greedy(1, prompt_logprobs=0)) for i in range(32)]
    plans = cluster.settle()
    rows = [scored_rows(cluster, plan) for plan in plans]
    assert sum(rows) == 32 * 249 and max(rows) == SCORED_ROWS
    assert len(plans) <= -(-sum(rows) // SCORED_ROWS) + 4, "the rows that there are, are used"
    assert chunks_of(plans, plain) == [3000], "other prompts do not wait for rows"
    assert all(cluster.lives[r.number].scores is not None for r in asked)
    cluster.check_outputs()


def test_a_preempted_prompt_is_scored_in_bounded_steps_again() -> None:
    """Its output is computed with the prompt then, and is not scored."""
    cluster = Cluster([400])
    request = cluster.add(prompt(600), greedy(30, prompt_logprobs=0))
    while len(request.output) < 20:
        cluster.step()
    cluster.scheduler._preempt(request)
    rows = [scored_rows(cluster, plan) for plan in cluster.settle()]
    assert sum(rows) == 599 and max(rows) <= SCORED_ROWS
    cluster.check_outputs()


# --- growing, placing


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_local_request_grows_in_place(placement: str) -> None:
    """Local while its rank has room, then over both ranks; what is stored stays where it is."""
    cluster = Cluster([3, 3], 4, placement=placement)
    request = cluster.add(prompt(5), greedy(20))
    spans, homes = [], []
    while cluster.scheduler.has_work:
        plan = stepped(cluster)
        assert not plan.transfers
        table = cluster.ranks.states[0].sequences[request.number].table
        spans.append(table.width)
        homes.append(list(table.homes))
    assert spans == [1] * 8 + [2] * 12, "12 tokens fill a rank of three blocks"
    for earlier, later in itertools.pairwise(homes):
        assert later[: len(earlier)] == earlier
    assert request.modes == ["local", "tree"]
    cluster.check_output(request)


def test_a_growing_request_spans_no_wider_than_it_must() -> None:
    """The third rank has most room, but the request is on the first two, which have some."""
    cluster = Cluster([2, 4, 9], 4, placement="balanced")
    wide = cluster.add(prompt(33), greedy(1))
    assert stepped(cluster).chunks
    assert cluster.ranks.states[0].sequences[wide.number].table.width == 1
    cluster = Cluster([2, 2, 2], 4, placement="balanced")
    request = cluster.add(prompt(5), greedy(12))
    cluster.settle()
    table_width = [len(item.shards) for items in cluster.items for item in items.values()]
    assert max(table_width) == 2, "16 tokens fit two ranks"
    cluster.check_output(request)


def test_short_requests_spread_by_load() -> None:
    """Each to the rank with least work waiting; of equals the one with most free blocks."""
    cluster = Cluster([30, 30, 30, 31], 4, budget=64)
    asked = [cluster.add(prompt(8, i), greedy(9)) for i in range(8)]
    stepped(cluster)
    ranks = [held(r)[0][0] for r in asked]
    assert sorted(ranks[:4]) == [0, 1, 2, 3] and sorted(ranks[4:]) == [0, 1, 2, 3]
    assert ranks[0] == 3
    for _ in range(3):
        stepped(cluster)
    assert set(ranks) == {held(r)[0][0] for r in asked}, "and stay"
    # rank 1 gets a long prompt's work: newcomers avoid it until it is done
    busy = Cluster([100, 100], 4, budget=16)
    busy.add(prompt(300), greedy(1))
    stepped(busy)
    late = [busy.add(prompt(12, 50 + i), greedy(50)) for i in range(4)]
    stepped(busy)
    assert {held(r)[0][0] for r in late if r.table} == {1}


def test_unequal_pools_add_up() -> None:
    """[x, 3x] holds 4x: the larger rank stores three quarters, each computes half."""
    cluster = Cluster([16, 48], 4)
    request = cluster.add(prompt(4 * 64), greedy(1))
    plan = stepped(cluster)
    (item,) = cluster.items[0].values()
    assert [s.blocks.num_keys for s in item.shards] == [64, 192]
    assert [total(s.q_runs) for s in item.shards] == [128, 128]
    assert item.ships and plan.chunks[0].mode == "ring"
    cluster.check_output(request)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_of_a_long_prompt(layout: str) -> None:
    """Blocks are dealt so that causal work is level, and their ranks compute their tokens. Which
    rank has the last block, and decodes, differs from request to request."""
    cluster = Cluster([40, 40], 4, layout=layout, placement="balanced", mode=("ring", "kv"))
    cluster.add(prompt(64), greedy(1))
    cluster.add(prompt(64, 2), greedy(1))
    stepped(cluster)
    want: dict[str, list[Runs]] = {
        "zigzag": [((0, 16), (48, 16)), ((16, 32),)],
        "contiguous": [((0, 32),), ((32, 32),)],
    }
    one, other = cluster.items[0].values()
    assert [s.q_runs for s in one.shards] == want[layout][::-1]
    assert [s.q_runs for s in other.shards] == want[layout]
    for item in (one, other):
        assert [s.blocks.runs() for s in item.shards] == [s.q_runs for s in item.shards]
        assert not item.ships


def test_chunks_of_a_spanning_prompt_end_with_blocks() -> None:
    cluster = Cluster([50, 50], 4, placement="balanced", mode=("ring", "kv"), budget=19)
    request = cluster.add(prompt(151), greedy(1))
    sizes = chunks_of(cluster.settle(), request)
    assert all(n % 4 == 0 for n in sizes[:-1]) and sum(sizes) == 151
    assert sizes[0] == 36, "two ranks times 19 tokens, cut to whole blocks"
    cluster.check_output(request)


def test_local_threshold() -> None:
    """Longer prompts are computed by all ranks although one could hold them."""
    cluster = Cluster([50, 50], 4, local_threshold=40)
    short, long = cluster.add(prompt(40), greedy(2)), cluster.add(prompt(80, 2), greedy(2))
    plan = stepped(cluster)
    assert chunk_of(plan, short).mode == "local" and len(ranks_of(chunk_of(plan, short))) == 1
    assert chunk_of(plan, long).mode == "ring"
    assert [total(runs) for _, runs in chunk_of(plan, long).owners] == [40, 40]
    cluster.settle()
    assert short.modes == ["local"] and long.modes[0] == "ring"
    cluster.check_outputs()


RATES = CostModel(
    flops_per_s=1e9, bytes_per_s=1e9, latency_s=1e-6, num_layers=2, num_q_heads=4, num_kv_heads=2,
    head_dim=8, weights=100_000, element=4,
)  # fmt: skip


def test_a_long_prompt_spans_when_it_is_alone_and_not_when_others_want_ranks() -> None:
    alone = Cluster([100] * 4, 4, cost=RATES)
    alone.add(prompt(200), greedy(1))
    pay = RATES.best_ranks(4, 200, 0, 1)
    assert len(ranks_of(stepped(alone).chunks[0])) == pay > 1
    busy = Cluster([100] * 4, 4, cost=RATES)
    for i in range(2):
        busy.add(prompt(200, i), greedy(1))
    assert [len(ranks_of(c)) for c in stepped(busy).chunks] == [1, 1]
    # where only several ranks hold it, as few as do
    full = Cluster([20, 30, 20, 20], 4, cost=RATES)
    full.add(prompt(8), greedy(9))
    stepped(full)
    big = full.add(prompt(170, 2), greedy(1))
    full.add(prompt(170, 3), greedy(1))
    assert len(ranks_of(chunk_of(stepped(full), big))) == 2


def test_a_long_prompt_spans_beside_decodes_with_as_many_keys_on_each_rank() -> None:
    """Decodes want each rank for a moment of every step; a prompt on one rank left the others idle
    for the rest. Its KV is level, so that each rank attends what it holds and nothing travels."""
    cluster = Cluster([100] * 4, 4, cost=RATES)
    cluster.add(prompt(8), greedy(50))
    for _ in range(3):
        cluster.step()
    long = cluster.add(prompt(200, 2), greedy(9))
    plan = stepped(cluster)
    assert plan.decodes and len(ranks_of(chunk_of(plan, long))) == RATES.best_ranks(4, 200, 0, 9)
    assert long.table is not None
    held = [long.table.num_blocks(rank) for rank in long.table.span]
    assert len(held) > 1 and max(held) - min(held) <= 1


def test_auto_prefers_tree_over_several_hosts() -> None:
    cluster = Cluster([4, 4, 4], 4, num_hosts=2)
    request = cluster.add(prompt(40), greedy(3))
    cluster.settle()
    assert request.modes == ["tree"], "in prefill and decode, over three ranks"


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
    for max_tokens in (None, 1):  # too long by itself: no other max_tokens would help
        with pytest.raises(CapacityError) as caught:
            cluster.add(prompt(33), greedy(max_tokens))
        assert caught.value.param == "prompt"
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
    cluster.settle()
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
    cluster = Cluster([100], 4, max_model_len=50, max_queue=2, max_num_seqs=3)
    for ids, params, field in [
        ([], greedy(1), "prompt"),
        ([VOCAB], greedy(1), "prompt"),
        ([3, -1], greedy(1), "prompt"),
        (prompt(50), greedy(1), "prompt"),
        (prompt(50), greedy(None), "prompt"),
        (prompt(40), greedy(11), "max_tokens"),
        ([3], greedy(1, stop_token_ids=(VOCAB,)), "stop_token_ids"),
        ([3], greedy(1, logit_bias={VOCAB: 1.0}), "logit_bias"),
        ([3], greedy(1, n=4), "n"),
        ([3], greedy(1, stop=("x",)), "stop"),
    ]:
        with pytest.raises(RequestError) as caught:
            cluster.add(ids, params)
        assert caught.value.param == field
        assert not isinstance(caught.value, CapacityError)
    cluster.add(prompt(40), greedy(10))
    cluster.add(prompt(4, 2))
    with pytest.raises(QueueFullError, match="2 requests"):
        cluster.add(prompt(4, 3))
    stepped(cluster)
    cluster.add(prompt(4, 3))
    cluster.settle()
    cluster.check_outputs()


# --- the prefix cache


@pytest.mark.parametrize(("length", "cached"), [(3, 0), (4, 0), (5, 4), (8, 4), (9, 8), (17, 16)])
def test_whole_blocks_are_found_and_the_last_token_is_computed(length: int, cached: int) -> None:
    cluster = Cluster([20], 4)
    first = cluster.add(prompt(length), greedy(1))
    cluster.settle()
    again = cluster.add(prompt(length), greedy(1))
    plan = stepped(cluster)
    assert chunks_of([plan], again) == [length - cached]
    assert plan.begins[0].computed == cached and len(plan.begins[0].homes) == cached // 4
    assert cluster.lives[first.number].cached_tokens == 0
    assert cluster.lives[again.number].cached_tokens == again.metrics().cached_tokens == cached
    assert cluster.scheduler.block_manager.hits == cached
    assert cluster.scheduler.block_manager.queries == 2 * length
    cluster.settle()
    cluster.check_outputs()


def test_a_longer_and_a_forking_prompt_hit_as_far_as_they_agree() -> None:
    cluster = Cluster([40], 4)
    system = prompt(18)
    cluster.add([*system, 77, 78], greedy(1))
    cluster.settle()
    for tail, cached in [([77, 78, 79, 80, 81], 20), ([77], 16), ([5, 5, 5], 16), ([], 16)]:
        request = cluster.add([*system, *tail], greedy(1))
        cluster.settle()
        assert cluster.lives[request.number].cached_tokens == cached
    other = cluster.add([9, *system[1:]], greedy(1))
    cluster.settle()
    assert cluster.lives[other.number].cached_tokens == 0
    cluster.check_outputs()


@pytest.mark.parametrize("depth", [1, 2])
def test_a_reset_forgets_every_prefix_and_what_runs_goes_on(depth: int) -> None:
    cluster = Cluster([40], 4, depth=depth)
    cluster.add(prompt(9), greedy(1))
    cluster.settle()
    running = cluster.add([*prompt(9), 5, 6, 7, 8], greedy(12))
    for _ in range(3):
        stepped(cluster)
    assert cluster.lives[running.number].cached_tokens == 8
    assert cluster.scheduler.reset_prefix_cache() == 0  # all cached blocks are in use
    again = cluster.add(prompt(9), greedy(1))
    cluster.settle()
    assert cluster.lives[again.number].cached_tokens == 0
    assert cluster.scheduler.reset_prefix_cache() > 0
    assert cluster.scheduler.reset_prefix_cache() == 0
    cluster.check_outputs()


@pytest.mark.parametrize("depth", [1, 2])
def test_the_next_turn_of_a_chat_hits_the_answer_too(depth: int) -> None:
    cluster = Cluster([40, 40], 4, depth=depth)
    first = cluster.add(prompt(10), greedy(15))
    cluster.settle()
    second = cluster.add([*prompt(10), *first.output, 500, 501], greedy(3))
    cluster.settle()
    # 25 tokens; the last was never computed, and 24 are six blocks
    assert cluster.lives[second.number].cached_tokens == 24
    cluster.check_outputs()


@pytest.mark.parametrize("depth", [1, 2])
def test_blocks_can_be_found_as_soon_as_they_are_whole_and_known(depth: int) -> None:
    cluster = Cluster([40], 4, depth=depth)
    request = cluster.add(prompt(6), sampled(20))
    keys = PrefixKeys(4, "")
    while cluster.scheduler.has_work:
        cluster.step()
        known = min(request.num_computed, request.num_tokens)
        found = [cluster.scheduler.allocator.find(k) for k in keys.upto(request.tokens, known // 4)]
        assert request.table is None or found == held(request)[: known // 4]
    cluster.settle()


def test_salts_are_apart() -> None:
    cluster = Cluster([40], 4)
    cached = []
    for salt in ("", "a", "b", "a", ""):
        request = cluster.add(prompt(13), greedy(1), salt=salt)
        cluster.settle()
        cached.append(cluster.lives[request.number].cached_tokens)
    assert cached == [0, 0, 0, 12, 12]
    cluster.check_outputs()


def test_requests_of_one_step_share() -> None:
    """The second finds the blocks that the first computes in the very same step."""
    cluster = Cluster([20], 4)
    first, second = (cluster.add([*prompt(12), i], greedy(4)) for i in (1, 2))
    plan = stepped(cluster)
    assert chunks_of([plan], first) == [13] and chunks_of([plan], second) == [1]
    assert held(first)[:3] == held(second)[:3]
    assert [cluster.scheduler.allocator.references(h) for h in held(first)] == [2, 2, 2, 1]
    cluster.settle()
    cluster.check_outputs()


def test_caching_can_be_off() -> None:
    cluster = Cluster([40], 4, prefix_caching=False)
    for _ in range(2):
        request = cluster.add(prompt(13), greedy(2))
        cluster.settle()
        assert cluster.lives[request.number].cached_tokens == 0
    assert cluster.scheduler.block_manager.queries == 0 and cluster.cached() == [0]
    cluster.check_outputs()


def test_least_recently_used_is_evicted_first_and_the_end_of_a_sequence_before_its_start() -> None:
    cluster = Cluster([12], 4)
    allocator = cluster.scheduler.allocator
    for first in (1, 2, 3, 1):  # 1 is used again
        cluster.add(prompt(13, first), greedy(1))
        cluster.settle()
    assert cluster.cached() == [9]
    cluster.add(prompt(17, 4), greedy(1))  # five blocks: the three free ones and two of 2's
    cluster.settle()
    assert allocator.evictions == 2
    left = {
        first: [allocator.find(key) is not None for key in PrefixKeys(4, "").upto(tokens, 3)]
        for first in (1, 2, 3)
        if (tokens := prompt(13, first))
    }
    assert left == {1: [True] * 3, 2: [True, False, False], 3: [True] * 3}
    assert cluster.scheduler.num_preemptions == 0


def test_cached_blocks_go_before_any_request_is_preempted() -> None:
    cluster = Cluster([8, 4], 4, mode=("tree", "auto"))
    cluster.add(prompt(48, 7), greedy(1))
    cluster.settle()
    assert cluster.cached() == [8, 4]
    a, b = cluster.add(prompt(9, 1), greedy(16)), cluster.add(prompt(9, 2), greedy(16))
    cluster.settle()  # 24 + 24 tokens are all 12 blocks
    assert cluster.scheduler.num_preemptions == 0 and cluster.scheduler.allocator.evictions >= 11
    cluster.check_output(a)
    cluster.check_output(b)


@pytest.mark.parametrize("depth", [1, 2])
def test_what_ended_with_bad_logits_is_not_found_again(depth: int) -> None:
    cluster = Cluster([40], 4, depth=depth)
    bad, good = cluster.add(prompt(13), greedy(9)), cluster.add(prompt(13, 2), greedy(9))
    cluster.not_finite(bad, 3)
    cluster.settle()
    assert bad.finish_reason == "error" and len(bad.output) == 3
    assert cluster.lives[bad.number].reason == "error"
    for source, cached in ((bad, 0), (good, 20)):
        request = cluster.add([*source.prompt, *good.output], greedy(1))
        cluster.settle()
        assert cluster.lives[request.number].cached_tokens == cached
    cluster.check_outputs()


def test_a_hit_goes_where_the_prefix_is_unless_that_rank_is_crowded() -> None:
    """Then the cached blocks are copied to where less work waits, and found in both places."""
    cluster = Cluster([200, 200], 4, budget=300)
    system = prompt(100)
    first = cluster.add([*system, 1, 2], greedy(60))
    stepped(cluster)
    (home,) = {rank for rank, _ in held(first)}
    near = cluster.add([*system, 7, 7], greedy(60))
    assert not stepped(cluster).transfers
    assert held(near)[:25] == held(first)[:25], "a decode weighs less than 100 tokens of prompt"
    far = cluster.add([*system, 8, 8], greedy(60))  # two weigh more
    plan = stepped(cluster)
    assert {rank for rank, _ in held(far)} == {1 - home}
    assert [(t.requests, t.source) for t in plan.transfers] == [
        ((), source) for source in held(first)[:25]
    ]
    assert chunks_of([plan], far) == [2] and far.cached_tokens == 100
    for where in (first, far):
        both = cluster.add([*system, 9, 8], greedy(60))
        assert not stepped(cluster).transfers, "there is a copy on either rank now"
        assert held(both)[:25] == held(where)[:25]
    cluster.settle()
    cluster.check_outputs()


def test_what_is_computed_in_this_step_is_not_copied_in_it() -> None:
    """Copies are made before anything is computed. On the same rank it can be shared, though."""
    cluster = Cluster([200, 200], 4, mode=("local", "auto"), budget=300)
    system = prompt(40)
    asked = [cluster.add([*system, 1, i], greedy(9)) for i in range(4)]
    plan = stepped(cluster)
    assert not plan.transfers
    assert Counter(held(r)[0] for r in asked).most_common()[0][1] == 2
    assert sorted(sum((chunks_of([plan], r) for r in asked), [])) == [2, 2, 42, 42]
    cluster.settle()
    cluster.check_outputs()


@pytest.mark.parametrize("mode", MODES[:2])
def test_a_hit_when_the_rank_of_the_prefix_is_full(mode: tuple[str, str]) -> None:
    """The request is local on another rank, and brings its prefix there."""
    cluster = Cluster([9, 5], 4, mode=mode)
    filler = cluster.add(prompt(20, 30), greedy(17))
    stepped(cluster)
    first = cluster.add(prompt(13), greedy(8))
    stepped(cluster)
    assert held(filler)[0][0] == 0 and {rank for rank, _ in held(first)} == {1}
    cluster.abort(filler)
    long = cluster.add([*prompt(12), *prompt(14, 50)], greedy(3))
    plan = stepped(cluster)
    assert {rank for rank, _ in held(long)} == {0} and long.cached_tokens == 12
    assert [t.source for t in plan.transfers] == held(first)[:3]
    cluster.settle()
    cluster.check_outputs()


def test_a_hit_that_no_rank_can_hold_alone_spans_from_where_the_prefix_is() -> None:
    cluster = Cluster([5, 5], 4)
    first = cluster.add(prompt(13), greedy(4))
    stepped(cluster)
    long = cluster.add([*prompt(12), *prompt(14, 50)], greedy(3))
    assert not stepped(cluster).transfers
    assert held(long)[:3] == held(first)[:3] and long.cached_tokens == 12
    assert long.table is not None and long.table.width == 2
    cluster.settle()
    cluster.check_outputs()


# --- several answers


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 7, 8, 9])
def test_answers_share_the_prompt_and_copy_before_they_write(length: int, depth: int) -> None:
    """Blocks of four: a prompt of one token, one below, at and above a block's size."""
    for mode in MODES:
        cluster = Cluster([12, 12], 4, mode=mode, depth=depth)
        parent, *children = cluster.ask(prompt(length), sampled(6, n=3))
        plan = stepped(cluster)
        assert [(f.parent, f.request) for f in plan.forks] == [(1, 2), (1, 3)]
        shared = -(-(length - 1) // 4)
        for child in children:
            assert held(child) == held(parent)[:shared]
            assert child.num_computed == length - 1
        references = [cluster.scheduler.allocator.references(h) for h in held(parent)]
        assert references[:shared] == [3] * shared
        assert references[shared:] == [1] * (len(held(parent)) - shared)
        second = stepped(cluster)
        assert decoding(second) == [1, 2, 3]
        # The last block is shared when it has tokens before the last one. A request that writes to
        # it while others hold it copies; the parent writes elsewhere if it is full.
        shared_tail = (length - 1) % 4 != 0
        copiers = ((2, 3) if length % 4 == 0 else (1, 2)) if shared_tail else ()
        assert tuple(t.requests for t in second.transfers) == tuple((n,) for n in copiers)
        cluster.settle()
        cluster.check_outputs()
        outputs = {tuple(r.output) for r in (parent, *children)}
        assert len(outputs) == 3, "each has a random stream of its own"
        assert [r.seed for r in (parent, *children)] == [11, 12, 13]


def test_seeds_of_answers_wrap_around() -> None:
    cluster = Cluster([20], 4)
    asked = cluster.ask(prompt(3), sampled(2, n=3, seed=2**63 - 2))
    assert [r.seed for r in asked] == [2**63 - 2, 2**63 - 1, -(2**63)]
    cluster.settle()
    cluster.check_outputs()


def test_greedy_answers_are_equal() -> None:
    cluster = Cluster([20], 4)
    asked = cluster.ask(prompt(6), greedy(7, n=4))
    cluster.settle()
    assert len({tuple(r.output) for r in asked}) == 1
    assert [cluster.lives[r.number].cached_tokens for r in asked] == [0, None, None, None]


def test_the_last_holder_writes_without_a_copy() -> None:
    cluster = Cluster([12], 4)
    parent, child = cluster.ask(prompt(6), sampled(9, n=2))
    stepped(cluster)
    cluster.abort_answer(parent)
    plan = stepped(cluster)
    assert decoding(plan) == [child.number] and not plan.transfers
    cluster.settle()
    cluster.check_outputs()


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("when", ["before", "at", "after"])
@pytest.mark.parametrize("ended", [0, 1, 2])
def test_one_answer_ends_and_the_others_go_on(ended: int, when: str, depth: int) -> None:
    """Before the fork the first answer computes for all: its heir takes over."""
    cluster = Cluster([12], 4, budget=8, depth=depth)
    asked = cluster.ask(prompt(14), sampled(6, n=3))
    for _ in range({"before": 1, "at": 2, "after": 4}[when]):
        stepped(cluster)
    cluster.abort_answer(asked[ended])
    cluster.scheduler.check_integrity()
    cluster.settle()
    assert cluster.check_outputs() == 2
    assert [r.finish_reason for r in asked].count("length") == 2


def test_an_heir_of_one_that_waits_takes_its_place() -> None:
    cluster = Cluster([12], 4, max_num_seqs=3)
    cluster.ask(prompt(4, 9), sampled(6, n=3))
    stepped(cluster)
    asked = cluster.ask(prompt(9), sampled(3, n=3))
    later = cluster.add(prompt(5, 7), greedy(2))
    cluster.abort_answer(asked[0])
    assert list(cluster.scheduler.waiting) == [asked[1], later]
    plans = cluster.settle()
    assert [(f.parent, f.request) for p in plans for f in p.forks] == [(5, 6)]
    assert cluster.check_outputs() == 6


def test_all_answers_need_a_seat() -> None:
    """Seats are kept for answers that have not started, and no request overtakes for a free one."""
    cluster = Cluster([60], 4, max_num_seqs=4, budget=8)
    first = cluster.ask(prompt(20), sampled(8, n=3))
    second = cluster.ask(prompt(4, 2), sampled(3, n=2))
    third = cluster.ask(prompt(4, 3), sampled(3, n=2))
    most = 0
    while cluster.scheduler.has_work:
        cluster.step()
        most = max(most, len(cluster.scheduler.running))
        if any(r.finish_reason is None for r in first[:2]):
            assert second[0].table is None and third[0].table is None
    assert most == 4 and cluster.started == [1, 4, 6]
    cluster.settle()
    cluster.check_outputs()


@pytest.mark.parametrize("depth", [1, 2])
def test_preempted_answers_come_back_with_their_tokens(depth: int) -> None:
    """Each continues its own text: none gets another answer's blocks."""
    for mode, prefix_caching in itertools.product(MODES[:3], (True, False)):
        cluster = Cluster([9], 4, mode=mode, depth=depth, prefix_caching=prefix_caching)
        asked = cluster.ask(prompt(13), sampled(12, n=4))
        cluster.settle()
        assert sum(r.num_preemptions for r in asked) > 0
        assert asked[0].num_preemptions == 0
        cluster.check_outputs()


# --- preemption


@pytest.mark.parametrize("depth", [1, 2])
def test_the_youngest_is_preempted_and_comes_back_the_same(depth: int) -> None:
    cluster = Cluster([6], 4, depth=depth, prefix_caching=False)
    old, young = cluster.add(prompt(10), greedy(10)), cluster.add(prompt(9, 2), greedy(10))
    plans = cluster.settle()
    assert (old.num_preemptions, young.num_preemptions) == (0, 1)
    assert cluster.scheduler.num_preemptions == 1
    begins = [b for plan in plans for b in plan.begins if b.request == young.number]
    assert len(begins) == 2
    known = len(begins[1].tokens) - 9
    assert known > 0, "it knows what it said"
    assert begins[1].tokens == (*young.prompt, *young.output[:known])
    assert chunks_of(plans, young) == [9, 9 + known], "computes what it had, and the next token"
    (ended,) = (plan for plan in plans if young.number in plan.ended and plan is not plans[-1])
    assert not ended.begins, "a preempted request does not get the blocks back at once"
    cluster.check_outputs()


@pytest.mark.parametrize("depth", [1, 2])
def test_what_was_preempted_is_found_in_the_cache(depth: int) -> None:
    cluster = Cluster([20], 4, depth=depth)
    request = cluster.add(prompt(10), greedy(16))
    while len(request.output) < 9:
        stepped(cluster)
    cluster.scheduler._preempt(request)
    plans = cluster.settle()
    (again,) = (b for plan in plans for b in plan.begins)
    assert len(again.tokens) == 18 + depth and again.computed == 16
    assert request.cached_tokens == 0, "of the prompt as it came"
    cluster.check_outputs()


def test_the_lowest_priority_is_preempted_though_it_is_older() -> None:
    cluster = Cluster([6], 4)
    old = cluster.add(prompt(10), greedy(10), priority=1)
    young = cluster.add(prompt(9, 2), greedy(10))
    cluster.settle()
    assert (old.num_preemptions > 0, young.num_preemptions) == (True, 0)
    cluster.check_outputs()


def test_a_last_recomputed_chunk_of_one_token_uses_its_reserved_block() -> None:
    """It is no decode step: the block it needs is the last one, and in use already."""
    cluster = Cluster([2], 4, budget=4, prefix_caching=False)
    request = cluster.add(prompt(4), greedy(5))
    stepped(cluster)
    cluster.scheduler._preempt(request)
    plans = cluster.settle()
    assert chunks_of(plans, request) == [4, 1]
    assert request.num_preemptions == 1, "it does not preempt itself"
    cluster.check_output(request)


def test_under_mode_local_only_a_neighbour_is_preempted() -> None:
    """The rank of the first two requests fills up; the youngest, elsewhere, would be no help."""
    cluster = Cluster([6, 6], 4, mode=("local", "auto"))
    sizes = ((9, 14), (9, 12), (9, 9), (2, 2))
    asked = [cluster.add(prompt(n, i), greedy(k)) for i, (n, k) in enumerate(sizes)]
    stepped(cluster)
    rank = {r.number: held(r)[0][0] for r in asked}
    assert rank[1] == rank[3] != rank[2] == rank[4]
    cluster.settle()
    assert [r.num_preemptions > 0 for r in asked] == [False, False, True, False]
    cluster.check_outputs()


def test_a_copy_preempts_too() -> None:
    """Four blocks: the prompt takes three, one more is there for two answers that want to copy."""
    for depth in (1, 2):
        cluster = Cluster([4], 4, depth=depth)
        asked = cluster.ask(prompt(11), sampled(4, n=3))
        cluster.settle()
        assert asked[2].num_preemptions > 0 and asked[0].num_preemptions == 0
        cluster.check_outputs()


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("state", ["waiting", "prefilling", "decoding", "preempted", "forked"])
def test_abort_in_every_state(state: str, depth: int) -> None:
    """Its blocks are free at once, and the ranks hear of it with the next plan."""
    cluster = Cluster([16], 4, budget=8, max_num_seqs=4, depth=depth, prefix_caching=False)
    other = cluster.add(prompt(4, 3), greedy(20))
    stepped(cluster)
    used = cluster.used()[0]
    n = 3 if state == "forked" else 1
    request, *siblings = cluster.ask(prompt(14), sampled(5, n=n))
    for _ in range({"waiting": 0, "prefilling": 1, "preempted": 2}.get(state, 4)):
        stepped(cluster)
    assert (cluster.used()[0] > used + 1) == (state != "waiting")
    if state == "preempted":
        cluster.scheduler._preempt(request)
    else:
        assert request.prefilling == (state in ("waiting", "prefilling"))
    assert cluster.abort(request)
    cluster.scheduler.check_integrity()
    assert other.table is not None and cluster.used()[0] == len(other.table.homes)
    assert request.finish_reason == "abort" and request.finished_time is not None
    assert all(s.finish_reason == "abort" for s in siblings)
    assert request.num_computed == 0
    cluster.scheduler.finish(request, "error")
    assert request.finish_reason == "abort", "a second end changes nothing"
    assert not cluster.abort(request)
    stepped(cluster)
    assert list(cluster.ranks.states[0].sequences) == [other.number]
    cluster.settle()
    assert cluster.check_outputs() == 1
    assert not cluster.core.abort("never existed")


# --- one step runs while the next one is planned


class LateRunner:
    """Runs plans on a cluster when they are asked for, as late as can be."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.plans: list[Future[Outcome]] = []

    def submit(self, plan: StepPlan) -> None:
        # The worker states must be compared with the scheduler's as it is now.
        done: Future[Outcome] = Future()
        done.set_result(self.cluster._execute(plan))
        self.plans.append(done)

    def outcome(self) -> Outcome:
        return self.plans.pop(0).result()


def test_the_engines_own_loop() -> None:
    """``PipelinedLoop`` over a cluster: the same tokens as with ``step``, two steps under way."""
    cluster = Cluster([6, 6], 4, eos_every=12, max_num_seqs=5)
    rng = random.Random(5)
    for i in range(40):
        cluster.ask(prompt(rng.randint(1, 15), i % 3), sampled(rng.randint(1, 12), n=i % 3 + 1))
    loop = PipelinedLoop(cluster.core, LateRunner(cluster))
    most = 0
    while cluster.scheduler.has_work or loop.num_in_flight:
        for delta in loop.advance():
            cluster._receive(delta)
        most = max(most, loop.num_in_flight)
        cluster.scheduler.check_integrity()
    assert most == 1, "the other one has just been waited for"
    assert cluster.check_outputs() == sum(i % 3 + 1 for i in range(40))
    assert not any(cluster.used())


def test_an_end_under_way_wastes_one_token_and_no_block() -> None:
    """The next step was planned before the end token was known: its draw is dropped."""
    for depth, most in ((1, 0), (2, 1)):
        cluster = Cluster([90], 4, eos_every=12, depth=depth)
        asked = [cluster.add(prompt(4, i), sampled(20)) for i in range(12)]
        cluster.settle()
        assert cluster.check_outputs() == 12
        assert {r.finish_reason for r in asked} == {"stop", "length"}
        for request in asked:
            drawn = len(cluster.lives[request.number].tokens) - len(request.prompt)
            wasted = drawn - len(request.output)
            assert wasted == (most if request.finish_reason == "stop" else 0)
        assert cluster.used() == [0]


def test_depth_changes_nothing_but_time() -> None:
    """The same tokens, however many steps are under way; later plans feed tokens not known yet."""
    for placement, mode in itertools.product(PLACEMENTS, MODES):
        outputs, steps = [], []
        for depth in (1, 2, 4):
            cluster = Cluster([5, 7, 3], 4, placement=placement, mode=mode, depth=depth, budget=8,
                              eos_every=15)  # fmt: skip
            rng = random.Random(3)
            asked = [
                cluster.add(prompt(rng.randint(1, 10), i % 2), sampled(rng.randint(1, 9), seed=i))
                for i in range(12)
            ]
            steps.append(len(cluster.settle()))
            cluster.check_outputs()
            outputs.append([r.output for r in asked])
        assert outputs[0] == outputs[1] == outputs[2]


def test_nothing_is_planned_beyond_what_may_come() -> None:
    """With all its tokens under way a request gets no further step, nor one that ended."""
    cluster = Cluster([10], 4, depth=2)
    request = cluster.add(prompt(3), greedy(3))
    plans = [cluster.core.plan() for _ in range(3)]
    assert all(plan is not None for plan in plans) and request.in_flight == 3
    assert cluster.core.plan() is None, "nothing can run before the steps in flight are known"
    for plan in plans:
        assert plan is not None
        deltas = cluster.core.apply(Outcome(plan.step, (Sampled(request.number, 5, 0.0),)))
    assert deltas[0].finish_reason == "length" and not cluster.scheduler.has_work


# --- everything at once


def test_every_combination_at_once() -> None:
    """Twelve requests in pools that hold three or so, for every placement, layout and mode."""
    count = 0
    for placement, layout, mode in itertools.product(PLACEMENTS, LAYOUTS, MODES):
        for depth, blocks in enumerate(([9], [5, 4], [2, 7, 3], [3, 3, 3, 3])):
            cluster = Cluster(
                blocks, 4, placement=placement, layout=layout, mode=mode, budget=10,
                depth=depth % 2 + 1,
            )  # fmt: skip
            rng = random.Random(str((placement, layout, mode, blocks)))
            largest = cluster.scheduler.largest_tokens
            for i in range(12):
                length = rng.randint(1, largest - 4)
                cluster.add(prompt(length, i % 5), greedy(rng.randint(1, 5)))
            cluster.settle()
            count += cluster.check_outputs()
    assert count == 12 * 4 * 30


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
        depth=draw(st.integers(1, 2)),
    )


@given(clusters(), st.data())
@settings(max_examples=150)
def test_a_request_alone_reaches_the_full_capacity(cluster: Cluster, data: st.DataObject) -> None:
    """Whatever is cached from before, and whatever the placement."""
    blocks = [max(cluster.blocks)] if cluster.mode[0] == "local" else cluster.blocks
    capacity = sum(blocks) * cluster.block_size
    assert cluster.scheduler.largest_tokens == capacity
    for first in (1, 2, 1):
        length = data.draw(st.integers(1, capacity))
        request = cluster.add(prompt(length, first), greedy(capacity - length + 1))
        cluster.settle()
        cluster.check_output(request)
        assert request.num_preemptions == 0
        with pytest.raises(CapacityError):
            cluster.add(prompt(length), greedy(capacity - length + 2))


def test_stats_count_what_happened() -> None:
    cluster = Cluster([12, 2], 4)
    first = cluster.add(prompt(9), greedy(4))
    cluster.ask(prompt(9), sampled(3, n=2))
    plans = [stepped(cluster), stepped(cluster)]
    stats = cluster.core.stats()
    assert (stats.num_requests_running, stats.num_requests_waiting) == (3, 0)
    assert sum(stats.kv_blocks_used) == sum(cluster.used()) > 0
    assert stats.kv_blocks_total == (12, 2)
    plans += cluster.settle()
    stats = cluster.core.stats()
    modes: Counter[str] = Counter()
    for plan in plans:
        modes.update(c.mode for c in plan.chunks)
        for decodes in plan.decodes:
            modes[decodes.mode] += len(decodes.requests)
    assert stats.mode_counts == dict(modes)
    assert (stats.steps, stats.prompt_tokens) == (len(plans), 18)
    assert stats.generation_tokens == 4 + 3 + 3
    assert stats.finished == {"length": 3}
    assert (stats.prefix_cache_queries, stats.prefix_cache_hits) == (18, 8)
    assert sum(stats.kv_blocks_cached) == sum(cluster.cached()) >= 2
    cluster.check_output(first)


# --- ranks that share cores


def ranks_in_use(cluster: Cluster) -> set[int]:
    return {r for r in range(len(cluster.blocks)) if cluster.scheduler.allocator.num_used(r)}


def test_short_requests_keep_to_as_many_ranks_as_can_compute_while_these_have_room() -> None:
    """Four ranks; two can compute at once: each at work reads all weights in a step."""
    cluster = Cluster([20] * 4, seats=Seats(("here",) * 4, 2))
    for i in range(6):
        cluster.add(prompt(8, i), sampled(12))
        cluster.step()
    assert len(ranks_in_use(cluster)) == 2
    for i in range(6):
        cluster.add(prompt(20, 9 + i), sampled(20))
        cluster.step()
    assert len(ranks_in_use(cluster)) > 2, "the others take what these cannot hold"
    cluster.settle()
    cluster.check_outputs()
    cluster.add(prompt(8, 50), sampled(4))
    cluster.step()
    assert len(ranks_in_use(cluster)) == 1


def test_a_lone_prompt_spreads_over_as_many_ranks_as_can_compute() -> None:
    cost = CostModel(
        flops_per_s=1e9, bytes_per_s=1e12, latency_s=1e-9, num_layers=4, num_q_heads=4,
        num_kv_heads=2, head_dim=16, weights=1000, element=4,
    )  # fmt: skip
    for at_once, want in ((4, 4), (2, 2), (1, 1)):
        cluster = Cluster([20] * 4, seats=Seats(("here",) * 4, at_once), cost=cost)
        cluster.add(prompt(64, 1), greedy(2))
        cluster.step()
        assert len(ranks_in_use(cluster)) == want
        cluster.settle()
        cluster.check_outputs()


def test_each_host_has_its_own_cores() -> None:
    cluster = Cluster([20] * 4, seats=Seats(("a", "b", "a", "b"), 1), num_hosts=2)
    for i in range(6):
        cluster.add(prompt(8, i), sampled(12))
        cluster.step()
    used = ranks_in_use(cluster)
    assert len(used) == 2 and len({rank % 2 for rank in used}) == 2
    cluster.settle()
    cluster.check_outputs()


def test_a_prefix_on_a_sleeping_rank_is_copied_to_one_at_work() -> None:
    cluster = Cluster([40] * 4, seats=Seats(("here",) * 4, 1))
    shared = prompt(16, 3)
    first = cluster.add(shared, greedy(2))
    cluster.settle()
    other = cluster.add(prompt(9, 7), sampled(30))  # takes the emptiest, another one
    cluster.step()
    assert ranks_in_use(cluster) == {other.table.last_rank}
    again = cluster.add([*shared, *prompt(3, 8)], sampled(5))
    cluster.step()
    assert ranks_in_use(cluster) == {other.table.last_rank}
    assert again.cached_tokens == 16 and first.finish_reason == "length"
    cluster.settle()
    cluster.check_outputs()


def test_work_without_a_step_is_an_error_not_a_wait() -> None:
    """It cannot be brought about from outside: the test allocates the blocks behind its back."""
    cluster = Cluster([8], 4)
    cluster.add([1, 2, 3])
    cluster.scheduler.block_manager.closed.add(0)
    with pytest.raises(IntegrityError, match="0 requests run and 1 wait, but no step comes of it"):
        for _ in range(cluster.scheduler.limits.max_num_seqs + 2):
            cluster.core.plan()


# --- pacing learns from each step's own seconds


class WatchedPacer(ChunkPacer):
    """Remembers what it observes."""

    def __init__(self) -> None:
        super().__init__(2.0)
        self.observed: list[tuple[float, int, float]] = []

    def observe(self, seconds: float, decodes: int, work: float) -> None:
        self.observed.append((seconds, decodes, work))
        super().observe(seconds, decodes, work)


def work_of(plan: StepPlan, pacer: ChunkPacer, ranks: int) -> float:
    """The work on prompts of the rank that has most, from the plan alone."""
    work = [0.0] * ranks
    for chunk in plan.chunks:
        tokens = sum(total(runs) for _, runs in chunk.owners)
        past = min(start for _, runs in chunk.owners for start, _ in runs)
        for rank, runs in chunk.owners:
            work[rank] += pacer.work(total(runs), tokens, past)
    return max(work)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_seconds_of_a_step_are_charged_to_that_steps_plan(depth: int) -> None:
    """Prompts on both ranks beside decodes, steps planned ahead, and each step's own time."""
    pacer = WatchedPacer()
    cluster = Cluster([300, 300], depth=depth, pacer=pacer)
    cluster.seconds = lambda plan: 0.01 + plan.step / 1000
    for i in range(4):
        cluster.add(prompt(4, i), sampled(80))
    for _ in range(10):
        cluster.step()
    for i in range(3):
        cluster.add(prompt(90 + i, 10 + i), sampled(9))
    plans = [plan for _ in range(60) if (plan := cluster.step())]
    plans += cluster.settle()
    assert len({len(plan.chunks) for plan in plans}) >= 2
    seen = {seconds: (decodes, work) for seconds, decodes, work in pacer.observed}
    assert len(seen) == len(pacer.observed) == plans[-1].step, "each step once"
    for plan in plans:
        want = sum(len(decodes.requests) for decodes in plan.decodes), work_of(plan, pacer, 2)
        assert seen[0.01 + plan.step / 1000] == want


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("depth", [1, 2])
def test_a_decode_is_slowed_alike_by_a_prompt_on_any_rank(rank: int, depth: int) -> None:
    """It was slowed 1.6 times by a prompt on its own rank, 4.3 times by one on another. A step
    takes as long as its slowest rank: 10 ms, and 1 ms a prompt token."""
    pacer = ChunkPacer(2.0)
    cluster = Cluster([300, 300], depth=depth, pacer=pacer, prefix_caching=False)

    def seconds(plan: StepPlan) -> float:
        return 0.010 + 0.001 * work_of(plan, pacer, 2) if plan.chunks else 0.010

    cluster.seconds = seconds
    decode = cluster.add(prompt(4), sampled(300))
    for _ in range(20):
        stepped(cluster)
    assert decode.table is not None and decode.table.span == (0,)
    long = cluster.add(prompt(700, 5), greedy(1))
    if rank == 0:
        cluster.scheduler.drain(1)
    times = []
    while long.finish_reason is None:
        plan = stepped(cluster)
        times.append(seconds(plan))
        for chunk in plan.chunks:
            assert [owner for owner, _ in chunk.owners] == [rank]
    settled = sorted(times[10:])
    assert settled[len(settled) // 2] <= 2.1 * 0.010 and max(settled) <= 3 * 0.010
    assert len(times) <= 300, "and the prompt gets on"
