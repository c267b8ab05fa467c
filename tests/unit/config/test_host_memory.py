"""The budget of host memory: what it may be, and what it needs beside it."""

from __future__ import annotations

from typing import Any

import pytest

from ds_cp.config import load_config
from ds_cp.errors import ConfigError


def kv(**values: Any) -> dict[str, Any]:
    return {"model": "m", "kv_cache": values}


@pytest.mark.parametrize(
    ("value", "bytes_of"),
    [(0, 0), ("1GiB", 1 << 30), (4096, 4096), (["1MiB", 0], (1 << 20, 0)), ([5, 7], (5, 7))],
)
def test_sizes_and_lists(value: Any, bytes_of: Any) -> None:
    assert load_config(kv(host_memory_per_rank=value)).kv_cache.host_memory_per_rank == bytes_of


@pytest.mark.parametrize("value", ["12XB", "auto", "", -1, True, 1.5, [], ["1MiB", -1], None])
def test_what_is_no_size(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"kv_cache.host_memory_per_rank is .*it must be"):
        load_config(kv(host_memory_per_rank=value))


def test_it_needs_prefix_caching() -> None:
    with pytest.raises(ConfigError, match=r"prefix_caching is false; set it to true or leave"):
        load_config(kv(host_memory_per_rank="1MiB", prefix_caching=False))
    assert load_config(kv(host_memory_per_rank=0, prefix_caching=False))


def test_a_folder_needs_a_size() -> None:
    with pytest.raises(ConfigError, match=r"host_folder is set, .*say how much"):
        load_config(kv(host_folder="here"))
    assert load_config(kv(host_folder="here", host_memory_per_rank=[0, 1])).kv_cache.host_folder


def test_a_list_names_every_rank() -> None:
    with pytest.raises(ConfigError, match=r"host_memory_per_rank lists 2 ranks .*size is 3"):
        load_config(kv(host_memory_per_rank=[1, 2]) | {"context_parallel": {"size": 3}})
