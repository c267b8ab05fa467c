"""A failure on one rank ends the step on all ranks, within seconds and with its cause; one row
that cannot be drawn or scored ends its request alone."""

from __future__ import annotations

import time

import pytest
import torch

from ds_cp.comm.failure import failing
from ds_cp.comm.wire import World
from ds_cp.errors import EngineDeadError, RankFailedError
from ds_cp.sampling_params import SamplingParams
from ds_cp.topology.hosts import Topology
from ds_cp.worker.step_context import StepContext
from tests.helpers.engines import engine_on, tiny_llama
from tests.helpers.ranks import run_ranks

HOSTS = ("north", "south", "east")
CAUSE = "RuntimeError: out of memory (pretended)"
COMM_TIMEOUT_S = 60.0
AT_ONCE_S = 30.0
GREEDY = SamplingParams(max_tokens=4, temperature=0.0)


def test_nothing_runs_after_a_failure() -> None:
    """The plan after the one that failed may be queued already."""
    world = World(0, Topology.from_hosts(["here"]), torch.device("cpu"), 5.0, joined=False)
    ran = []
    with pytest.raises(RankFailedError, match="rank 0 on here: RuntimeError: made up"):
        with failing(world):
            raise RuntimeError("made up")
    with pytest.raises(RankFailedError, match="rank 0 on here: RuntimeError: made up"):
        with failing(world):
            ran.append(True)
    assert not ran


def test_ctrl_c_stays_what_it_is() -> None:
    world = World(0, Topology.from_hosts(["here"]), torch.device("cpu"), 5.0, joined=False)
    with pytest.raises(KeyboardInterrupt):
        with failing(world), failing(world):
            raise KeyboardInterrupt
    assert world.failure is not None


def failing_layer(world: World, mode: str, failing: int) -> tuple[float, str, str]:
    """Seconds until this rank raised, and what. Rank ``failing`` raises in the second layer."""
    kv = {"tokens_per_rank": 64, "block_size": 16}
    engine = engine_on(world, tiny_llama(), {"kv_cache": kv, "context_parallel": {"mode": mode}})
    whole = StepContext.attend

    def attend(self: StepContext, layer: int, *qkv: torch.Tensor) -> torch.Tensor:
        if layer == 1 and world.rank == failing:
            raise RuntimeError("out of memory (pretended)")
        return whole(self, layer, *qkv)

    StepContext.attend = attend  # type: ignore[method-assign]
    # Under mode local each of the prompts fills half a rank, so that every rank gets some.
    prompts = [[1 + i] * 30 for i in range(2 * world.size)] if mode == "local" else [[1] * 90]
    began = time.monotonic()
    try:
        engine.generate(prompts, GREEDY)
    except Exception as err:
        seconds = time.monotonic() - began
        with pytest.raises(EngineDeadError, match="earlier call failed"):
            engine.generate(prompts, GREEDY)
        engine.shutdown()
        return seconds, type(err).__name__, str(err)
    return 0.0, "", "nothing was raised"


@pytest.mark.parametrize(
    ("size", "mode", "failing"),
    [
        (2, "tree", 0), (2, "tree", 1), (2, "ring", 0), (2, "local", 0), (2, "local", 1),
        (3, "ring", 1), (3, "tree", 2), (3, "local", 2),
    ],
)  # fmt: skip
def test_every_rank_gets_the_cause_at_once(size: int, mode: str, failing: int) -> None:
    found = run_ranks(
        failing_layer, size, mode, failing, hosts=HOSTS[:size], comm_timeout=COMM_TIMEOUT_S
    )
    for seconds, kind, message in found:
        assert kind == RankFailedError.__name__
        assert message == f"rank {failing} on {HOSTS[failing]}: {CAUSE}"
        assert seconds < AT_ONCE_S
