"""A worker of rank 0 that serves, leaves, waits and meets again; played without torch."""

from __future__ import annotations

import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from ds_cp.errors import CommError, ModelError, RankFailedError
from ds_cp.plan import Idle, Outcome, Plan, StepPlan, Stop, decode_plan
from ds_cp.serve import worker_life
from ds_cp.serve.channel import Channel, FromWorker, Interrupted, Result, Resumed
from ds_cp.serve.orders import Leave, Left, Loaded, Meet, Met, Orders, Word
from ds_cp.serve.worker_life import WorkerLife
from ds_cp.topology.job import Job

JOB = Job(0, 2, 0, 2, None, "here", "torchrun", "127.0.0.1", 0)
NOTHING: Any = None
BREAKS = 13  # a step in which a peer is lost
BEYOND = 43  # a step after which nothing can be told to anybody
FAILS, FAILS_ELSEWHERE = 23, 33  # steps in which something is raised, here or on another rank


class World:
    has_left = True
    device = SimpleNamespace(type="cpu")

    def __init__(self, born: tuple[int, ...] = (0, 0)) -> None:
        self.born = born
        self.ledger = self
        self.abandoned = threading.Event()

    def abandon(self) -> None:
        self.abandoned.set()

    def close_listeners(self, keep: int | None) -> None:
        assert keep is None

    def schemes(self) -> dict[str, Any]:
        return {}


class Worker:
    def __init__(self) -> None:
        self.world = World()
        self.ran: list[Plan] = []

    @contextmanager
    def failing(self) -> Iterator[None]:
        yield

    def forward(self, payload: bytes) -> Outcome | None:
        plan = decode_plan(payload)
        self.ran.append(plan)
        if isinstance(plan, Stop):
            return None
        if isinstance(plan, StepPlan) and plan.step == BREAKS:
            raise CommError("a peer is gone")
        if isinstance(plan, StepPlan) and plan.step == FAILS:
            try:
                raise IndexError("index 7 of 3")
            except IndexError as err:
                raise RankFailedError("rank 0 on here: IndexError: index 7 of 3") from err
        if isinstance(plan, StepPlan) and plan.step == BEYOND:
            raise RuntimeError("can't start new thread")
        if isinstance(plan, StepPlan) and plan.step == FAILS_ELSEWHERE:
            raise RankFailedError("rank 1 on there: it") from CommError("a peer is gone")
        return Outcome(plan.step if isinstance(plan, StepPlan) else 0)


class Played:
    """The worker's process, and the other ends of its two sockets."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, starts: bool = True) -> None:
        self.meetings: list[tuple[int, int]] = []  # (generation, born) of each that was tried
        self.fails: dict[int, Exception] = {}  # meetings that do not come about
        module = ModuleType("ds_cp.startup.meet")
        module.meet_again = self._meet  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "ds_cp.startup.meet", module)
        plans, its_plans = socket.socketpair()
        orders, its_orders = socket.socketpair()
        self.engine, self.supervisor = Channel(plans), Channel(orders)
        self.worker = Worker()
        ear = Orders(its_orders)
        self.life = WorkerLife(Channel(its_plans), ear, JOB, NOTHING, NOTHING, self.worker)  # type: ignore[arg-type]
        self.error: BaseException | None = None
        if starts:
            self.life.begin()
        else:
            ear.tell(Loaded())
        self.thread = threading.Thread(target=self._run, args=(starts,), daemon=True)
        self.thread.start()

    def _run(self, starts: bool) -> None:
        try:
            if not starts:
                self.life.meet()
            self.life.run()
        except BaseException as err:
            self.error = err

    def _meet(
        self, job: Any, config: Any, worker: Worker, facts: Any, generation: int, born: int,
        given_up: Any, away: Any,
    ) -> None:  # fmt: skip
        self.meetings.append((generation, born))
        if generation in self.fails:
            raise self.fails[generation]
        worker.world = World((born, 0))

    def said(self) -> Any:
        return self.supervisor.receive(Word)

    def result(self) -> Any:
        self.engine.sock.settimeout(60)
        return self.engine.receive(FromWorker)

    def end(self) -> list[Plan]:
        self.thread.join(60)
        assert not self.thread.is_alive()
        return self.worker.ran


def test_a_lost_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans that were made before the meeting are not run after it."""
    one = Played(monkeypatch)
    for step in (12, BREAKS, 14, 15):
        one.engine.send_plan(StepPlan(step), 0)
    assert one.result() == Result(Outcome(12), {})
    assert one.result() == Interrupted(0, "a peer is gone")
    assert one.said() == Left(0, "a peer is gone")
    one.supervisor.send(Leave(0))  # it is late
    one.supervisor.send(Meet(1))
    assert one.said() == Met(1) and one.result() == Resumed(1, (0, 0))
    one.engine.send_plan(StepPlan(16), 1)
    one.engine.send_plan(Stop(), 1)
    assert one.result() == Result(Outcome(16), {})
    ran = one.end()
    assert ran == [StepPlan(12), StepPlan(BREAKS), StepPlan(16), Stop()] and one.error is None


