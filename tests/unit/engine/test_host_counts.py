"""Host memory is counted wherever capacity is: facts and rules, the line at start, the live
picture, statistics and metrics."""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from typing import cast

import pytest
from prometheus_client.parser import text_string_to_metric_families

from ds_cp.api.metrics import ServerMetrics
from ds_cp.config import load_config
from ds_cp.engine.interface import EngineInterface, EngineStats
from ds_cp.engine.observer import Observer
from ds_cp.facts import Facts
from ds_cp.scheduler.build import ALONE_S, BESIDE_S, build_scheduler, host_cost, host_rules
from ds_cp.scheduler.host_moves import HostRules
from ds_cp.serve.ready_facts import info_of
from ds_cp.startup.report import summary
from tests.helpers.cluster import Cluster, greedy, prompt

BARE = Facts(
    hosts=("a", "a"), cp_size=2, tp_size=1, device="cpu", dtype="bfloat16", kernel="cpu",
    max_model_len=8192, vocab_size=50, eos_token_ids=(), num_q_heads=9, num_kv_heads=3,
    block_size=64, blocks_per_rank=(30, 30), bytes_per_token=23040, num_layers=30, threads=1,
    ranks_at_once=2, exactness=0.0, links=(), flops_per_s=1e11, weights=106_000_000, head_dim=64,
)  # fmt: skip
FACTS = dataclasses.replace(BARE, host_blocks_per_rank=(100, 50), host_gb_per_s=2.5)


def test_rules_follow_from_what_was_measured() -> None:
    rules = host_rules(FACTS)
    block = 64 * 23040
    assert rules.slots_per_rank == (100, 50) and rules.max_model_len == 8192
    assert rules.beside == int(BESIDE_S * 2.5e9 / block) and rules.alone == int(
        ALONE_S * 2.5e9 / block
    )
    assert host_rules(BARE).slots_per_rank == () and host_cost(BARE) is None
    slow = host_rules(dataclasses.replace(FACTS, host_gb_per_s=1e-6))
    assert slow.beside == slow.alone == 1, "some come back in any case"


def test_the_cost_of_a_copy_is_its_bytes_over_the_rate() -> None:
    cost = host_cost(FACTS)
    assert cost is not None
    assert cost.host_s(4000) == pytest.approx(4000 * 23040 / 2.5e9)
    assert cost.copy_pays(64, 0, 2) and not cost.copy_pays(64, 0, 10**6)
    assert dataclasses.replace(cost, host_bytes_per_s=0.0).host_s(1) == float("inf")
    assert cost.host_s(4000) < 0.3 * cost.prefill_s(1, 4000, 0)


def test_the_line_at_start() -> None:
    [line] = [line for line in summary(load_config({"model": "m"}), FACTS) if "host memory" in line]
    assert line.startswith("host memory: 9600 tokens more = 6400 + 3200 per rank (up to 141 MiB)")
    assert "2.50 GB/s: 4000 tokens come back in 0.037 s" in line
    assert not any("host memory" in line for line in summary(load_config({"model": "m"}), BARE))


def test_capacity_is_a_fact_of_the_server() -> None:
    config = load_config({"model": "m"})
    assert info_of("m", FACTS, build_scheduler(config, FACTS)).host_capacity_tokens == 9600
    assert info_of("m", BARE, build_scheduler(config, BARE)).host_capacity_tokens == 0


def used_cluster(host: HostRules | None) -> Cluster:
    cluster = Cluster([6, 6], 4, host=host)
    for first in (1, 2, 3, 1, 2):
        cluster.add(prompt(40, first), greedy(2))
        cluster.settle()
    return cluster


def test_picture_and_statistics() -> None:
    cluster = used_cluster(HostRules((20, 30)))
    picture = Observer(cluster.core, ("a", "b"), nullcontext()).picture()
    stats = cluster.core.stats()
    assert [rank.host_total for rank in picture.ranks] == [20, 30] == list(stats.host_blocks_total)
    assert [rank.host_used for rank in picture.ranks] == list(stats.host_blocks_used)
    assert sum(stats.host_blocks_used) == sum(map(cluster.tier.num_used, (0, 1))) > 0
    assert picture.counters.host_blocks_spilled == stats.host_blocks_spilled > 0
    assert picture.counters.host_blocks_restored == stats.host_blocks_restored > 0
    assert 0 < stats.prefix_cache_host_hits <= stats.prefix_cache_hits
    restored = [kind for kind in cluster.kinds if kind == "restore"]
    assert len(restored) <= stats.host_blocks_restored


def test_without_it_nothing_is_said() -> None:
    cluster = used_cluster(None)
    picture = Observer(cluster.core, ("a", "b"), nullcontext()).picture()
    assert [(rank.host_used, rank.host_total) for rank in picture.ranks] == [(0, 0)] * 2
    assert cluster.core.stats().host_blocks_total == ()


class _Engine:
    state = "ready"

    def stats(self) -> EngineStats:
        return EngineStats(
            kv_blocks_used=(1, 2), kv_blocks_total=(9, 9), host_blocks_used=(3, 0),
            host_blocks_total=(5, 0), host_blocks_spilled=7, host_blocks_restored=4,
            prefix_cache_host_hits=64,
        )  # fmt: skip


def test_metrics() -> None:
    body, _ = ServerMetrics(cast(EngineInterface, _Engine()), lambda: "m").exposition("")
    found = {
        (sample.name, sample.labels.get("rank"), sample.labels.get("state")): sample.value
        for family in text_string_to_metric_families(body.decode())
        for sample in family.samples
    }
    assert found["ds_cp:host_blocks", "0", "used"] == 3
    assert found["ds_cp:host_blocks", "0", "free"] == 2
    assert found["ds_cp:host_blocks", "1", "free"] == 0
    assert found["ds_cp:host_blocks_spilled_total", None, None] == 7
    assert found["ds_cp:host_blocks_restored_total", None, None] == 4
    assert found["ds_cp:prefix_cache_host_hits_total", None, None] == 64
