"""Which worker takes a place: the first, the one that waits, or another one."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest

from ds_cp.config import load_config
from ds_cp.errors import EngineDeadError, ModelError
from ds_cp.facts import Facts
from ds_cp.serve import seat as seat_module
from ds_cp.serve.channel import Channel
from ds_cp.serve.forking import Forks
from ds_cp.serve.orders import Loaded, Order, Ping, Pong, Word
from ds_cp.serve.seat import Seat
from ds_cp.topology.job import Job
from tests.unit.serve.test_async_engine import FACTS

JOB = Job(1, 2, 1, 2, None, "here", "torchrun", "127.0.0.1", 0)


class Child:
    """A worker process that is played; ``log``: what was done to which one."""

    def __init__(self, number: int, waits: bool, log: list[str]) -> None:
        self.number, self.waits, self.log = number, waits, log
        self.process = self
        self.channel = Channel(socket.socketpair()[0])
        ours, theirs = socket.socketpair()
        self.orders, self.its_orders = Channel(ours), Channel(theirs)
        self.dead = False
        self.returncode = -9

    def take(self, facts: Facts) -> None:
        assert self.waits
        self.log.append(f"take {self.number}")

    def poll(self) -> int | None:
        return -9 if self.dead else None

    def kill(self) -> None:
        self.dead = True


class Server:
    """A fork server that is played."""

    def __init__(self, played: Played, on_end: Callable[[], None]) -> None:
        self.on_end = on_end
        self.is_open, self.is_serving, self.gives = True, True, True
        self.facts: Facts | None = None
        played.servers.append(self)
        played.log.append("server")

    def settle(self, facts: Facts) -> None:
        self.facts = facts

    def close(self) -> None:
        self.is_open = self.is_serving = False

    def end(self) -> None:
        self.close()
        self.on_end()


class Played:
    """A seat in which workers are played, in the order in which they were started."""

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        facts: Facts = FACTS,
        serves: bool = False,
        **tolerance: Any,
    ) -> None:
        self.log: list[str] = []
        self.children: list[Child] = []
        self.facts = facts
        self.fails = False
        monkeypatch.setattr(seat_module, "worker_child", self._child)
        config = load_config({"model": "none", "fault_tolerance": tolerance})
        self.servers: list[Server] = []
        monkeypatch.setattr(seat_module, "can_fork_servers", lambda: serves)
        monkeypatch.setattr(seat_module, "Forks", partial(Server, self))
        monkeypatch.setattr(seat_module, "forked_child", self._forked)
        self.seat = Seat(config, JOB, True)

    @contextmanager
    def _child(
        self, config: Any, job: Job, outlives: bool, waits: bool, forks: Forks | None
    ) -> Iterator[Any]:
        if self.fails:
            raise ModelError("no space left")
        child = Child(len(self.children), waits, self.log)
        self.children.append(child)
        self.log.append(f"start {child.number}")
        yield child
        self.log.append(f"end {child.number}")

    @contextmanager
    def _forked(self, job: Job, forks: Server) -> Iterator[Any]:
        if not forks.gives:
            forks.is_open = forks.is_serving = False
            raise EngineDeadError("it has 3 threads")
        assert forks.facts == self.facts
        child = Child(len(self.children), True, self.log)
        self.children.append(child)
        self.log.append(f"fork {child.number}")
        yield child
        self.log.append(f"end {child.number}")

    def run(self, work: Callable[[Played], Awaitable[None]]) -> list[str]:
        async def main() -> None:
            with self.seat as seat:
                assert not seat.can_replace
                seat.loaded(self.facts)
                assert seat.can_replace
                await asyncio.wait_for(work(self), 60)

        asyncio.run(main())
        return self.log

    async def until(self, what: str) -> None:
        while what not in self.log:
            await asyncio.sleep(0.005)


def test_without_a_spare_one(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(one: Played) -> None:
        first = one.seat.channel
        await one.seat.replace()
        assert one.seat.channel is not first and one.seat.process is one.children[1]

    log = Played(monkeypatch, spare_after_s=None).run(work)
    assert log == ["start 0", "end 0", "start 1", "take 1", "end 1"]


@pytest.mark.parametrize(
    ("model", "device", "early"),
    [(False, "cpu", False), (True, "cpu", True), (True, "cuda", False)],
)
def test_the_spare_one_takes_the_place(
    model: bool, device: str, early: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may load the model before it is needed, but not on a GPU, whose memory is in use."""

    async def work(one: Played) -> None:
        await one.until("start 1")
        assert ("take 1" in one.log) == early
        await one.seat.replace()
        assert one.seat.process is one.children[1] and one.log.count("take 1") == 1
        await one.until("start 2")  # the next one to wait

    facts = replace(FACTS, device=device)
    one = Played(monkeypatch, facts, spare_after_s=0, spare_model=model)
    log = one.run(work)
    assert log[-2:] == ["end 2", "end 1"] and one.children[2].dead


