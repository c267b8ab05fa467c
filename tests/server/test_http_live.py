"""GET /state: the live picture as events and once, its rate, its viewers."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import httpx
import pytest

from ds_cp.api.live import IDLE_S, MAX_VIEWERS, PER_S, WINDOW_S, Rates
from ds_cp.engine.picture import Counters
from tests.helpers.fake_engine import FakeEngine
from tests.helpers.pictures import PicturedJob
from tests.server.conftest import PATIENCE_S, Running, error_of, wait_for


@contextmanager
def lines_of(served: Running, **headers: str) -> Iterator[Iterator[str]]:
    """The lines of a stream that are not empty."""
    url = served.url + "/state"
    with httpx.stream("GET", url, headers=headers, timeout=PATIENCE_S, verify=False) as reply:
        assert reply.status_code == 200
        assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert reply.headers["cache-control"] == "no-cache"
        yield (line for line in reply.iter_lines() if line)


def frame(line: str) -> dict[str, Any]:
    kind, _, data = line.partition(": ")
    assert kind == "data", line
    found: dict[str, Any] = json.loads(data)
    return found


@pytest.fixture
def at_work(tokenizer: Any) -> FakeEngine:
    """An engine that shows a job at work."""
    engine = FakeEngine(tokenizer)
    job = PicturedJob()
    job.add(100)
    job.add(6)
    job.step(3)
    engine.shown = job.picture()
    return engine


@pytest.fixture
def busy(launch: Callable[..., Running], at_work: FakeEngine) -> Running:
    """A server of that engine."""
    return launch(at_work, keep_alive_s=0.3)


def test_once(busy: Running) -> None:
    reply = busy.get("/state?once=1")
    assert reply.status_code == 200 and reply.headers["content-type"] == "application/json"
    assert reply.headers["cache-control"] == "no-store"
    found = reply.json()
    assert abs(found["at"] - time.time()) < PATIENCE_S
    assert (found["state"], found["model"], found["max_model_len"]) == ("ready", "fake-model", 128)
    picture = found["picture"]
    assert [(r["rank"], r["host"]) for r in picture["ranks"]] == [
        (0, "alpha"), (1, "alpha"), (2, "beta"), (3, "beta"),
    ]  # fmt: skip
    for rank in picture["ranks"]:
        assert sum(count for _, count in rank["cells"]) == rank["total"] == 12
    long, short = picture["requests"]
    assert long["mode"] in ("ring", "tree") and len(long["ranks"]) > 1 and long["why"]
    assert short["mode"] == "local" and len(short["ranks"]) == 1
    assert picture["counters"]["comm_bytes"] == {"tree": 3 * 4096}


def test_before_the_engine_is_ready(launch: Callable[..., Running], tokenizer: Any) -> None:
    engine = FakeEngine(tokenizer)
    engine.state = "starting"
    found = launch(engine).get("/state?once=1").json()
    assert found["state"] == "starting" and found["picture"] is None and found["model"] is None
    assert engine.looks == 0


def test_events_come_when_something_changes_and_comments_when_not(busy: Running) -> None:
    with lines_of(busy) as lines:
        assert frame(next(lines))["picture"]["num_running"] == 2
        assert frame(next(lines))["rates"] is not None, "there are rates from the second one on"
        line = next(lines)
        while line.startswith("data"):
            line = next(lines)
        assert line == ": keep-alive"
        assert busy.engine.shown is not None
        busy.engine.shown = replace(busy.engine.shown, num_running=77)
        while not line.startswith("data"):
            line = next(lines)
        assert frame(line)["picture"]["num_running"] == 77


def test_pictures_are_made_once_for_all_and_not_when_nobody_looks(busy: Running) -> None:
    time.sleep(0.3)
    assert busy.engine.looks == 0
    begun = time.monotonic()
    seen: list[int] = []

    def look() -> None:
        with lines_of(busy) as lines:
            for line in lines:
                if line.startswith("data"):
                    seen.append(frame(line)["picture"]["num_running"])
                if line.startswith("data") and frame(line)["picture"]["num_running"] == 99:
                    return

    viewers = [threading.Thread(target=look) for _ in range(5)]
    for viewer in viewers:
        viewer.start()
    assert busy.engine.shown is not None
    with httpx.Client(base_url=busy.url, timeout=PATIENCE_S, verify=False) as client:
        for number in range(40):  # it changes all the time
            busy.engine.shown = replace(busy.engine.shown, num_running=number)
            client.get("/state?once=1")
            time.sleep(0.02)
    busy.engine.shown = replace(busy.engine.shown, num_running=99)
    for viewer in viewers:
        viewer.join(PATIENCE_S)
    took = time.monotonic() - begun
    assert seen.count(99) == 5
    assert busy.engine.looks <= took * PER_S + 2

    def nobody_looks() -> bool:
        before = busy.engine.looks
        time.sleep(1.2 * IDLE_S)
        return busy.engine.looks == before

    assert wait_for(nobody_looks), "pictures are made though all have left"
    busy.engine.shown = replace(busy.engine.shown, num_running=100)
    with lines_of(busy) as lines:
        assert frame(next(lines))["picture"]["num_running"] == 100, (
            "the first one is not an old one"
        )


@contextmanager
def one_that_does_not_read(served: Running) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", served.port)) as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.sendall(b"GET /state HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        yield slow


def read_wide(served: Running, count: int) -> None:
    """Read pictures that are larger than what a socket takes unread."""
    base = served.engine.shown
    assert base is not None
    wide = tuple(replace(base.requests[0], id=f"{i:064}", why="x" * 900) for i in range(64))
    with lines_of(served) as lines:
        for number in range(count):
            served.engine.shown = replace(base, num_running=number, requests=wide)
            assert next(lines)


def test_one_that_does_not_read_holds_up_nobody(
    launch: Callable[..., Running], at_work: FakeEngine
) -> None:
    served = launch(at_work, write_timeout_s=300.0)  # longer than the others wait for a line
    with one_that_does_not_read(served):
        read_wide(served, 14)


def test_one_that_does_not_read_is_dropped(
    launch: Callable[..., Running], at_work: FakeEngine
) -> None:
    served = launch(at_work, write_timeout_s=1.0)
    with one_that_does_not_read(served) as slow:
        read_wide(served, 14)

        def ended() -> bool:
            try:
                return slow.send(b"x") == 0
            except OSError:
                return True

        assert wait_for(ended), "its connection is closed after write_timeout_s"


def test_viewers_are_counted(busy: Running) -> None:
    request = b"GET /state HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
    viewers = []
    for _ in range(MAX_VIEWERS):
        viewer = socket.create_connection(("127.0.0.1", busy.port), timeout=PATIENCE_S)
        viewer.sendall(request)
        viewers.append(viewer)
    for viewer in viewers:
        assert viewer.recv(12) == b"HTTP/1.1 200"
    error = error_of(busy.get("/state"), 503)
    assert error["code"] == "too_many_viewers" and str(MAX_VIEWERS) in error["message"]
    assert busy.get("/state?once=1").status_code == 200, "one picture can still be had"
    for viewer in viewers:
        viewer.close()

    def admitted() -> bool:
        with httpx.stream("GET", busy.url + "/state", timeout=PATIENCE_S, verify=False) as reply:
            return reply.status_code == 200

    assert wait_for(admitted), "those that left have made room"


def test_it_ends_with_the_server(busy: Running) -> None:
    with lines_of(busy) as lines:
        next(lines)
        busy.engine.state = "stopping"
        states = [frame(line)["state"] for line in lines if line.startswith("data: {")]
    assert states[-1] == "stopping"


def test_it_needs_the_key(launch: Callable[..., Running]) -> None:
    served = launch(api_key=("sesame",))
    for path in ("/state", "/state?once=1"):
        error_of(served.get(path), 401)
    assert served.engine.looks == 0
    with_key = {"Authorization": "Bearer sesame"}
    assert served.get("/state?once=1", headers=with_key).json()["state"] == "ready"
    with lines_of(served, **with_key) as lines:
        assert frame(next(lines))["state"] == "ready"


def test_a_wrong_parameter_is_named(served: Running) -> None:
    assert error_of(served.get("/state?once=perhaps"), 400)["param"] == "once"


def test_head_ends(served: Running) -> None:
    with httpx.Client(base_url=served.url, timeout=PATIENCE_S, verify=False) as client:
        for _ in range(2):  # on one connection
            reply = client.head("/state")
            assert reply.status_code == 200
            assert reply.headers["content-type"].startswith("text/event-stream")


def test_rates() -> None:
    rates = Rates()

    def at(now: float, tokens: int, sent: int) -> dict[str, Any] | None:
        return rates.add(now, Counters(generation_tokens=tokens, comm_bytes={"tree": sent}))

    assert at(10.0, 100, 0) is None
    first = at(10.5, 110, 500)
    assert first is not None and first["generation_tokens_per_s"] == 20.0
    assert first["comm_bytes_per_s"] == {"tree": 1000}
    for step in range(1, 9):  # 40 tokens a second from here on
        last = at(10.5 + step / 4, 110 + 10 * step, 500)
    assert last is not None and last["generation_tokens_per_s"] == 40.0, "the old ones are gone"
    assert last["comm_bytes_per_s"] == {"tree": 0}
    assert at(20.0 + WINDOW_S, 10**6, 0) is None, "nobody looked in between"
