"""Rank 0's link to a worker process that is interrupted, and to the next one."""

from __future__ import annotations

import socket

import pytest

from ds_cp.errors import EngineDeadError
from ds_cp.plan import Idle, Outcome, StepPlan, Stop, decode_plan
from ds_cp.serve.channel import Channel, Failed, Interrupted, Ready, Result, Resumed
from ds_cp.serve.worker_link import (
    InterruptedStepsError,
    ProcessLink,
    WorkerFailedError,
    WorkerLostError,
)
from tests.unit.serve.test_async_engine import FACTS


def pair() -> tuple[Channel, Channel]:
    ours, theirs = socket.socketpair()
    return Channel(ours), Channel(theirs)


def ready(outlives: bool = True) -> tuple[ProcessLink, Channel]:
    ours, worker = pair()
    link = ProcessLink(ours, outlives)
    worker.send(Ready(FACTS, ()))
    link.ready()
    return link, worker


def test_plans_carry_the_generation() -> None:
    link, worker = ready()
    link.submit(StepPlan(1))
    raw, generation = worker.receive_plan()
    assert (decode_plan(raw), generation) == (StepPlan(1), 0)
    worker.send(Result(Outcome(1), {"tree_q": (5, 1)}))
    assert link.outcome().step == 1 and link.sent == {"tree_q": (5, 1)} and link.steps_done == 1
    link.submit(StepPlan(2))
    worker.send(Interrupted(0, "a peer is gone"))
    with pytest.raises(InterruptedStepsError, match="a peer is gone"):
        link.outcome()
    worker.send(Resumed(3, (0, 3)))
    assert link.resume() == Resumed(3, (0, 3))
    link.submit(Idle())
    assert [worker.receive_plan()[1] for _ in range(2)] == [0, 3]
    link.leave()
    assert worker.receive_plan()[1] == 3


def test_results_before_an_interruption_count() -> None:
    link, worker = ready()
    link.submit(StepPlan(1))
    link.submit(StepPlan(2))
    worker.send(Result(Outcome(1), {}))
    worker.send(Interrupted(0, ""))
    assert link.outcome().step == 1
    with pytest.raises(InterruptedStepsError):
        link.outcome()


def test_interrupted_again_before_it_was_noticed() -> None:
    link, worker = ready()
    link.submit(StepPlan(1))
    for message in (Interrupted(0, ""), Resumed(1, (0, 1)), Interrupted(1, "again")):
        worker.send(message)
    with pytest.raises(InterruptedStepsError):
        link.outcome()
    assert link.resume().generation == 1
    link.submit(StepPlan(1))
    with pytest.raises(InterruptedStepsError, match="again"):
        link.outcome()
    worker.send(Resumed(2, (2, 1)))
    assert link.resume() == Resumed(2, (2, 1))


@pytest.mark.parametrize("at_once", [True, False])
def test_the_next_worker_takes_over(at_once: bool) -> None:
    """Where the first one ends without a word; the second ends before it has met anyone."""
    link, worker = ready()
    if not at_once:
        link.submit(StepPlan(1))
    worker.sock.close()
    with pytest.raises(InterruptedStepsError):
        link.outcome()
    for generation in (None, 2):
        ours, other = pair()
        link.replace(ours)
        if generation is None:
            other.sock.close()
        else:
            other.send(Resumed(generation, (2, 0)))
    assert link.resume().generation == 2
    link.submit(Stop())
    assert other.receive_plan()[1] == 2


def test_a_new_worker_that_cannot_load_says_why() -> None:
    link, worker = ready()
    worker.sock.close()
    with pytest.raises(InterruptedStepsError):
        link.submit(StepPlan(1))
        link.outcome()
    ours, other = pair()
    link.replace(ours)
    other.send(Failed(2, "the model is gone"))
    with pytest.raises(WorkerFailedError, match="the model is gone"):
        link.resume()


@pytest.mark.parametrize("outlives", [True, False])
def test_before_it_is_ready_a_death_is_the_end(outlives: bool) -> None:
    ours, worker = pair()
    link = ProcessLink(ours, outlives)
    worker.sock.close()
    with pytest.raises(WorkerLostError):
        link.ready()
    if not outlives:
        link, worker = ready(outlives)
        worker.sock.close()
        with pytest.raises(EngineDeadError) as found:
            link.outcome()
        assert isinstance(found.value, WorkerLostError)
