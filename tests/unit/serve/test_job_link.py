"""Supervisors of one host: what one tells, and what its silence tells."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from ds_cp.serve import job_link
from ds_cp.serve.job_link import FollowingLink, LeadingLink, link_name
from ds_cp.topology.job import Job


class Both:
    """Rank 0's link and that of rank 2, connected, and what they met."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.lost: list[tuple[int, str, float | None]] = []
        self.stopping: list[tuple[int, str, bool]] = []
        self.gone: list[int] = []
        self.leading = LeadingLink(
            lambda *args: self.lost.append(args), lambda *args: self.stopping.append(args)
        )
        self.following = FollowingLink(2, self.gone.append)

    async def until(self, done: Callable[[], bool]) -> None:
        end = time.monotonic() + 10
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
        await asyncio.wait_for(both.following._connected.wait(), 10)
        await asyncio.wait_for(work(both), 20)
        await both.following.close()
        await both.leading.close()

    asyncio.run(main())
    return both


def test_a_lost_worker_is_reported_with_its_cause() -> None:
    async def work(both: Both) -> None:
        assert await both.following.report("the worker of rank 2 was ended by SIGKILL", 12.5)
        both.following.stopping("SIGTERM", False)
        await both.until(lambda: bool(both.stopping))

    both = run(work)
    assert both.lost == [(2, "the worker of rank 2 was ended by SIGKILL", 12.5)]
    assert both.stopping == [(2, "SIGTERM", False)] and not both.gone


@pytest.mark.parametrize("who", ["following", "leading"])
def test_an_end_without_a_good_bye_is_a_death(who: str) -> None:
    async def work(both: Both) -> None:
        peer = both.following._peer if who == "following" else next(iter(both.leading._peers))
        assert peer is not None
        peer.close()
        await both.until(lambda: bool(both.lost or both.gone))

    both = run(work)
    if who == "following":
        cause = f"the supervisor of rank 2 (process {os.getpid()}) was killed"
        assert both.lost == [(2, cause, None)]
    else:
        assert both.gone == [os.getpid()]


def test_a_good_bye_is_none() -> None:
    async def work(both: Both) -> None:
        await both.leading.close()
        assert both.following._task is not None
        await asyncio.wait_for(both.following._task, 5)

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
                stranger.settimeout(5)
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
        link = FollowingLink(1, lambda pid: None)
        assert not await link.report("no link at all", 0.0)
        await link.open(f"\0ds_cp-test/nobody/{time.monotonic_ns()}")
        assert not await link.report("nobody listens", 0.0)
        await link.close()

    asyncio.run(main())


def test_who_has_a_link() -> None:
    def job(size: int, here: int, hosts: tuple[str, ...] | None) -> Job:
        return Job(0, size, 0, here, hosts, "a", "torchrun", "127.0.0.1", 29500)

    name = link_name(job(2, 2, ("a", "a")))
    assert name is not None and name.startswith("\0") and name.endswith("/29500")
    assert link_name(job(1, 1, ("a",))) is None
    assert link_name(job(4, 2, None)) is None and link_name(job(2, 1, ("a", "b"))) is None
