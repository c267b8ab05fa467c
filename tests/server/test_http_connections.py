"""Connections: answers before the whole body, and faults while a head is read."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from typing import Any

import pytest
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from ds_cp.api.transport.connection import Connection
from tests.helpers.raw import answers, ask, connect, read_all
from tests.server.conftest import Running, wait_for

Launch = Callable[..., Running]
HOST = b"Host: localhost\r\n"
JSON = b"Content-Type: application/json\r\n"
PING = b"GET /health HTTP/1.1\r\n" + HOST + b"\r\n"


@pytest.mark.parametrize(
    ("status", "head"),
    [
        (401, b"POST /v1/completions HTTP/1.1\r\nContent-Length: 50\r\n"),
        (413, b"POST /v1/completions HTTP/1.1\r\nContent-Length: 99999999\r\n"),
        (413, b"POST /v1/completions HTTP/1.1\r\nContent-Length: 99999999\r\n"
         b"Expect: 100-continue\r\n"),
        (415, b"POST /v1/completions HTTP/1.1\r\nContent-Length: 5\r\nContent-Encoding: br\r\n"),
        (200, b"GET /health HTTP/1.1\r\nTransfer-Encoding: chunked\r\n"),
        (200, b"OPTIONS /health HTTP/1.1\r\nContent-Length: 50\r\nOrigin: http://a.example\r\n"
         b"Access-Control-Request-Method: GET\r\n"),
    ],
)  # fmt: skip
def test_an_early_answer_comes_at_once(launch: Launch, status: int, head: bytes) -> None:
    """It does not wait for the body, and its connection neither: others may have its place."""
    server = launch(
        api_key=("secret",),
        max_connections=2,
        cors_origins=["http://a.example"],
        header_timeout_s=60.0,  # the last ones wait until it is their turn
    )
    socks = [connect(server.port, 60.0) for _ in range(30)]
    waits = []
    for sock in socks:
        begun = time.monotonic()
        sock.sendall(head + HOST + b"\r\n")
        (answer,) = answers(read_all(sock))  # the server's half is closed behind it
        assert (answer.status, answer.headers["connection"]) == (status, "close")
        waits.append(time.monotonic() - begun)
    assert min(waits[18:]) < 1.0  # those beyond 16 extra places waited a second or more for one
    for sock in socks:
        sock.close()


def test_an_early_answer_is_read_by_who_is_still_sending(launch: Launch) -> None:
    server = launch(api_key=("secret",))
    with connect(server.port) as sock:
        sock.sendall(b"POST /v1/completions HTTP/1.1\r\nContent-Length: 3000000\r\n" + HOST + JSON)
        sock.sendall(b"\r\n")
        for _ in range(30):
            sock.sendall(b"x" * 100_000)
            time.sleep(0.002)
        (answer,) = answers(read_all(sock))
    assert answer.status == 401


@pytest.mark.parametrize(
    ("status", "request_"),
    [
        (400, b"POST %b HTTP/1.1\r\n" + HOST + b"no header\r\n\r\n"),
        (408, b"POST %b HTTP/1.1\r\nHo"),
        (413, b"POST %b HTTP/1.1\r\nContent-Length: 99999999\r\n" + HOST + JSON + b"\r\n"),
        (431, b"POST %b HTTP/1.1\r\n" + HOST + b"X-Big: " + b"a" * 100_000 + b"\r\n\r\n"),
        (400, b"POST %b HTTP/1.1\r\n" + HOST + JSON + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n"),
    ],
)
def test_a_refusal_has_the_shape_of_the_protocol(
    launch: Launch, status: int, request_: bytes
) -> None:
    """Whether the application answers, or the connection before it."""
    server = launch(header_timeout_s=1.0)
    for path, anthropic in (
        (b"/v1/messages", True), (b"/v1/messages/count_tokens?beta=true", True),
        (b"/v1/messagesx", False), (b"/v1/chat/completions", False),
    ):  # fmt: skip
        with connect(server.port) as sock:
            sock.sendall(request_.replace(b"%b", path))
            (answer,) = answers(read_all(sock))
        body = json.loads(answer.body)
        assert answer.status == status or path == b"/v1/messagesx" and answer.status == 404
        assert (body.get("type") == "error") == anthropic and body["error"]["message"]
        if anthropic:
            assert set(body) == {"type", "error", "request_id"}
            assert body["request_id"] == answer.headers["request-id"]
            assert body["request_id"] == answer.headers["x-request-id"]
            named = {408: "timeout_error", 413: "request_too_large"}
            assert body["error"]["type"] == named.get(status, "invalid_request_error")


def test_a_body_that_is_whole_keeps_the_connection(launch: Launch) -> None:
    server = launch(api_key=("secret",))
    post = b"POST /v1/completions HTTP/1.1\r\nContent-Length: 2\r\n" + HOST + JSON + b"\r\n{}"
    last = PING.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
    assert [answer.status for answer in ask(server.port, post + last)] == [401, 200]


def test_no_piece_of_an_answer_waits_for_an_acknowledgement(
    served: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clients put one off for 40 ms, which every answer and each event would then take longer."""
    options: list[int] = []
    made = Connection.connection_made

    def record(self: Connection, transport: Any) -> None:
        sock = transport.get_extra_info("socket")
        options.append(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        made(self, transport)

    monkeypatch.setattr(Connection, "connection_made", record)
    assert served.get("/health").status_code == 200
    assert options and all(options)


def test_tiny_segments_are_read_in_turns(served: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """64 of them at once, then one or more in 10 ms, however fast they come."""
    reads = 0
    received = Connection.data_received

    def count(self: Connection, data: bytes) -> None:
        nonlocal reads
        reads += 1
        received(self, data)

    monkeypatch.setattr(Connection, "data_received", count)
    begun = time.monotonic()
    with connect(served.port) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.sendall(PING[:-2] + b"Connection: close\r\nA: ")
        for _ in range(63):  # each is read before the next one is sent
            assert wait_for(lambda: reads > 0)
            before = reads
            sock.sendall(b"a")
            assert wait_for(lambda before=before: reads > before)  # type: ignore[misc]
        for _ in range(300):
            sock.sendall(b"a")
            time.sleep(0.001)
        sock.sendall(b"\r\n\r\n")
        (answer,) = answers(read_all(sock))
    assert answer.status == 200
    assert 64 <= reads <= 70 + (time.monotonic() - begun) / 0.01


@pytest.mark.parametrize("before", [0, 1])
@pytest.mark.parametrize("wait_s", [0.0, 0.2])
def test_a_fault_while_a_head_is_read(
    served: Running, monkeypatch: pytest.MonkeyPatch, before: int, wait_s: float
) -> None:
    """The request has no cycle then; those before it are answered, and the server goes on."""
    complete = HttpToolsProtocol.on_headers_complete

    def fail(self: Any) -> None:
        if self.url == b"/fault":
            raise ZeroDivisionError
        complete(self)

    monkeypatch.setattr(HttpToolsProtocol, "on_headers_complete", fail)
    with connect(served.port) as sock:
        for _ in range(before):
            sock.sendall(PING)
            time.sleep(wait_s)
        sock.sendall(PING.replace(b"/health", b"/fault"))
        found = answers(read_all(sock))
    assert [answer.status for answer in found] == [200] * before + [500]
    assert found[-1].error["message"].startswith("internal error")
    assert served.get("/health").status_code == 200


def test_a_fault_while_a_head_is_read_behind_a_running_request(
    served: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    complete = HttpToolsProtocol.on_headers_complete

    def fail(self: Any) -> None:
        if self.url == b"/fault":
            raise ZeroDivisionError
        complete(self)

    monkeypatch.setattr(HttpToolsProtocol, "on_headers_complete", fail)
    served.engine.delay_s = 0.02
    body = b'{"prompt": [5], "max_tokens": 5}'
    head = b"POST /v1/completions HTTP/1.1\r\n" + HOST + JSON
    post = head + b"Content-Length: %d\r\n\r\n" % len(body) + body
    found = ask(served.port, post + PING.replace(b"/health", b"/fault"))
    assert [answer.status for answer in found] == [200, 500]
    assert served.engine.aborted == []
