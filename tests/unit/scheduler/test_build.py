"""The cost model that the scheduler gets from the facts of a start."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ds_cp.facts import Facts, LinkFacts
from ds_cp.scheduler.build import cost_model

FACTS = Facts(
    hosts=("a",) * 4 + ("b",) * 4, cp_size=8, tp_size=1, device="cpu", dtype="float32",
    kernel="cpu", max_model_len=100, vocab_size=50, eos_token_ids=(), num_q_heads=8, num_kv_heads=4,
    block_size=16, blocks_per_rank=(30,) * 8, bytes_per_token=8, num_layers=2, threads=1,
    ranks_at_once=2, exactness=0.0, links=(LinkFacts("x", 5.0, 10.0),), flops_per_s=1e11,
    weights=1000, head_dim=4, layer_weights=600, stored_weights=800, head_weights=200,
    bytes_per_s=1e10, alone_bytes_per_s=1.6e10, layer_s=2e-4, hop_s=1e-4,
)  # fmt: skip


def test_rates_are_those_that_were_measured() -> None:
    cost = cost_model(FACTS)
    assert cost is not None
    assert (cost.weights, cost.stored, cost.head) == (600, 800, 200)
    assert cost.layer_s == 2e-4 and cost.hop_s == pytest.approx(1e-4 - cost.latency_s)
    assert cost.readers == 2, "of four ranks of a host two compute at once"
    assert [cost.reading_per_s(n) for n in (1, 2, 4)] == pytest.approx([1.6e10, 1e10, 1e10])


def test_a_group_of_tensor_parallel_ranks_reads_together() -> None:
    """Each reads its share; two of a host's four at once are one group."""
    cost = cost_model(replace(FACTS, cp_size=4, tp_size=2))
    assert cost is not None and cost.readers == 1
    assert [cost.reading_per_s(n) for n in (1, 2)] == [1e10, 1e10]
    wide = cost_model(replace(FACTS, cp_size=4, tp_size=2, ranks_at_once=4))
    assert wide is not None and wide.readers == 2
    assert [wide.reading_per_s(n) for n in (1, 2)] == [1.6e10, 1e10]


def test_what_was_not_measured_costs_nothing() -> None:
    old = replace(
        FACTS, layer_weights=0, stored_weights=0, head_weights=0, bytes_per_s=0.0,
        alone_bytes_per_s=0.0,
    )  # fmt: skip
    cost = cost_model(old)
    assert cost is not None and cost.weights == 1000
    assert cost.reading_per_s(1) == cost.reading_per_s(2) == float("inf")
    assert cost_model(replace(FACTS, links=())) is None
