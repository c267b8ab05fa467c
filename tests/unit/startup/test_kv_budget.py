"""How much KV a rank gets, against arithmetic; no model and no other process."""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import psutil
import pytest
import torch

from ds_cp.attention import LayerSpec
from ds_cp.comm.wire import World
from ds_cp.config import load_config
from ds_cp.errors import ConfigError
from ds_cp.kv.pool import KVPool, bytes_per_token
from ds_cp.startup import kv_budget
from ds_cp.startup.kv_budget import KVBudget, allocate_pool, decide_budget
from ds_cp.topology.hosts import Topology, resolve_grid

MIB = 2**20
SPEC = LayerSpec(num_q_heads=4, num_kv_heads=2, head_dim=16, scale=0.25)
CPU = torch.device("cpu")
Memory = namedtuple("Memory", "available")


def world_of(hosts: list[str], device: torch.device = CPU) -> World:
    """Rank 0's place; the ranks have not joined."""
    return World(0, Topology.from_hosts(hosts), device, 60.0, joined=False)


def decide(
    hosts: list[str], per_token: int, length: int, device: torch.device = CPU, **config: Any
) -> KVBudget:
    world = world_of(hosts, device)
    grid = resolve_grid(world.topology, "auto", 1)
    return decide_budget(load_config(config, {"model": "m"}), world, grid, 0, per_token, length)


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> int:
    """The host's free bytes, as decided here."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: Memory(1000 * MIB))
    return 1000 * MIB


def test_auto_is_what_all_requests_can_use(free: int) -> None:
    """64 requests of a 512-position model: 0 preemptions; one model length had 61."""
    found = decide(["a"], 512, 512)
    assert (found.tokens, found.lazy) == (64 * 512, True)
    assert found.reason == "auto: max_num_seqs 64 x model length 512"
    found = decide(["a"], 512, 500, scheduler={"max_num_seqs": 3}, kv_cache={"block_size": 16})
    assert found.tokens == 3 * 512, "whole blocks for each"


@pytest.mark.parametrize(("ranks", "share"), [(1, 400), (4, 100)])
def test_auto_is_a_share_of_free_memory(free: int, ranks: int, share: int) -> None:
    found = decide(["a"] * ranks, 1024, 1 << 20)
    assert found.tokens == share * MIB // 1024 // 64 * 64
    among = f" / {ranks} ranks" if ranks > 1 else ""
    assert found.reason == f"auto: 40% of 1.0 GiB free{among}"


def test_ranks_of_other_hosts_do_not_share(free: int) -> None:
    assert decide(["a", "b", "b", "b"], 1024, 1 << 20).tokens == 400 * MIB // 1024


def test_auto_on_cuda_is_all_of_the_share(free: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank has a device of its own, and nothing else uses its memory."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (800 * MIB, 900 * MIB))
    found = decide(["a"] * 2, 1024, 512, torch.device("cuda", 0))
    assert found.tokens == 680 * MIB // 1024 // 64 * 64
    assert (found.lazy, found.reason) == (False, "auto: 85% of 0.8 GiB free")


def test_what_the_config_says(free: int) -> None:
    found = decide(["a"], 1024, 512, kv_cache={"tokens_per_rank": 1000})
    assert (found.tokens, found.lazy) == (960, False)
    found = decide(["a"], 1024, 512, kv_cache={"memory_per_rank": "1MiB"})
    assert (found.tokens, found.lazy) == (1024, False)
    with pytest.raises(ConfigError, match="room for 63 tokens .1024 bytes each., less than one"):
        decide(["a"], 1024, 512, kv_cache={"memory_per_rank": 1024 * 63 + 5})
    with pytest.raises(ConfigError, match=rf"asks for {260 * MIB} .* {250 * MIB} bytes .* 4 ranks"):
        decide(["a"] * 4, 1024, 512, kv_cache={"memory_per_rank": "260MiB"})


@pytest.mark.parametrize("lazy", [False, True])
def test_a_pool_that_does_not_fit_says_its_numbers(lazy: bool) -> None:
    """torch raises RuntimeError, the system ENOMEM; neither is a fault of ds_cp."""
    tokens = 1 << 44
    need = tokens * bytes_per_token([SPEC], torch.float32)
    with pytest.raises(ConfigError, match=f"asks for {need} bytes on cp rank 3") as caught:
        allocate_pool(
            KVBudget(tokens, "", lazy), [SPEC], 64, False, torch.float32, world_of(["a"]), 3
        )
    assert "\n" not in str(caught.value)


def test_other_errors_are_not_about_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("something else")

    monkeypatch.setattr(kv_budget, "KVPool", fail)
    with pytest.raises(RuntimeError, match="something else"):
        allocate_pool(KVBudget(64, "", False), [SPEC], 64, False, torch.float32, world_of(["a"]), 0)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_lazy_pool_claims_memory_as_it_is_written(dtype: torch.dtype, packed: bool) -> None:
    """512 MiB; none of it is resident before a write; unwritten slots read as zeros."""
    process = psutil.Process()
    blocks = 512 * MIB // bytes_per_token([SPEC] * 2, dtype) // 64
    before = process.memory_info().rss
    pool = KVPool([SPEC] * 2, blocks, 64, dtype, CPU, packed, lazy=True)
    assert pool.nbytes == 512 * MIB
    assert process.memory_info().rss - before < 8 * MIB
    some = torch.randn(100, 2, 16).to(dtype)
    at = torch.arange(100)
    where = torch.tensor([blocks - 1, blocks - 2])
    pool.layer(1).write(some, -some, where[at // 64], at % 64)
    assert process.memory_info().rss - before < 16 * MIB
    k, v = pool.layer(1).gather(where)
    assert torch.equal(k[:100], some) and torch.equal(v[:100], -some)
    assert not k[100:].any() and not v[100:].any()
    assert not any(x.any() for x in pool.layer(1).gather(torch.arange(20)))
    moved = KVPool([SPEC] * 2, 1, 64, dtype, CPU, packed)
    moved.put_blocks([0], pool.get_blocks([blocks - 1]))
    assert torch.equal(moved.layer(1).gather(torch.tensor([0]))[0], some[:64])
    assert not any(x.any() for x in moved.layer(0).gather(torch.tensor([0])))


@pytest.mark.parametrize("packed", [False, True])
def test_a_block_that_is_opened_holds_nothing_of_before(packed: bool) -> None:
    """Slots beyond the last key are read under a mask, which does not hide NaN from a product."""
    pool = KVPool([SPEC] * 3, 4, 8, torch.bfloat16, CPU, packed)
    content = torch.full((4, pool.block_elements), float("nan"), dtype=torch.bfloat16)
    pool.put_blocks(range(4), content)
    pool.open(torch.tensor([2, 0]))
    pool.open(torch.tensor([], dtype=torch.int64))
    held = pool.get_blocks(range(4))
    assert not held[[0, 2]].any() and bool(held[[1, 3]].isnan().all())


def test_kv_that_the_job_counts_on_needs_nothing_free(free: int) -> None:
    """A new worker has what the one before it had, which may hold it still, and claims it late."""
    world = world_of(["a"])
    grid = resolve_grid(world.topology, "auto", 1)
    config = load_config({"kv_cache": {"tokens_per_rank": 4096}}, {"model": "m"})
    with pytest.raises(ConfigError, match="bytes are free"):
        decide_budget(config, world, grid, 0, MIB, 4096)
    found = decide_budget(config, world, grid, 0, MIB, 4096, promised=True)
    assert (found.tokens, found.lazy) == (4096, True)