def test_a_spare_one_that_has_died(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(one: Played) -> None:
        await one.until("start 1")
        one.children[1].dead = True
        await one.seat.replace()
        assert one.seat.process is one.children[2]

    log = Played(monkeypatch, spare_after_s=0).run(work)
    assert log[:6] == ["start 0", "start 1", "end 0", "end 1", "start 2", "take 2"]


def test_none_can_be_started_to_wait(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def work(one: Played) -> None:
        one.fails = True
        said = ""
        while "no worker waits" not in said:
            await asyncio.sleep(0.005)
            said += capsys.readouterr().err
        assert (
            said == "ds_cp: warning: no worker waits to take another one's place: no space left\n"
        )
        with pytest.raises(ModelError):
            await one.seat.replace()

    Played(monkeypatch, spare_after_s=0).run(work)


def test_workers_are_forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as there is a server; else a new process is started, which has one of its own."""

    async def work(one: Played) -> None:
        await one.seat.replace()
        await one.seat.replace()
        assert one.seat.process is one.children[2]
        one.servers[0].gives = False
        await one.seat.replace()
        assert one.servers[1].facts == one.facts
        await one.seat.replace()

    log = Played(monkeypatch, serves=True, spare_after_s=None).run(work)
    assert log == ["server", "start 0", "end 0", "fork 1", "end 1", "fork 2", "end 2", "server",
                   "start 3", "take 3", "end 3", "fork 4", "end 4"]  # fmt: skip


def test_one_waits_once_there_is_no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(one: Played) -> None:
        await one.seat.replace()
        assert "fork 1" in one.log and len(one.children) == 2
        one.servers[0].end()
        await one.until("start 2")
        await one.seat.replace()
        assert one.seat.process is one.children[2] and "take 2" in one.log

    Played(monkeypatch, serves=True, spare_after_s=0).run(work)


def test_words_of_the_dead_are_not_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[Word] = []

    async def work(one: Played) -> None:
        one.seat.on_word = heard.append
        one.children[0].its_orders.send(Loaded())
        while not heard:
            await asyncio.sleep(0.005)
        await one.seat.replace()
        one.children[0].its_orders.send(Loaded())
        one.children[1].its_orders.send(Loaded())
        while len(heard) < 2:
            await asyncio.sleep(0.005)
        await asyncio.sleep(0)
        assert len(heard) == 2

    Played(monkeypatch, spare_after_s=None).run(work)


def test_a_sign_of_life(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that answers lives; one that does not is ended, and the next one is asked anew."""
    monkeypatch.setattr(seat_module, "GAP_S", 60.0)  # a busy machine

    async def work(one: Played) -> None:
        while len(asked) < 6:
            one.seat.check(0.2)
            await asyncio.sleep(0.005)
            worker = one.children[-1]
            worker.its_orders.sock.setblocking(False)
            while True:
                try:
                    worker.its_orders.sock.recv(1, socket.MSG_PEEK)
                except BlockingIOError:
                    break
                worker.its_orders.sock.setblocking(True)
                asked.append(worker.its_orders.receive(Order))
                worker.its_orders.sock.setblocking(False)
                worker.its_orders.send(Pong())
        assert not one.children[0].dead
        while not one.children[0].dead:
            one.seat.check(0.2)
            await asyncio.sleep(0.005)
        assert one.seat.cause(one.seat.process) == (
            "the worker of rank 1 gave no sign of life for 0.2 s and was ended"
        )
        await one.seat.replace()
        now = time.monotonic()
        while time.monotonic() < now + 0.5:  # it loads, and hears nobody yet
            one.seat.check(0.2)
            await asyncio.sleep(0.005)
        assert not one.children[1].dead
        one.children[1].its_orders.send(Loaded())
        while not one.children[1].dead:
            one.seat.check(0.2)
            await asyncio.sleep(0.005)
        assert "no sign of life" in one.seat.cause(one.seat.process)
        await one.seat.replace()
        assert "was ended by SIGKILL" in one.seat.cause(one.seat.process)

    asked: list[object] = []
    Played(monkeypatch, spare_after_s=None).run(work)
    assert set(asked) == {Ping()}


def test_time_in_which_the_supervisor_did_not_run_does_not_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All of the job was stopped, as by Ctrl-Z, and goes on."""
    now = [100.0]
    monkeypatch.setattr(seat_module, "time", SimpleNamespace(monotonic=lambda: now[0]))

    async def work(one: Played) -> None:
        for seconds in (0.1, 0.1, 500.0, 0.1, 0.9):
            now[0] += seconds
            one.seat.check(10.0)
        assert not one.children[0].dead
        for _ in range(20):
            now[0] += 0.6
            one.seat.check(10.0)
        assert one.children[0].dead

    Played(monkeypatch, spare_after_s=None).run(work)
