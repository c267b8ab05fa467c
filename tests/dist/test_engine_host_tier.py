"""Blocks that go to host memory and come back: the tokens of a model are the same with them as
without, and as transformers' own."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest

from ds_cp.comm.wire import World
from ds_cp.engine.core import EngineCore
from ds_cp.engine.llm import LLMEngine
from ds_cp.kv.host_store import FileStore
from ds_cp.kv.prefix import PrefixKeys
from ds_cp.layout import on_host
from ds_cp.plan import StepPlan
from ds_cp.scheduler.build import build_scheduler
from tests.dist.test_engine import Ids, greedy, hf_greedy, make_prompt, tokens_of
from tests.helpers.engines import engine_on, tiny_llama
from tests.helpers.ranks import run_ranks

SIZE, TOKENS = 4, 64  # of a block; of a rank's pool
# Beginnings that take turns, each longer than what the others leave of it; the last spans ranks.
ROUNDS = [[(1, 40), (2, 44)], [(3, 50), (4, 38)], [(1, 41), (2, 44)], [(5, 90)], [(3, 52), (1, 40)],
          [(5, 91)], [(4, 38), (2, 47), (3, 50)], [(5, 90)]]  # fmt: skip
CROWD = [(n, 14 + 3 * n) for n in range(1, 9)]  # at once: some are preempted
NEW = 14


def config(**kv: Any) -> dict[str, Any]:
    return {
        "kv_cache": {"block_size": SIZE, "tokens_per_rank": TOKENS, **kv},
        "scheduler": {"max_num_seqs": 6, "max_num_batched_tokens": 24},
    }


def always_back(engine: LLMEngine) -> None:
    """Have blocks come back whatever it costs: so small a model is computed as quickly."""
    if engine.is_driver:
        facts = dataclasses.replace(engine.facts, host_gb_per_s=0.0)
        engine._core = EngineCore(build_scheduler(engine._config, facts, paced=False), None)


def answers(world: World, kv: dict[str, Any]) -> tuple[list[Ids], dict[str, int]]:
    """Every answer in order, and on rank 0 what was counted."""
    engine = engine_on(world, tiny_llama(initializer_range=0.2), config(**kv))
    always_back(engine)
    found: list[Ids] = []
    for each in [*ROUNDS, CROWD, ROUNDS[2]]:
        prompts = [make_prompt(100, seed=first)[:n] for first, n in each]
        found += tokens_of(engine.generate(prompts, greedy(NEW)))
    counts = {}
    if engine._core is not None:
        engine._core.check_integrity()
        scheduler = engine._core.scheduler
        host = scheduler.block_manager.host
        counts = {
            "spilled": host.tier.spilled, "restored": host.restored, "hits": host.hits,
            "preempted": scheduler.num_preemptions, "cached": scheduler.block_manager.hits,
            "slots": sum(engine.facts.host_blocks_per_rank),
        }  # fmt: skip
        if kv:
            assert any("host memory" in line for line in engine.summary())
    engine._worker.mover.close()
    return found, counts


def on_the_host(engine: LLMEngine, prompt: Ids) -> bool:
    """On rank 0: whether some of the prompt's beginning would come back from a host slot."""
    assert engine._core is not None
    blocks = engine._core.scheduler.block_manager
    names = PrefixKeys(SIZE, "").upto(prompt, (len(prompt) - 1) // SIZE)
    for name in names:
        if blocks.allocator.find(name) is None:
            place = blocks.host.tier.find(name)
            return place is not None and on_host(blocks.host.tier.source(place))
    return False


def lose_the_disk(world: World, folder: str) -> None:
    """Files that lost what they held: who wants it ends with an error, whoever asks next has it
    computed, and they are not used again."""
    kv = {"host_memory_per_rank": "256KiB", "host_folder": folder}
    engine = engine_on(world, tiny_llama(initializer_range=0.2), config(**kv))
    always_back(engine)
    prompts = [make_prompt(100, seed=first)[:52] for first in range(1, 3 + 2 * world.size)]
    want = [tokens_of(engine.generate([prompt], greedy(4))) for prompt in prompts]
    store = engine._worker.mover.store
    assert isinstance(store, FileStore)
    os.ftruncate(store._fd, 0)
    ends = []
    for prompt, tokens in zip(prompts, want, strict=True):
        wants_it = world.rank == 0 and on_the_host(engine, prompt)
        found = engine.generate([prompt], greedy(4))
        again = tokens_of(engine.generate([prompt], greedy(4)))
        assert again == tokens
        for output in found:
            ends.append(output.outputs[0].finish_reason)
            assert (ends[-1] == "error") == wants_it
            assert not wants_it or output.metrics.cached_tokens > 0
    if world.rank == 0:
        assert engine._core is not None
        stats = engine._core.stats()
        assert ends.count("error") == world.size, "each file fails once"
        assert min(stats.host_blocks_failed) > 0 and stats.host_blocks_total == (0,) * world.size
        engine._core.check_integrity()
    engine._worker.mover.close()


def compare(world: World, folder: str) -> None:
    model = tiny_llama(initializer_range=0.2)
    plain, without = answers(world, {})
    ways: list[dict[str, Any]] = [{"host_memory_per_rank": "256KiB"}]
    if world.device.type == "cpu":
        ways.append({"host_memory_per_rank": ["64KiB", 0], "host_folder": folder})
    for kv in ways:
        tokens, counts = answers(world, kv)
        assert tokens == plain
        if world.rank == 0:
            assert counts["spilled"] > 20 and counts["restored"] > 20 and counts["hits"] > 50
            assert counts["preempted"] and counts["cached"] > without["cached"]
    assert not list(Path(folder).iterdir()), "its files have no name"
    if world.rank == 0:
        assert without["slots"] == without["spilled"] == 0
        asked = [make_prompt(100, seed=first)[:n] for each in ROUNDS for first, n in each]
        want = [hf_greedy(model, prompt, NEW) for prompt in asked]
        assert plain[: len(want)] == want


def test_tokens_are_the_same_with_host_memory_as_without(tmp_path: Path) -> None:
    run_ranks(compare, 2, str(tmp_path))


def preempt(world: World) -> None:
    """Two requests that outgrow a rank: the younger one makes room, and goes on with what the host
    has of it."""
    prompts = [make_prompt(24, seed=n) for n in (1, 2)]
    engine = engine_on(
        world, tiny_llama(initializer_range=0.2), config(host_memory_per_rank="256KiB")
    )
    always_back(engine)
    core = engine._core
    assert core is not None
    plans: list[StepPlan] = []
    schedule = core.plan

    def plan() -> StepPlan | None:
        made = schedule()
        plans.extend([made] if made is not None else [])
        return made

    core.plan = plan  # type: ignore[method-assign]
    found = engine.generate(prompts, greedy(24))
    [young] = [output for output in found if output.metrics.num_preemptions]
    begins = [begin for made in plans for begin in made.begins if begin.request == 2]
    restored = {t.target for made in plans for t in made.transfers if t.requests == (2,)}
    assert young is found[1] and len(begins) == 2 and begins[1].computed > 24
    assert len(restored) * SIZE <= begins[1].computed, "the rest was on the device yet"
    computed = sum(
        n for made in plans for chunk in made.chunks if chunk.request == 2
        for _, runs in chunk.owners for _, n in runs
    )  # fmt: skip
    assert restored and computed - 24 <= SIZE + 2, "its last block, and what was in flight"
    alone = tiny_llama(initializer_range=0.2)
    assert tokens_of(found) == [hf_greedy(alone, prompt, 24) for prompt in prompts]
    core.check_integrity()
    engine._worker.mover.close()


def test_a_preempted_request_comes_back_from_the_host() -> None:
    run_ranks(preempt, 1)


@pytest.mark.cpu_only("a file, which ranks on CPU have")
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_disk_that_fails_costs_the_requests_that_want_it(ranks: int, tmp_path: Path) -> None:
    run_ranks(lose_the_disk, ranks, str(tmp_path))
