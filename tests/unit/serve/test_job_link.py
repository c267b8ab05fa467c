"""Supervisors of one host: what one tells, and what its silence tells."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import psutil
import pytest

from ds_cp.serve import job_link
from ds_cp.serve.job_link import Died, End, FollowingLink, LeadingLink, Lost, link_name
from ds_cp.serve.orders import Leave, Left, Loaded, Meet, Met
from ds_cp.topology.job import Job
from ds_cp.topology.launcher_process import LauncherProcess


class Both:
    """Rank 0's link and that of rank 2, connected, and what they met."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.lost: list[tuple[int, Lost]] = []
        self.stopping: list[tuple[int, str, bool]] = []
        self.gone: list[tuple[int, int]] = []
        self.leading = LeadingLink(
            3,
            lambda *args: self.lost.append(args),
            lambda *args: self.gone.append(args),
            lambda *args: self.stopping.append(args),
        )
        self.following = FollowingLink(2, 10.0, lambda *args: self.gone.append(args))

    async def until(self, done: Callable[[], bool]) -> None:
        end = time.monotonic() + 60
        while not done():
            assert time.monotonic() < end, (self.lost, self.stopping, self.gone)
            await asyncio.sleep(0.005)


def run(work: Callable[[Both], Awaitable[None]]) -> Both:
    both = Both(f"\0ds_cp-test/{os.getpid()}/{time.monotonic_ns()}")

    async def main() -> None:
        await both.following.open(both.name)  # it may start first
        await asyncio.sleep(0.05)
        await both.leading.open(both.name)
        assert both.leading.is_open
        await asyncio.wait_for(both.following._connected.wait(), 60)
        await asyncio.wait_for(work(both), 60)
        await both.following.close()
        await both.leading.close()

    asyncio.run(main())
    return both


def test_a_lost_worker_is_reported_with_its_cause() -> None:
    lost = Lost("the worker of rank 2 was ended by SIGKILL", 3, 12.5)

    async def work(both: Both) -> None:
        assert await both.following.report(lost)
        both.following.stopping("SIGTERM", False)
        await both.until(lambda: bool(both.stopping))

    both = run(work)
    assert both.lost == [(2, lost)]
    assert both.stopping == [(2, "SIGTERM", False)] and not both.gone


def test_what_rank_0_asks_and_hears_of_a_worker() -> None:
    """In order; the good-bye of rank 0 is told, since workers may wait for what it asks."""
    asks = [Leave(0), Meet(1), End("it did not leave within 10 s")]
    says = [Died("the worker of rank 2 was ended by SIGKILL"), Loaded(), Met(1), Left(1, "x" * 500)]
    asked: list[object] = []
    said: list[tuple[int, object]] = []

    async def work(both: Both) -> None:
        both.following.on_asked = asked.append
        both.following.on_bye = lambda: asked.append("bye")
        both.leading.on_said = lambda *args: said.append(args)
        assert both.following.is_open
        for ask in asks:
            both.leading.ask(2, ask)  # type: ignore[arg-type]
            both.leading.ask(1, ask)  # type: ignore[arg-type]  # it is not there
        for one in says:
            both.following.say(one)  # type: ignore[arg-type]
        await both.until(lambda: len(asked) == len(asks) and len(said) == len(says))
        await both.leading.close()
        await both.until(lambda: not both.following.is_open)

    both = run(work)
    assert asked == [*asks, "bye"] and said == [(2, one) for one in says]
    assert not both.gone and not both.lost


@pytest.mark.parametrize("who", ["following", "leading"])
def test_an_end_without_a_good_bye_is_a_death(who: str) -> None:
    async def work(both: Both) -> None:
        peer = both.following._peer if who == "following" else both.leading._peers[2]
        assert peer is not None
        peer.close()
        await both.until(lambda: bool(both.lost or both.gone))

    both = run(work)
    assert (2 if who == "following" else 0, os.getpid()) in both.gone and not both.lost


@pytest.mark.parametrize("rank", [-1, 0, 2, 3])
def test_a_rank_that_cannot_be_is_refused(rank: int) -> None:
    """Rank 0 listens, rank 2 is there, and there are three."""

    async def work(both: Both) -> None:
        other = FollowingLink(rank, 10.0, lambda *args: None)
        await other.open(both.name)
        assert other._task is not None
        await asyncio.wait_for(other._task, 60)
        assert not await other.report(Lost("it is not of this job"))
        await other.close()
        assert await both.following.report(Lost("it is"))

    both = run(work)
    assert both.lost == [(2, Lost("it is"))] and not both.gone


def test_a_good_bye_is_none() -> None:
    async def work(both: Both) -> None:
        await both.leading.close()
        assert both.following._task is not None
        await asyncio.wait_for(both.following._task, 60)

    both = run(work)
    assert not both.gone and not both.lost


@pytest.mark.parametrize("sent", [b"what\n", b"x" * 100_000, b'{"type":"lost","cause":1}\n', b""])
def test_what_is_no_message_is_not_heard(sent: bytes) -> None:
    async def work(both: Both) -> None:
        with socket.socket(socket.AF_UNIX) as stranger:
            stranger.connect(both.name)
            stranger.setblocking(False)
            loop = asyncio.get_running_loop()
            try:
                await loop.sock_sendall(stranger, sent)
                stranger.shutdown(socket.SHUT_WR)
                assert await loop.sock_recv(stranger, 100) == b""
            except OSError:  # closed with bytes unread
                pass

    both = run(work)
    assert not both.lost and not both.stopping and not both.gone


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user; run as root")
def test_another_user_is_not_heard(tmp_path: Path) -> None:
    async def work(both: Both) -> None:
        child = os.fork()
        if child == 0:
            said = b'{"type":"hello","rank":1,"pid":1}\n{"type":"lost","cause":"x","since":1.0}\n'
            try:
                os.setuid(65534)
                stranger = socket.socket(socket.AF_UNIX)
                stranger.settimeout(60)
                stranger.connect(both.name)
                stranger.sendall(said)
                os._exit(stranger.recv(100) != b"")
            except ConnectionError:  # closed with bytes unread
                os._exit(0)
            finally:
                os._exit(2)
        _, status = await asyncio.to_thread(os.waitpid, child, 0)
        assert status == 0

    assert not run(work).lost


def test_nobody_to_report_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_link, "REPORT_S", 0.2)

    async def main() -> None:
        link = FollowingLink(1, 0.3, lambda rank, pid: None)
        assert not await link.report(Lost("no link at all"))
        await link.open(f"\0ds_cp-test/nobody/{time.monotonic_ns()}")
        assert not await link.report(Lost("nobody listens"))
        assert link._task is not None
        await asyncio.wait_for(link._task, 60)  # it does not try for ever
        await link.close()

    asyncio.run(main())


def test_who_has_a_link() -> None:
    def job(size: int, here: int, hosts: tuple[str, ...] | None) -> Job:
        return Job(0, size, 0, here, hosts, "a", "torchrun", "127.0.0.1", 29500)

    name = link_name(job(2, 2, ("a", "a")))
    assert name is not None and name.startswith("\0") and name.endswith("/29500/")
    one, other = (LauncherProcess("x", psutil.Process(pid)).identity for pid in (1, os.getpid()))
    assert one.startswith("1.") and one != other
    assert len({name, link_name(job(2, 2, None), one), link_name(job(2, 2, None), other)}) == 3
    assert link_name(job(1, 1, ("a",))) is None
    assert link_name(job(4, 2, None)) is None and link_name(job(2, 1, ("a", "b"))) is None
