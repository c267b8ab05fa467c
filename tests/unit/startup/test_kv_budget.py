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
        allocate_pool(KVBudget(tokens, "", lazy), [SPEC], torch.float32, world_of(["a"]), 3)
    assert "\n" not in str(caught.value)


def test_other_errors_are_not_about_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("something else")

    monkeypatch.setattr(kv_budget, "KVPool", fail)
    with pytest.raises(RuntimeError, match="something else"):
        allocate_pool(KVBudget(64, "", False), [SPEC], torch.float32, world_of(["a"]), 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_lazy_pool_claims_memory_as_it_is_written(dtype: torch.dtype) -> None:
    """512 MiB; none of it is resident before a write; unwritten slots read as zeros."""
    process = psutil.Process()
    tokens = 512 * MIB // bytes_per_token([SPEC] * 2, dtype)
    before = process.memory_info().rss
    pool = KVPool([SPEC] * 2, tokens, dtype, CPU, lazy=True)
    assert pool.nbytes == 512 * MIB
    assert process.memory_info().rss - before < 8 * MIB
    some = torch.randn(2, 100, 16).to(dtype)
    slots = torch.arange(tokens - 100, tokens)
    pool.write(1, some, -some, slots)
    assert process.memory_info().rss - before < 16 * MIB
    (k, v) = pool.read(1, [(tokens - 100, 100)]).pieces[0]
    assert torch.equal(k.transpose(0, 1), some) and torch.equal(v.transpose(0, 1), -some)
    (k, v) = pool.read(1, [(0, 1000)]).pieces[0]
    assert not k.any() and not v.any()
    moved = KVPool([SPEC] * 2, 64, dtype, CPU)
    moved.put_blocks([0], 64, pool.get_blocks([tokens // 64 - 1], 64))
    assert torch.equal(moved.of_layer(1), pool.of_layer(1)[:, :, tokens - 64 :])
