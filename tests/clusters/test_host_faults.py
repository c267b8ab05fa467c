"""Two hosts of two ranks each: a host is lost, the network is cut or slow.

Nobody watches the ranks here: they are started one by one, and what they do is their own.
"""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import pytest

from tests.clusters.conftest import GREEDY, KV, begun, port_of
from tests.helpers.jobs import Job
from tests.helpers.streams import Stream
from tests.helpers.two_hosts import HostPair
from tests.launch.conftest import Write

pytestmark = [pytest.mark.netns, pytest.mark.slow]

TIMEOUT_S = 15.0  # comm.timeout_s: what an exchange may take
END_S = TIMEOUT_S + 30.0  # from the fault to the last process
SECRET = {"DS_CP_JOB_SECRET": "0123456789abcdef0123456789abcdef"}
SHORT = GREEDY | {"max_tokens": 120}  # one host of two ranks holds it


def serving(pair: HostPair, config: Write, folder: Path, **tolerance: Any) -> tuple[list[Job], int]:
    """Four ranks that have a server up, and its port on the first host."""
    file = config(
        kv_cache=KV, threads_per_rank=1, comm={"timeout_s": TIMEOUT_S}, fault_tolerance=tolerance
    )
    jobs = pair.start_ranks(["launch/serve.py", "--config", file], folder, env=SECRET)
    return jobs, port_of(jobs[0])


def story(jobs: list[Job]) -> str:
    return "\n".join(f"rank {rank}:{job.story()}" for rank, job in enumerate(jobs))


def errors(job: Job) -> list[str]:
    """What a rank said that it ended of."""
    return re.findall(r"^ds_cp: error: (.*)$", job.err, re.MULTILINE)


def whole(jobs: list[Job], what: str, stream: Stream, expected: dict[int, dict[str, Any]]) -> None:
    """The stream ends in time with what is expected."""
    try:
        jobs[0].until(what, lambda: stream.is_over, 40)
        assert stream.end() == expected, what
    except AssertionError as err:
        raise AssertionError(f"{what}, after {stream.count} events{story(jobs)}") from err


def test_the_network_is_cut_for_a_while_and_is_slow(
    pair: HostPair, config: Write, folder: Path
) -> None:
    """Where hosts are given the time for it, no request loses a token."""
    jobs, port = serving(pair, config, folder, host_timeout_s=60)
    with pair.door("nodea", port) as url:
        expected = Stream(url, GREEDY).end()
        stream = begun(jobs[0], Stream(url, GREEDY))
        pair.partition_for(5)
        whole(jobs, "the network was cut for 5 s", stream, expected)
        with pair.slow_link(4):
            whole(jobs, "a slow link", Stream(url, GREEDY), expected)
    assert not any(errors(job) for job in jobs), story(jobs)
    pair.clear()


def test_the_network_is_cut_for_ever(pair: HostPair, config: Write, folder: Path) -> None:
    """Both hosts end in time and name the other one."""
    jobs, port = serving(pair, config, folder)
    with pair.door("nodea", port) as url:
        stream = begun(jobs[0], Stream(url, GREEDY))
        with pair.partition():
            began = time.monotonic()
            jobs[0].until("word to the client", lambda: stream.is_over, END_S)
            assert stream.errors, "the client was not told"
            pair.until_empty(END_S)
            print("gone", time.monotonic() - began, [errors(job) for job in jobs])
    assert "host nodeb" in str([errors(job) for job in jobs[:2]]), story(jobs)
    assert "host nodea" in str([errors(job) for job in jobs[2:]]), story(jobs)


@pytest.mark.parametrize(("lost", "silent"), [("nodeb", True), ("nodeb", False), ("nodea", True)])
def test_a_host_is_lost(
    lost: str, silent: bool, pair: HostPair, config: Write, folder: Path
) -> None:
    """By a power cut, or ended by its kernel. The other one ends in time and says why."""
    [left] = [name for name in pair.hosts.names if name != lost]
    jobs, port = serving(pair, config, folder)
    with pair.door("nodea", port) as url:
        stream = begun(jobs[0], Stream(url, GREEDY))
        with pair.restored(lost):
            began = time.monotonic()
            pair.kill_host(lost, silent=silent)
            jobs[0].until("word to the client", lambda: stream.is_over, END_S)
            pair.until_empty(END_S, left)
            print(lost, silent, time.monotonic() - began, [errors(job) for job in jobs])
        assert lost == "nodea" or stream.errors, "the client was not told"
        assert {one["reason"] for one in stream.answers.values()} == {None}
    mine = jobs[:2] if left == "nodea" else jobs[2:]
    assert any(errors(job) for job in mine), story(jobs)


def test_a_server_goes_on_without_its_idle_other_host(
    pair: HostPair, config: Write, folder: Path
) -> None:
    """That loses its power while nobody asks for anything, where two ranks are enough."""
    jobs, port = serving(pair, config, folder, min_ranks=2)
    with pair.door("nodea", port) as url, pair.restored("nodeb"):
        expected = Stream(url, SHORT).end()
        pair.kill_host("nodeb")
        jobs[0].until("the loss", lambda: "without ranks 2-3 have met" in jobs[0].err, END_S)
        assert Stream(url, SHORT).end() == expected, story(jobs)
        stream = begun(jobs[0], Stream(url, SHORT))
        pair.matching("nodea", "launch/serve.py")[0].terminate()
        assert stream.end() == expected, story(jobs)
        pair.until_empty(END_S, "nodea")
    assert not any(errors(job) for job in jobs[:2]), story(jobs)
