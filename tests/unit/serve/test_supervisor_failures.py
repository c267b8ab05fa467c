"""When a failure counts, what it is called, and whom another rank tells."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest

from ds_cp.config import load_config
from ds_cp.errors import EngineDeadError
from ds_cp.serve import supervisor as supervisor_module
from ds_cp.serve.channel import Failed, Ready
from ds_cp.serve.job_words import Gone, Lost
from ds_cp.serve.supervisor import _Supervisor
from ds_cp.serve.worker_child import Child, until_end
from ds_cp.topology.job import Job

NO_CHANNEL: Any = None
JOB = Job(0, 2, 0, 2, None, "here", "torchrun", "127.0.0.1", 0)


def supervisor(rank: int = 0, launcher: str = "torchrun") -> Any:
    job = replace(JOB, rank=rank, local_rank=rank, launcher=launcher)
    return _Supervisor(load_config({"model": "none"}), job)


@pytest.mark.parametrize("state", ["loading", "serving", "draining", "hurried", "leaving"])
@pytest.mark.parametrize("what", ["lost", "gone", "death"])
def test_what_fails_the_job(state: str, what: str, capsys: pytest.CaptureFixture[str]) -> None:
    """All that ends by no wish of anyone while requests may run, once."""
    one = supervisor()

    async def work() -> None:
        one._loaded = state != "loading"
        if state != "serving":
            one._begin_stop("SIGTERM", state == "hurried")
        one._leaving = state == "leaving"
        capsys.readouterr()
        for _ in range(2):
            if what == "lost":
                one._on_lost(1, Lost("it", 3))
            elif what == "gone":
                one._on_gone(1, Gone(17))
            else:
                one._on_death("it", 3, True, False)

    asyncio.run(work())
    said = capsys.readouterr().err
    if state in ("serving", "draining"):
        cause = "the supervisor of rank 1 (process 17) was killed" if what == "gone" else "it"
        drain = ", during the drain" if state == "draining" else ""
        assert said == f"ds_cp: error: {cause}{drain}\n"
        assert one._exit_code == (1 if what == "gone" else 3) and one._stop.is_set()
    else:
        assert (said, one._exit_code) == ("", 0)


def test_a_killed_supervisor_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    """By ds-cp, where that is the launcher and was not asked to end."""

    async def work(stops: bool) -> str:
        one = supervisor(launcher="ds-cp")
        one._loaded = True
        if stops:
            one._begin_stop("SIGTERM", False)
        capsys.readouterr()
        one._on_gone(1, Gone(17))
        assert one._exit_code == 1
        return capsys.readouterr().err

    assert asyncio.run(work(False)) == ""
    assert "was killed, during the drain" in asyncio.run(work(True))


@pytest.mark.parametrize("reports", [True, False])
def test_a_worker_that_left_is_asked_why(
    reports: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its report may be read after its end is seen: rank 0's engine loads the tokenizer first."""
    monkeypatch.setattr(supervisor_module, "FIRST_WORD_S", 20.0 if reports else 0.1)

    async def work() -> int:
        one = supervisor()
        process = subprocess.Popen([sys.executable, "-c", "raise SystemExit(2)"])
        process.wait()
        if reports:
            asyncio.get_running_loop().call_later(0.3, one._on_death, "it", 2, True, False)
        one._seat._child = Child(process, NO_CHANNEL, None)
        await one._watch()
        return int(one._exit_code)

    code, said = asyncio.run(work()), capsys.readouterr().err
    if reports:
        assert (code, said) == (2, "ds_cp: error: it\n")
    else:
        assert code == 1 and "rank 0 was ended by exit code 2" in said


class Link:
    """To rank 0, as another rank uses it."""

    def __init__(self) -> None:
        self.told: list[Lost] = []

    async def report(self, lost: Lost) -> bool:
        self.told.append(lost)
        return True

    async def until_end(self, seconds: float) -> None:
        pass


class Worker:
    """A channel with a worker's messages in it."""

    def __init__(self, *messages: Any) -> None:
        self._messages = list(messages)

    def receive(self, _: object) -> Any:
        if not self._messages:
            raise EngineDeadError("it has ended")
        return self._messages.pop(0)


NO_FACTS: Any = None
READY = Ready(NO_FACTS, ())


@pytest.mark.parametrize(
    ("messages", "told"),
    [
        ((READY, Failed(3, "bad", True)), [Lost("rank 1 on here: bad", 3)]),
        ((READY, Failed(3, "rank 1 on there: bad", True)), [Lost("rank 1 on there: bad", 3)]),
        ((READY, Failed(3, "a peer is lost", False)), []),
        ((Failed(3, "bad", True),), []),  # agreed on while they load: rank 0 says it
    ],
)
def test_a_known_cause_of_another_rank_is_told_to_rank_0(
    messages: tuple[Any, ...], told: list[Lost]
) -> None:
    one, link = supervisor(1), Link()
    one._following = link
    asyncio.run(one._follow(Worker(*messages)))
    assert link.told == told and one._exit_code == 3


@pytest.mark.parametrize("known", [False, True])
def test_another_rank_in_a_drain_fails_by_a_known_cause_alone(known: bool) -> None:
    one, link = supervisor(1), Link()
    one._loaded = True
    one._following = link
    one._stop.set()
    asyncio.run(one._follow(Worker(READY, Failed(3, "rank 1: bad", known))))
    assert link.told == [Lost("rank 1: bad", 3)] * known and one._exit_code == 3 * known


def test_a_worker_that_gets_on_has_more_than_its_time() -> None:
    """As long as it does, or until it ends."""

    async def work(looks: int, ends_at: int) -> tuple[int, bool]:
        asked = 0
        over = asyncio.Event()

        def works() -> bool:
            nonlocal asked
            asked += 1
            if asked == ends_at:
                over.set()
            return asked < looks

        watch = asyncio.create_task(over.wait())
        await until_end(watch, 0.01, works)  # type: ignore[arg-type]
        ended = watch.done()
        watch.cancel()
        return asked, ended

    assert asyncio.run(work(5, 0)) == (5, False)
    assert asyncio.run(work(10, 3)) == (3, True)
