"""A worker that loads alone does as the ranks agreed when they started."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from ds_cp.config import Config, load_config
from ds_cp.startup.alone import as_agreed
from tests.unit.serve.test_async_engine import FACTS

UNEVEN = replace(
    FACTS, hosts=("a", "a"), cp_size=2, blocks_per_rank=(30, 20), kernel="sdpa", packed=True
)


def agreed(rank: int = 1, facts: Any = UNEVEN, **sections: Any) -> Config:
    return as_agreed(load_config({"model": "none", **sections}), facts, rank)


def test_what_start_up_decided() -> None:
    found = agreed(trace={"file": "trace.json"}, context_parallel={"size": 2})
    assert found.kv_cache.tokens_per_rank == 20 * 4
    assert found.attention.backend == "sdpa" and found.linear_layers == "packed"
    assert found.max_model_len == 100 and found.context_parallel.size == "auto"
    assert found.trace.file is None, "others have no trace any more"
    assert agreed(0).kv_cache.tokens_per_rank == 30 * 4
    assert agreed(facts=replace(UNEVEN, packed=False)).linear_layers == "torch"
    assert agreed(facts=replace(UNEVEN, device="cuda")).linear_layers == "auto"


@pytest.mark.parametrize("budget", ["1MiB", [4096, 8192]])
def test_budgets_of_the_config_are_not_asked_again(budget: Any) -> None:
    found = agreed(kv_cache={"memory_per_rank": budget})
    assert found.kv_cache.memory_per_rank == "auto" and found.kv_cache.tokens_per_rank == 80


def test_host_memory_has_as_many_blocks_as_before() -> None:
    facts = replace(UNEVEN, host_blocks_per_rank=(7, 0))
    kv = {"host_memory_per_rank": ["1MiB", 0], "host_folder": "/tmp"}
    block = facts.block_size * facts.bytes_per_token
    assert agreed(0, facts, kv_cache=kv).kv_cache.host_memory_per_rank == 7 * block
    assert agreed(1, facts, kv_cache=kv).kv_cache.host_memory_per_rank == 0
    assert agreed(0, kv_cache=kv).kv_cache.host_memory_per_rank == 0


def test_what_the_config_says_stays() -> None:
    found = agreed(attention={"backend": "reference"}, linear_layers="torch")
    assert found.attention.backend == "reference" and found.linear_layers == "torch"
