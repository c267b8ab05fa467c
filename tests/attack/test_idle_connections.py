"""More connections than the server may hold, without a key and without a request."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.helpers.front import Front, front, honest_streams, load
from tests.helpers.raw import answers, ask, connect, read_all

pytestmark = pytest.mark.quiet

HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
END = b"data: [DONE]\n\n\r\n0\r\n\r\n"  # of a whole stream
MODELS = HEALTH.replace(b"/health", b"/v1/models")


@pytest.fixture(autouse=True)
def files() -> Iterator[None]:
    """Enough open files for the clients of this process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 4096
    if hard != resource.RLIM_INFINITY and hard < wanted:
        pytest.skip(
            f"the clients need {wanted} open files, the hard limit is {hard}; raise it: ulimit -Hn"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def slowest_health(port: int, seconds: float) -> float:
    """The longest time to an answer of /health, asked again and again for some seconds."""
    end, longest = time.monotonic() + seconds, 0.0
    while time.monotonic() < end:
        begun = time.monotonic()
        (answer,) = ask(port, HEALTH)
        assert answer.status == 200
        longest = max(longest, time.monotonic() - begun)
        time.sleep(0.02)
    return longest


def hold(stack: contextlib.ExitStack, port: int, count: int, sent: bytes = b"") -> None:
    """Open connections that stay open, at the client's side."""
    for i in range(count):
        if i % 16 == 0:  # a client that comes faster than it is accepted waits a second and more
            time.sleep(0.003)
        sock = stack.enter_context(connect(port))
        with contextlib.suppress(OSError):  # it had to make room already
            sock.sendall(sent)


@pytest.mark.parametrize(("limit", "count"), [(1024, 1100), (256, 300)])
def test_idle_connections_are_nothing_to_others(tmp_path: Path, limit: int, count: int) -> None:
    with front(tmp_path, files=limit, engine={"delay_s": 0.02}) as served:
        memory = served.memory
        with honest_streams(served.url, 20) as met, contextlib.ExitStack() as stack:
            for sent in (b"", b"GET /health HTTP/1.1\r\nHo"):  # nothing, and half a head
                hold(stack, served.port, count, sent)
                assert slowest_health(served.port, 0.5) < 2.0 * max(1.0, load(5))
                assert served.descriptors < limit - 30  # files are left for everything else
        assert not met.lost and met.whole and met.gap_s < met.bound_s, met
        assert served.memory - memory < 100 << 20
        assert served.log.read_text() == ""


def busy(served: Front, stack: contextlib.ExitStack, count: int) -> list[socket.socket]:
    """Connections with a stream in flight."""
    body = b'{"prompt": [5], "max_tokens": 100, "stream": true}'
    data = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    data += b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    socks = [stack.enter_context(connect(served.port)) for _ in range(count)]
    for sock in socks:
        sock.sendall(data)
    for sock in socks:
        assert b"200 OK" in sock.recv(100)
    return socks


def test_at_the_bound(tmp_path: Path) -> None:
    """Who is idle makes room, longest first; when none is, others are told and health answers."""
    with front(tmp_path, max_connections=4, engine={"delay_s": 0.5}) as served:
        url, port = served.url, served.port
        with contextlib.ExitStack() as stack, httpx.Client() as first, httpx.Client() as second:
            for client in (first, second, first):  # the second one has been idle longest
                assert client.get(url + "/health").status_code == 200
            kept = first._transport._pool.connections[0]  # type: ignore[attr-defined]
            streams = busy(served, stack, 3)
            assert first.get(url + "/health").status_code == 200
            assert first._transport._pool.connections == [kept]  # type: ignore[attr-defined]
            streams += busy(served, stack, 1)  # in the place of the idle one
            (refused,) = ask(port, MODELS)
            assert refused.status == 503 and refused.error["code"] == "too_many_connections"
            assert refused.headers["connection"] == "close"
            assert int(refused.headers["retry-after"]) >= 1
            for target in (b"/health", b"/health?x", b"http://localhost/health"):
                (answer,) = ask(port, HEALTH.replace(b"/health", target))
                assert answer.status == 200 and answer.headers["connection"] == "close"
            hold(stack, port, 60)  # they take turns in what is kept for health
            assert slowest_health(port, 0.5) < 2.0 * max(1.0, load(5))
            streams[0].close()  # a place is free again
            deadline = time.monotonic() + 60
            while ask(port, MODELS)[0].status != 200:
                assert time.monotonic() < deadline
            for sock in streams[1:] * 2:  # they go on; the next test reads them to their end
                assert sock.recv(1 << 16)
        assert served.log.read_text() == ""


def test_a_burst_at_the_bound(tmp_path: Path) -> None:
    """Nobody is closed whose request is on its way: they are accepted a few at a time."""
    with front(tmp_path, max_connections=8, engine={"delay_s": 0.03}) as served:
        with contextlib.ExitStack() as stack, ThreadPoolExecutor(60) as clients:
            streams = busy(served, stack, 8)
            asked = list(clients.map(lambda _: ask(served.port, HEALTH), range(120)))
            assert [[answer.status for answer in found] for found in asked] == [[200]] * 120
            assert all(read_all(sock).endswith(END) for sock in streams)
        assert served.log.read_text() == ""


def test_without_a_free_file_the_server_goes_on(tmp_path: Path) -> None:
    """The bound is for connections; files can run out by what else the process opens."""
    with front(tmp_path, files=256, engine={"delay_s": 0.02}) as served:
        taken = contextlib.ExitStack()
        with taken, honest_streams(served.url, 3) as met:
            hold(taken, served.port, 10)
            limits = (served.descriptors, 256)  # from now on no file can be opened
            resource.prlimit(served.process.pid, resource.RLIMIT_NOFILE, limits)
            waiting = [taken.enter_context(connect(served.port)) for _ in range(20)]
            for sock in waiting:
                sock.sendall(HEALTH)
            time.sleep(1.5)
            resource.prlimit(served.process.pid, resource.RLIMIT_NOFILE, (256, 256))
            for sock in waiting:
                assert [answer.status for answer in answers(read_all(sock))] == [200]
        assert not met.lost and met.gap_s < met.bound_s, met
        lines = served.log.read_text().splitlines()
        assert len(lines) == 1 and os.strerror(24) in lines[0], lines
