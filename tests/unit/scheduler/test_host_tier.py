"""Blocks that the device gives away go to host memory and come back: what is copied when, on a
simulated cluster that checks every content that is read."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest

from ds_cp.cost import CostModel
from ds_cp.layout import on_host
from ds_cp.plan import ATTENTION_SCHEMES, Outcome, RankTimes, StepPlan, Transfer
from ds_cp.sampling_params import SamplingParams
from ds_cp.scheduler.host_moves import HostRules
from ds_cp.scheduler.request import Request
from tests.helpers.cluster import Cluster, greedy, prompt

RATES = CostModel(
    flops_per_s=1e9, bytes_per_s=1e9, latency_s=1e-6, num_layers=2, num_q_heads=4, num_kv_heads=2,
    head_dim=8, weights=1000, element=4, host_bytes_per_s=1e9,
)  # fmt: skip


def spills(plans: Sequence[StepPlan]) -> list[Transfer]:
    return [t for plan in plans for t in plan.transfers if on_host(t.target)]


def restores(plans: Sequence[StepPlan]) -> list[Transfer]:
    return [t for plan in plans for t in plan.transfers if on_host(t.source)]


def run(cluster: Cluster, tokens: Sequence[int], count: int = 2) -> tuple[Request, list[StepPlan]]:
    """One request alone, to its end."""
    request = cluster.add(tokens, greedy(count))
    return request, cluster.settle()


def cached(cluster: Cluster, request: Request) -> int | None:
    return cluster.lives[request.number].cached_tokens


def test_what_the_device_gives_away_comes_back_from_the_host() -> None:
    cluster = Cluster([6], 4, host=HostRules((6,)))
    first, _ = run(cluster, prompt(20, 1))
    _, plans = run(cluster, prompt(20, 2))
    assert len(spills(plans)) == 5, "one for each block that it wrote, whose content has a key"
    again, plans = run(cluster, prompt(20, 1))
    assert cached(cluster, again) == 16 and len(restores(plans)) == 4
    assert sum(map(_computed, plans)) == 4, "the last block, for its logits"
    assert cluster.scheduler.block_manager.host.hits == 16
    assert cached(cluster, first) == 0
    cluster.check_outputs()


def _computed(plan: StepPlan) -> int:
    return sum(n for chunk in plan.chunks for _, runs in chunk.owners for _, n in runs)


def test_without_slots_nothing_is_kept() -> None:
    cluster = Cluster([6], 4)
    run(cluster, prompt(20, 1))
    run(cluster, prompt(20, 2))
    again, plans = run(cluster, prompt(20, 1))
    assert cached(cluster, again) == 0 and not any(plan.transfers for plan in plans)


def test_a_block_is_copied_when_it_is_written_and_not_before() -> None:
    """So a step copies no more than it computes, whatever a start reserves."""
    cluster = Cluster([8], 4, budget=4, host=HostRules((8,)))
    run(cluster, prompt(28, 1))
    cluster.add(prompt(28, 2), greedy(2))
    plans = [plan for _ in range(7) if (plan := cluster.step()) is not None]
    assert [len(spills([plan])) for plan in plans] == [1, 1, 1, 1, 1, 1, 0], "one block was free"
    cluster.settle()
    cluster.check_outputs()


def test_what_was_given_away_and_not_overwritten_yet_is_found() -> None:
    cluster = Cluster([14], 4, budget=4, host=HostRules((14,)))
    run(cluster, prompt(28, 1))
    other = cluster.add(prompt(40, 2), greedy(2))
    plan = cluster.step()
    assert plan is not None and len(spills([plan])) == 1, "of the three that it was given"
    cluster.abort(other)
    again, _ = run(cluster, prompt(28, 1))
    assert cached(cluster, again) == 24
    cluster.check_outputs()


def test_a_step_brings_back_a_few_blocks_and_decodes_go_on() -> None:
    cluster = Cluster([12], 4, host=HostRules((12,), beside=2, alone=5))
    run(cluster, prompt(40, 1))
    run(cluster, prompt(44, 2))
    decode = cluster.add([7], greedy(14))
    cluster.step()
    again = cluster.add(prompt(33, 1), greedy(2))
    plans = cluster.settle()
    counts = [len(restores([plan])) for plan in plans]
    at = counts.index(2)
    assert counts[at : at + 5] == [2, 2, 2, 2, 0] and sum(counts) == 8
    for plan in plans[at : at + 4]:
        assert any(decode.number in decodes.requests for decodes in plan.decodes)
    chunks = [bool(plan.chunks) for plan in plans[at : at + 4]]
    assert chunks == [False, False, False, True], "it computes when all is there"
    assert cached(cluster, again) == 32
    cluster.check_outputs()


def test_alone_it_brings_back_more_at_once() -> None:
    cluster = Cluster([12], 4, host=HostRules((12,), beside=2, alone=5))
    run(cluster, prompt(40, 1))
    run(cluster, prompt(44, 2))
    _, plans = run(cluster, prompt(33, 1))
    assert [len(restores([plan])) for plan in plans] == [5, 3, 0]
    cluster.check_outputs()


def test_the_host_gives_away_what_was_not_used_for_longest() -> None:
    cluster = Cluster([3], 4, host=HostRules((4,)))
    for first in (1, 2, 3):
        run(cluster, prompt(9, first))
    again, _ = run(cluster, prompt(9, 1))
    assert cached(cluster, again) in (0, 4, 8)
    recent, _ = run(cluster, prompt(9, 3))
    assert cached(cluster, recent) == 8
    assert cluster.tier.lost > 0
    cluster.check_outputs()


def test_a_preempted_request_comes_back_from_the_host() -> None:
    cluster = Cluster([8], 4, host=HostRules((16,)))
    old, young = cluster.add(prompt(12, 1), greedy(16)), cluster.add(prompt(12, 2), greedy(8))
    plans = cluster.settle()
    assert young.num_preemptions and not old.num_preemptions
    begins = [b for plan in plans for b in plan.begins if b.request == young.number]
    assert begins[-1].computed >= 12 and restores(plans)
    cluster.check_outputs()


@pytest.mark.parametrize(("rate", "comes_back"), [(1e9, True), (1e2, False)], ids=["quick", "slow"])
def test_what_costs_less_to_compute_is_computed(rate: float, comes_back: bool) -> None:
    cost = dataclasses.replace(RATES, host_bytes_per_s=rate, flops_per_s=1e6)
    cluster = Cluster([6], 4, host=HostRules((6,), cost=cost, max_model_len=64))
    run(cluster, prompt(20, 1))
    _, plans = run(cluster, prompt(20, 2))
    assert bool(spills(plans)) == comes_back
    again, plans = run(cluster, prompt(20, 1))
    assert bool(restores(plans)) == comes_back == bool(cached(cluster, again))
    cluster.check_outputs()


def test_a_beginning_on_the_host_comes_back_to_another_rank() -> None:
    """Rank 0 is busy, so its request is local on rank 1."""
    cluster = Cluster([6, 8], 4, mode=("local", "auto"), host=HostRules((6, 8)))
    run(cluster, prompt(28, 9))  # on the roomiest
    assert cluster.cached()[1] == 7
    cluster.scheduler.drain(1)
    run(cluster, prompt(20, 1))
    run(cluster, prompt(20, 2))
    cluster.scheduler.reopen(1)
    busy = cluster.add(prompt(20, 3), greedy(4))
    cluster.step()
    assert busy.table is not None
    again = cluster.add(prompt(20, 1), greedy(2))
    plans = cluster.settle()
    assert {(t.source[0], t.target[0]) for t in restores(plans)} <= {(0, 0), (0, 1)}
    assert cached(cluster, again) == 16
    cluster.check_outputs()


def test_a_drained_rank_keeps_nothing_on_its_host() -> None:
    cluster = Cluster([6, 6], 4, host=HostRules((6, 6)))
    for first in (1, 2, 3, 4):
        run(cluster, prompt(20, first))
    used = [cluster.tier.num_used(rank) for rank in (0, 1)]
    assert sum(used) > 0
    rank = used.index(max(used))
    cluster.scheduler.drain(rank)
    assert cluster.tier.num_used(rank) == 0 and cluster.scheduler.is_drained(rank)
    run(cluster, prompt(20, 5))
    assert cluster.tier.num_used(rank) == 0
    cluster.check_outputs()


def test_reset_forgets_the_host_too() -> None:
    cluster = Cluster([6], 4, host=HostRules((6,)))
    run(cluster, prompt(20, 1))
    run(cluster, prompt(20, 2))
    cluster.scheduler.reset_prefix_cache()
    assert cluster.tier.num_used(0) == 0
    again, plans = run(cluster, prompt(20, 1))
    assert cached(cluster, again) == 0 and not spills(plans)


def test_an_abort_while_blocks_come_back_loses_none() -> None:
    cluster = Cluster([12], 4, host=HostRules((12,), beside=1, alone=1))
    run(cluster, prompt(40, 1))
    run(cluster, prompt(44, 2))
    kept = cluster.tier.num_used(0)
    away = cluster.add(prompt(33, 1), greedy(2))
    cluster.step()
    cluster.step()
    assert len(away.restoring) == 6
    cluster.abort(away)
    cluster.scheduler.check_integrity()
    assert cluster.tier.num_used(0) >= kept
    again, _ = run(cluster, prompt(33, 1))
    assert cached(cluster, again) == 32
    cluster.check_outputs()


def test_a_preempted_request_is_computed_where_that_costs_less() -> None:
    cost = dataclasses.replace(RATES, host_bytes_per_s=1e2)
    cluster = Cluster([8], 4, host=HostRules((16,), cost=cost, max_model_len=64))
    cluster.add(prompt(12, 1), greedy(16))
    young = cluster.add(prompt(12, 2), greedy(8))
    plans = cluster.settle()
    assert young.num_preemptions and not spills(plans) and not restores(plans)
    cluster.check_outputs()


def test_who_waits_for_plans_that_do_not_count_starts_again() -> None:
    """As after the death of a rank: steps 1 to ``reported`` were carried out."""
    cluster = Cluster([12], 4, host=HostRules((12,), beside=1, alone=1))
    run(cluster, prompt(40, 1))
    run(cluster, prompt(44, 2))
    waits = cluster.add(prompt(33, 1), greedy(2))
    cluster.step()
    step = cluster.scheduler._steps
    host, running = cluster.scheduler.block_manager.host, cluster.scheduler.running
    assert waits.restored_step == step and host.recover((), step, running) == [waits]
    while waits.restoring:
        cluster.step()
    assert waits.num_keyed, "it computes in the step in which the last of it comes back"
    assert host.recover((), waits.restored_step - 1, running) == [], "it is rewound"
    host.recover((0,), step, ())
    assert cluster.tier.num_used(0) == 0
    cluster.settle()
    cluster.check_outputs()


@pytest.mark.parametrize("done", [True, False])
@pytest.mark.parametrize("depth", [1, 2])
def test_a_death_while_blocks_come_back(done: bool, depth: int) -> None:
    """The host of a rank that lives has what was there before the steps that nobody reported."""
    cluster = Cluster([12, 12], 4, mode=("local", "auto"), depth=depth,
                      host=HostRules((12, 12), beside=1, alone=1))  # fmt: skip
    cluster.scheduler.drain(1)
    run(cluster, prompt(40, 1))
    run(cluster, prompt(44, 2))
    cluster.scheduler.reopen(1)
    waits = cluster.add(prompt(33, 1), greedy(2))
    for _ in range(4):
        cluster.step()
    assert waits.restoring and (waits.table is not None)
    cluster.die([1], lambda: done)
    assert waits.table is None, "it starts again"
    plans = cluster.settle()
    assert len(restores(plans)) == 8 and cluster.lives[waits.number].cached_tokens == 32
    cluster.check_outputs()


def test_the_host_of_a_lost_rank_is_empty() -> None:
    cluster = Cluster([6, 6], 4, host=HostRules((6, 6)))
    for first in (1, 2, 3, 4):
        run(cluster, prompt(20, first))
    used = [cluster.tier.num_used(rank) for rank in (0, 1)]
    rank = used.index(max(used))
    cluster.die([rank], lambda: True)
    assert cluster.tier.num_used(rank) == 0 and cluster.tier.num_used(1 - rank) == used[1 - rank]
    for first in (1, 2, 3, 4):
        run(cluster, prompt(20, first))
    cluster.check_outputs()


def test_what_a_step_that_nobody_reported_copied_there_is_forgotten() -> None:
    cluster = Cluster([6], 4, depth=2, host=HostRules((6,)))
    run(cluster, prompt(20, 1))
    cluster.add(prompt(20, 2), greedy(4))
    plan = cluster.step()
    assert plan is not None and len(spills([plan])) == 4 == cluster.tier.num_used(0)
    cluster.die([], lambda: False)
    assert cluster.tier.num_used(0) == 0
    cluster.settle()
    cluster.check_outputs()


def test_what_was_kept_before_and_copied_by_such_a_step_is_forgotten_too() -> None:
    cluster = Cluster([8], 4, budget=4, depth=2, host=HostRules((8,)))
    run(cluster, prompt(28, 1))
    other = cluster.add(prompt(28, 2), greedy(2))
    for _ in range(4):
        cluster.step()
    assert cluster.tier.num_used(0) == 6 and len(cluster.flying) == 1
    cluster.die([], lambda: False)
    assert cluster.tier.num_used(0) == 5, "one was to be copied in the step that nobody reported"
    cluster.abort(other)
    run(cluster, prompt(28, 1))
    cluster.check_outputs()


def test_a_rank_whose_host_memory_fails_uses_it_no_more() -> None:
    cluster = Cluster([6, 6], 4, host=HostRules((6, 6)))
    host, core = cluster.scheduler.block_manager.host, cluster.core

    def run_all() -> None:
        for first in (1, 3, 5):
            cluster.add(prompt(20, first), greedy(2))
            cluster.add(prompt(20, first + 1), greedy(2))
            cluster.settle()

    def report(failed: int) -> None:
        sent = (0,) * len(ATTENTION_SCHEMES)
        core.apply(Outcome(ranks=(RankTimes(0, 0, 0, sent, failed), RankTimes(1, 0, 0, sent))))

    run_all()
    assert cluster.tier.num_used(0) and cluster.tier.num_used(1)
    report(2)
    assert host.failed == [2, 0] and cluster.tier.num_used(0) == 0
    run_all()
    assert cluster.tier.num_used(0) == 0 < cluster.tier.num_used(1)
    stats = core.stats()
    assert stats.host_blocks_total == (0, 6) and stats.host_blocks_failed == (2, 0)
    report(2)
    assert host.failed == [2, 0], "told before"
    cluster.die([0], lambda: True)
    run_all()
    assert cluster.tier.num_used(0), "its new worker has another file"
    report(1)
    assert host.failed == [3, 0] and cluster.tier.num_used(0) == 0
    cluster.check_outputs()


def test_scored_prompts_are_computed_whole() -> None:
    cluster = Cluster([6], 4, host=HostRules((6,)))
    run(cluster, prompt(20, 1))
    run(cluster, prompt(20, 2))
    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
    cluster.add(prompt(20, 1), params)
    assert not restores(cluster.settle())
    cluster.check_outputs()