def test_told_while_it_waits_for_a_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    one = Played(monkeypatch)
    one.engine.send_plan(Idle(), 0)
    assert one.result() == Result(Outcome(), {})
    world = one.worker.world
    one.supervisor.send(Leave(0))
    left = one.said()
    assert isinstance(left, Left) and world.abandoned.is_set()
    one.supervisor.send(Meet(1))
    assert one.said() == Met(1) and one.meetings == [(1, 0)]
    one.engine.send_plan(Stop(), 1)
    one.end()
    assert isinstance(one.result(), Interrupted) and isinstance(one.result(), Resumed)


def test_meetings_that_do_not_come_about(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new worker is born in the one that does."""
    one = Played(monkeypatch, starts=False)
    one.fails = {3: CommError("ranks [1] did not come")}
    assert one.said() == Loaded()
    one.supervisor.send(Meet(3))
    assert one.said() == Left(3, "ranks [1] did not come")
    one.supervisor.send(Meet(4))
    assert one.said() == Met(4) and one.result() == Resumed(4, (4, 0))
    assert one.meetings == [(3, 3), (4, 4)]
    one.engine.send_plan(StepPlan(BREAKS), 4)
    assert isinstance(one.result(), Interrupted) and isinstance(one.said(), Left)
    one.fails = {5: RankFailedError("rank 1 on there: MemoryError: no room")}
    one.supervisor.send(Meet(5))
    assert one.said() == Left(5, "rank 1 on there: MemoryError: no room", known=True)
    one.supervisor.send(Meet(6))
    assert one.said() == Met(6) and one.result() == Resumed(6, (4, 0))


def test_a_meeting_that_was_given_up_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    one = Played(monkeypatch, starts=False)
    assert one.said() == Loaded()
    one.supervisor.send(Leave(1))
    one.supervisor.send(Meet(1))
    assert one.said() == Left(1, "a rank is gone again") and one.meetings == []


def test_a_worker_that_cannot_even_leave_is_replaced(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The system gives it no thread to leave by: it ends as if it were killed."""

    class Ended(BaseException):
        pass

    def end() -> None:
        raise Ended

    monkeypatch.setattr(worker_life, "end_at_once", end)
    one = Played(monkeypatch)
    one.engine.send_plan(StepPlan(BEYOND), 0)
    assert one.end() == [StepPlan(BEYOND)] and isinstance(one.error, Ended)
    assert "RuntimeError: can't start new thread" in capsys.readouterr().err


def test_what_is_wrong_with_the_job_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    one = Played(monkeypatch, starts=False)
    one.fails = {1: ModelError("rank 1 loaded another model")}
    assert one.said() == Loaded()
    one.supervisor.send(Meet(1))
    one.end()
    assert isinstance(one.error, ModelError)


@pytest.mark.parametrize(
    ("step", "cause"),
    [(FAILS, "rank 0 on here: IndexError: index 7 of 3"), (FAILS_ELSEWHERE, "rank 1 on there: it")],
)
def test_a_step_that_fails_on_one_rank(
    step: int, cause: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The cause is told, the traceback is where it was raised, and the process goes on."""
    one = Played(monkeypatch)
    one.engine.send_plan(StepPlan(step), 0)
    assert one.result() == Interrupted(0, cause)
    assert one.said() == Left(0, cause, known=True)
    one.supervisor.send(Meet(1))
    assert one.said() == Met(1)
    one.engine.send_plan(Stop(), 1)
    one.end()
    assert one.error is None
    assert ("IndexError: index 7 of 3" in capsys.readouterr().err) == (step == FAILS)
