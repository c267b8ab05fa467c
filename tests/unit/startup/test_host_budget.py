"""How much KV a rank's host memory holds, against arithmetic; what cannot be is said in a line."""

from __future__ import annotations

from collections import namedtuple
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from ds_cp.attention import LayerSpec
from ds_cp.comm.wire import World
from ds_cp.config import Config, load_config
from ds_cp.errors import ConfigError
from ds_cp.kv.pool import KVPool
from ds_cp.startup import host_budget
from ds_cp.startup.host_budget import decide_slots, open_slots
from ds_cp.topology.hosts import Topology

SPEC = LayerSpec(num_q_heads=4, num_kv_heads=2, head_dim=16, scale=0.25)
POOL = KVPool([SPEC] * 2, 4, 8, torch.float32, torch.device("cpu"))
BLOCK = POOL.block_elements * 4  # bytes
Memory = namedtuple("Memory", "available")


def world_of(hosts: list[str], device: str = "cpu") -> World:
    """Rank 0's place; the ranks have not joined."""
    topology = Topology.from_hosts(hosts)
    return World(0, topology, torch.device(device), 60.0, joined=False)


def config_of(**kv: Any) -> Config:
    return load_config({"model": "m", "kv_cache": kv})


def slots(hosts: list[str], rank: int = 0, unclaimed: int = 0, **kv: Any) -> int:
    return decide_slots(config_of(**kv), world_of(hosts), POOL, rank, len(hosts), unclaimed)


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> int:
    """The host's free bytes, as decided here."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: Memory(100 * BLOCK))
    return 100 * BLOCK


def test_whole_blocks_of_the_budget(free: int) -> None:
    assert slots(["a"]) == 0
    assert slots(["a"], host_memory_per_rank=7 * BLOCK + BLOCK - 1) == 7
    assert [slots(["a", "b"], r, host_memory_per_rank=[3 * BLOCK, 0]) for r in (0, 1)] == [3, 0]
    assert slots(["a"], host_memory_per_rank=free) == 100


def test_no_more_than_is_free_for_each_rank(free: int) -> None:
    line = rf"asks for {51 * BLOCK} bytes in memory on cp rank 0, but {50 * BLOCK} are free .*lower"
    with pytest.raises(ConfigError, match=line):
        slots(["a", "a"], host_memory_per_rank=51 * BLOCK)
    assert slots(["a", "b"], host_memory_per_rank=51 * BLOCK) == 51
    with pytest.raises(ConfigError, match=f"but {60 * BLOCK} are free"):
        slots(["a"], unclaimed=40 * BLOCK, host_memory_per_rank=61 * BLOCK)


def test_less_than_a_block_and_a_list_of_another_length(free: int) -> None:
    with pytest.raises(ConfigError, match=f"{BLOCK - 1} bytes, less than one block of {BLOCK}"):
        slots(["a"], host_memory_per_rank=BLOCK - 1)
    with pytest.raises(ConfigError, match=r"host_memory_per_rank lists 3 budgets, .* 2 context"):
        slots(["a", "b"], host_memory_per_rank=[1, 2, 3])


def test_a_folder_has_its_own_room(free: int, tmp_path: Path) -> None:
    folder = str(tmp_path)
    assert slots(["a"], host_memory_per_rank=200 * BLOCK, host_folder=folder) == 200
    with pytest.raises(ConfigError, match=r"in .* on cp rank 0, but \d+ are free"):
        slots(["a"], host_memory_per_rank=1 << 50, host_folder=folder)
    with pytest.raises(ConfigError, match="none cannot be used: No such file"):
        slots(["a"], host_memory_per_rank=BLOCK, host_folder=str(tmp_path / "none"))
    config = config_of(host_memory_per_rank=BLOCK, host_folder=folder)
    with pytest.raises(ConfigError, match="host_folder is for ranks on CPU"):
        decide_slots(config, world_of(["a"], "cuda"), POOL, 0, 1, 0)


def test_slots_are_opened_and_measured(tmp_path: Path) -> None:
    assert open_slots(config_of(), world_of(["a"]), POOL, 0, 0) == (None, 0.0)
    for kv in ({}, {"host_folder": str(tmp_path), "host_memory_per_rank": 1}):
        store, rate = open_slots(config_of(**kv), world_of(["a"]), POOL, 3, 0)
        assert store is not None and store.num_slots == 3 and rate > 0
        store.close()


def test_what_cannot_be_had_is_said_with_the_way_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def opening(error: Exception, **kv: Any) -> Any:
        def fail(*_: Any) -> Any:
            raise error

        monkeypatch.setattr(host_budget, "open_store", fail)
        return open_slots(config_of(**kv), world_of(["a"]), POOL, 2, 0)

    folder = {"host_folder": str(tmp_path), "host_memory_per_rank": 1}
    for error in (OSError(28, "No space left on device"), MemoryError("no")):
        with pytest.raises(ConfigError, match=rf"cannot hold {2 * BLOCK} bytes .*name a folder"):
            opening(error, **folder)
        with pytest.raises(ConfigError, match=rf"asks for {2 * BLOCK} bytes in memory"):
            opening(error)
    with pytest.raises(RuntimeError, match="something else"):
        opening(RuntimeError("something else"))
