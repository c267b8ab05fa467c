"""Supervisors of one host: what one tells, and what its silence tells."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from ds_cp.link.door import Door
from ds_cp.link.knock import Port
from ds_cp.link.peer import SealedPeer
from ds_cp.link.seal import Claim
from ds_cp.serve import job_link, job_words
from ds_cp.serve.job_link import FollowingLink, LeadingLink, has_link, link_name
from ds_cp.serve.job_words import Died, End, Gone, Hello, Lost
from ds_cp.serve.orders import Leave, Left, Loaded, Meet, Met
from ds_cp.topology.job import Job
from ds_cp.topology.launcher_process import LauncherProcess


class Both:
    """Rank 0's link and that of rank 2, connected, and what they met."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.lost: list[tuple[int, Lost]] = []
        self.stopping: list[tuple[int, str, bool]] = []
        self.gone: list[tuple[int, Gone]] = []
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
    assert (2 if who == "following" else 0, Gone(os.getpid())) in both.gone and not both.lost


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
    for several in (job(4, 2, None), job(2, 1, ("a", "b"))):
        assert link_name(several) is None and has_link(several)
    assert not has_link(job(1, 1, ("a",))) and has_link(job(2, 2, None))


SECRET = b"0123456789abcdef"


class Hosts:
    """Rank 0's link and that of rank 1, by a port, and what happened in order."""

    def __init__(self) -> None:
        self.sock = socket.create_server(("127.0.0.1", 0))
        self.happened: list[object] = []
        self.leading = LeadingLink(
            2,
            lambda *args: self.happened.append(args),
            lambda *args: self.happened.append(args),
            lambda *args: self.happened.append(args),
        )
        self.leading.on_said = lambda *args: self.happened.append(args)
        self.leading.on_here = self.happened.append  # type: ignore[assignment]
        self.following = FollowingLink(1, 10.0, lambda *args: self.happened.append(args))
        self.following.on_refused = self.happened.append  # type: ignore[assignment]
        self.door = Door(self.sock, SECRET, self.claim(0), 30.0)
        self.door.on_control = self._on_control
        self.door.expects = self.leading.why_not

    def claim(self, rank: int) -> Claim:
        return Claim("control", rank, 2, f"host{rank}", 100 + rank, "1.0", "mark")

    async def _on_control(self, claim: Claim, peer: SealedPeer) -> None:
        await self.leading.listen(Hello(claim.rank, claim.pid, claim.host), peer)

    async def open(self, hang_s: float | None = None, returns_s: float = 0.0) -> None:
        await self.door.open()
        self.leading.open_to_hosts(hang_s)
        number = self.sock.getsockname()[1]
        port = Port("127.0.0.1", number, SECRET, self.claim(1), 60.0, 30.0)
        await self.following.open_to_host(port, hang_s, returns_s)
        await self.until(lambda: self.following.is_open)

    async def until(self, done: Callable[[], bool]) -> None:
        async def poll() -> None:
            while not done():
                await asyncio.sleep(0.005)

        await asyncio.wait_for(poll(), 60)

    async def close(self) -> None:
        await self.following.close()
        await self.leading.close()
        self.door.close()


HERE = Hello(1, 101, "host1")


def between_hosts(work: Callable[[Hosts], Awaitable[None]]) -> list[object]:
    hosts = Hosts()

    async def main() -> None:
        await asyncio.wait_for(work(hosts), 120)
        await hosts.close()

    asyncio.run(main())
    return hosts.happened


def test_supervisors_of_two_hosts_hear_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same words as on one host, and a second supervisor of a rank is refused."""
    monkeypatch.setattr(job_words, "BEAT_S", 0.01)
    asked: list[object] = []

    async def work(hosts: Hosts) -> None:
        await hosts.open()
        hosts.following.on_asked = asked.append
        hosts.following.on_bye = lambda: asked.append("bye")
        assert hosts.leading.present == {1}
        hosts.leading.ask(1, Meet(3))
        hosts.following.say(Met(3))
        await hosts.until(lambda: bool(asked) and len(hosts.happened) == 2)
        assert await hosts.following.report(Lost("it has ended", since=12.5))
        other = FollowingLink(1, 10.0, lambda *args: None)
        other.on_refused = hosts.happened.append  # type: ignore[assignment]
        number = hosts.sock.getsockname()[1]
        await other.open_to_host(Port("127.0.0.1", number, SECRET, hosts.claim(1), 60.0), None)
        await hosts.until(lambda: len(hosts.happened) == 4)
        await hosts.leading.close()
        await hosts.until(lambda: not hosts.following.is_open)
        await other.close()

    here, met, lost, refused = between_hosts(work)
    assert (here, met, lost) == (HERE, (1, Met(3)), (1, Lost("it has ended")))
    assert "rank 1 is here already" in str(refused)
    assert asked == [Meet(3), "bye"]


@pytest.mark.parametrize("who", ["following", "leading"])
def test_a_killed_supervisor_of_another_host(who: str) -> None:
    async def work(hosts: Hosts) -> None:
        await hosts.open()
        peer = hosts.following._peer if who == "following" else hosts.leading._peers[1]
        assert peer is not None
        peer.abort()  # type: ignore[attr-defined]  # as the system does
        await hosts.until(lambda: len(hosts.happened) == 3)

    happened = between_hosts(work)
    assert (1, Gone(101, "host1")) in happened and (0, Gone(os.getpid(), "host0")) in happened


def test_a_supervisor_that_stands_still(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its system goes on to answer for it."""
    monkeypatch.setattr(job_words, "BEAT_S", 0.05)
    monkeypatch.setattr(job_words, "GAP_S", 60.0)

    async def work(hosts: Hosts) -> None:
        await hosts.open(hang_s=0.5)
        assert hosts.following._beating is not None
        hosts.following._beating.cancel()
        await hosts.until(lambda: len(hosts.happened) >= 2)

    happened = between_hosts(work)
    assert (1, Gone(101, "host1", "stalled")) in happened


def test_a_host_that_comes_back() -> None:
    """Whoever cannot reach rank 0's host tries for a while, and is let in again."""

    async def work(hosts: Hosts) -> None:
        hosts.following.on_away = hosts.happened.append  # type: ignore[assignment]
        hosts.following.on_back = lambda: hosts.happened.append("back")
        await hosts.open(returns_s=60.0)
        for peer in (hosts.following._peer, hosts.leading._peers[1]):
            assert peer is not None
            peer.ended = "unreachable"
            peer.abort()  # type: ignore[attr-defined]
        await hosts.until(lambda: "back" in hosts.happened)
        hosts.following.say(Loaded())
        await hosts.until(lambda: (1, Loaded()) in hosts.happened)

    happened = between_hosts(work)
    assert happened[0] == HERE and happened.count(HERE) == 2
    assert (1, Gone(101, "host1", "unreachable")) in happened
    assert Gone(os.getpid(), "host0", "unreachable") in happened


def test_time_in_which_this_process_did_not_run_is_not_held_against_others() -> None:
    class Silent:
        heard = 0.0
        ended = "closed"
        given_up = False

        def send(self, payload: bytes) -> None:
            pass

        def give_up(self) -> None:
            self.given_up = True

    async def main() -> None:
        peer: Any = Silent()
        peer.heard = time.monotonic()
        task = asyncio.create_task(job_words.beat(lambda: [peer], 0.6))
        await asyncio.sleep(0.05)
        time.sleep(1.5)  # it stands, and so does everything in it
        await asyncio.sleep(0.05)
        assert not peer.given_up
        task.cancel()

    asyncio.run(main())
