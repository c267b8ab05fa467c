"""A server over two hosts goes on when one of them is lost, and takes it back."""

from __future__ import annotations

import sys
from collections.abc import Callable

from tests.clusters.test_hosts_mend import (
    SECRET,
    SEEDED,
    Server,
    begun,
    hosts,
    pytestmark,
    serve,
)
from tests.helpers.jobs import ROOT
from tests.helpers.streams import Stream
from tests.helpers.tiny import LONG
from tests.launch.conftest import Start, Write

__all__ = ["hosts", "pytestmark", "serve"]
SPANS = {"prompt": LONG, "max_tokens": 120, "temperature": 0}  # one host of two ranks holds it
WAIT_S = 60.0


def test_the_network_is_lost_and_comes_back(serve: Callable[..., Server]) -> None:
    """All workers keep what they have loaded; no stream notices but by a pause."""
    server = serve(fault_tolerance={"min_ranks": 2})
    url = server.ready()
    bodies = [SPANS, SEEDED]
    expected = [Stream(url, body).end() for body in bodies]
    workers = [server.process(rank, "serve.worker_process") for rank in range(4)]
    link = ["ip", "link", "set", server.hosts.interface]
    for times in (1, 2):
        streams = [Stream(url, body) for body in bodies]
        begun(server, streams)
        assert server.hosts.run("nodeb", [*link, "down"]).returncode == 0
        for stream, want in zip(streams, expected, strict=True):
            assert stream.end() == want, server.story()
        print("the longest pauses", [round(stream.longest, 2) for stream in streams])
        first = server.jobs[0]
        server.until("the loss", lambda: first.err.count("without ranks 2-3 have met") == times, 30)  # noqa: B023
        assert server.hosts.run("nodeb", [*link, "up"]).returncode == 0
        server.until(
            "the return",
            lambda: first.err.count("all ranks have met again") == times,  # noqa: B023
            WAIT_S,
        )
        assert Stream(url, SPANS).end() == expected[0], server.story()
    assert workers == [server.process(rank, "serve.worker_process") for rank in range(4)]
    server.process(0, "launch/serve.py").terminate()
    for job in server.jobs:
        server.until("its end", lambda: job.process.poll() is not None, 30)  # noqa: B023
        assert job.process.returncode == 0, server.story()


def test_a_rank_of_another_host_is_started_again(
    serve: Callable[..., Server], start: Start, config: Write
) -> None:
    """With the same rank and config, as Kubernetes does it."""
    server = serve(fault_tolerance={"min_ranks": 2})
    url = server.ready()
    expected = Stream(url, SPANS).end()
    stream = Stream(url, SPANS)
    begun(server, [stream])
    argv, env = server.process(3, "launch/serve.py").cmdline(), {}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR",
                 "MASTER_PORT", "DS_CP_JOB_SECRET"):  # fmt: skip
        env[name] = server.process(3, "launch/serve.py").environ()[name]
    assert env["DS_CP_JOB_SECRET"] == SECRET and argv[0].endswith(sys.executable.rpartition("/")[2])
    server.process(3, "launch/serve.py").kill()
    assert stream.end() == expected, server.story()
    first = server.jobs[0]
    server.until("the loss", lambda: "without rank 3 have met again" in first.err, 30)
    server.jobs[3] = start(server.hosts.command("nodeb", argv, ROOT), env)
    server.until("the return", lambda: "all ranks have met again" in first.err, WAIT_S)
    assert Stream(url, SPANS).end() == expected, server.story()
    assert "rank 3 is here again, and loads" in first.err
