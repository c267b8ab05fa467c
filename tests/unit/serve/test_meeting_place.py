"""Supervisors of several hosts find each other, and what one says that is not let in."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest

from ds_cp.config import Config, load_config
from ds_cp.serve.job_link import FollowingLink, LeadingLink
from ds_cp.serve.meeting_place import SAID, MeetingPlace
from ds_cp.topology.job import Job

SECRET = b"0123456789abcdef"
LIMIT_S = 60.0


class Supervisor:
    """Of one rank of four over two hosts; ``failed``: what ended it."""

    def __init__(self, rank: int, port: int, config: Config, secret: bytes = SECRET) -> None:
        nobody: Any = lambda *args: None  # noqa: E731
        self.failed: list[tuple[str, int]] = []
        self.has_started = False
        self.strangers = 0
        self.link = (
            LeadingLink(4, nobody, nobody, nobody)
            if rank == 0
            else FollowingLink(rank, LIMIT_S, nobody)
        )
        sock = socket.create_server(("127.0.0.1", port)) if rank == 0 else None
        self.port = sock.getsockname()[1] if sock is not None else port
        self.job = Job(
            rank, 4, rank % 2, 2, None, f"host{rank // 2}", "slurm", "127.0.0.1", self.port,
            store_socket=sock, secret=secret,
        )  # fmt: skip
        self.place = MeetingPlace(
            config, self.job, self.link, lambda *args: self.failed.append(args),
            lambda: self.has_started,
        )  # fmt: skip
        self.place.on_strangers = lambda count: setattr(self, "strangers", count)

    async def close(self) -> None:
        await self.link.close()
        self.place.close()


async def until(done: Callable[[], bool]) -> None:
    async def poll() -> None:
        while not done():
            await asyncio.sleep(0.005)

    await asyncio.wait_for(poll(), LIMIT_S)


def run(
    work: Callable[[Supervisor], Awaitable[None]], secret: bytes = SECRET, **sections: Any
) -> Supervisor:
    first = Supervisor(0, 0, load_config({"model": "none", **sections}), secret)

    async def main() -> None:
        await first.place.open("")
        await asyncio.wait_for(work(first), 2 * LIMIT_S)
        await first.close()

    asyncio.run(main())
    return first


def test_rank_0s_worker_comes_to_the_port_like_all_others() -> None:
    async def work(first: Supervisor) -> None:
        seen = first.place.worker_job
        assert (seen.store_host, seen.store_port) == ("127.0.0.1", first.port)
        assert seen.store_socket is None and seen.secret == SECRET
        one_host = replace(first.job, local_world_size=4)
        first.place._job = one_host
        assert first.place.worker_job is one_host

    run(work)


def test_they_find_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    async def work(first: Supervisor) -> None:
        other = Supervisor(2, first.port, load_config({"model": "none"}))
        await other.place.open("")
        await until(lambda: other.link.is_open)
        assert isinstance(first.link, LeadingLink)
        assert first.link.present == {2} and not first.failed and not other.failed
        await other.close()

    run(work)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("has_started", [False, True])
def test_another_config_ends_a_start_and_no_server(has_started: bool) -> None:
    async def work(first: Supervisor) -> None:
        first.has_started = has_started
        other = Supervisor(3, first.port, load_config({"model": "another"}))
        await other.place.open("")
        await until(lambda: bool(other.failed))
        [(said, code)] = other.failed
        assert code == 2 and "rank 3 on host1 was started with another config" in said, said
        await until(lambda: bool(first.failed) or has_started)
        await other.close()

    first = run(work)
    if has_started:
        assert not first.failed
    else:
        [(said, code)] = first.failed
        assert code == 2 and said.startswith("rank 3 on host1 cannot join: "), said


def test_another_secret_ends_that_one_alone(capsys: pytest.CaptureFixture[str]) -> None:
    async def work(first: Supervisor) -> None:
        for _ in range(SAID + 2):
            other = Supervisor(1, first.port, load_config({"model": "none"}), b"f" * 16)
            await other.place.open("")
            await until(lambda: bool(other.failed))  # noqa: B023
            assert "does not share the job's secret" in other.failed[0][0]
            await other.close()
        await until(lambda: first.strangers == SAID + 2)

    first = run(work)
    lines = capsys.readouterr().err.splitlines()
    assert not first.failed and len(lines) == SAID
    assert "a connection from 127.0.0.1 was dropped" in lines[0]
    assert lines[-1].endswith("others are only counted")


def test_a_job_without_a_secret_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    async def work(first: Supervisor) -> None:
        pass

    run(work, b"")
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("ds_cp: warning: the job has no secret") and "DS_CP_JOB_SECRET" in line
