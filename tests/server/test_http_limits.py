"""Limits, keys, clients that leave or are slow, draining; at the level of sockets."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest

from ds_cp.api.transport import wire
from ds_cp.outputs import PromptProgress
from tests.server.conftest import PATIENCE_S, Running, wait_for

C = "/v1/completions"
Launch = Callable[..., Running]


def connect(server: Running) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE_S)


def request_bytes(body: Any, *extra: str, path: str = C) -> bytes:
    data = json.dumps(body).encode()
    head = [f"POST {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json", *extra]
    return "\r\n".join([*head, f"Content-Length: {len(data)}", "", ""]).encode() + data


def read_all(sock: socket.socket) -> bytes:
    data = b""
    while part := sock.recv(65536):
        data += part
    return data


def read_answer(sock: socket.socket) -> bytes:
    """One answer of /health on a connection that stays open."""
    data = b""
    while not data.endswith(b"}"):
        part = sock.recv(65536)
        assert part, data
        data += part
    return data


def body_of(raw: bytes) -> Any:
    return json.loads(raw.partition(b"\r\n\r\n")[2])


# -- clients that leave ------------------------------------------------------------------------


@pytest.mark.parametrize("first_delay_s", [0.0, 600.0], ids=["decoding", "prefill"])
@pytest.mark.parametrize("stream", [False, True])
def test_leaving_aborts(served: Running, stream: bool, first_delay_s: float) -> None:
    served.engine.delay_s = 0.5  # a minute for all tokens: it does not end by itself
    served.engine.first_delay_s = first_delay_s
    sock = connect(served)
    sock.sendall(request_bytes({"prompt": [[5], [6]], "max_tokens": 120, "stream": stream}))
    assert wait_for(lambda: len(served.engine.live) == 2)
    if stream and not first_delay_s:
        assert sock.recv(10)
    else:
        time.sleep(0.2)
    assert served.engine.aborted == []
    sock.close()
    assert wait_for(lambda: not served.engine.live)
    assert sorted(name[-2:] for name in served.engine.aborted) == ["-0", "-1"]
    assert served.get("/health").status_code == 200


def test_openai_client_closing_a_stream_aborts(served: Running) -> None:
    served.engine.delay_s = 0.02
    stream = served.client().chat.completions.create(
        model="fake-model", messages=[{"role": "user", "content": "hi"}], stream=True
    )
    next(iter(stream))
    stream.close()
    assert wait_for(lambda: len(served.engine.aborted) == 1 and not served.engine.live)


def test_many_drops(served: Running) -> None:
    served.engine.delay_s = 0.2  # none of them ends before it was seen
    for number in range(40):
        sock = connect(served)
        sock.sendall(request_bytes({"prompt": [5], "max_tokens": 120, "stream": number % 2 == 0}))
        if number % 3:
            assert wait_for(lambda: bool(served.engine.live))
        sock.close()
    assert wait_for(lambda: not served.engine.live)
    served.engine.delay_s = 0.0
    assert served.post(C, {"prompt": [5], "max_tokens": 2}).status_code == 200


def test_finished_requests_are_not_aborted(served: Running) -> None:
    for stream in (False, True):
        assert served.post(C, {"prompt": [5], "stream": stream}).status_code == 200
    assert served.engine.aborted == []


def test_client_that_does_not_read_is_given_up(launch: Launch) -> None:
    server = launch(write_timeout_s=0.3)
    server.engine.info = server.engine.info.__class__(
        **(server.engine.info.__dict__ | {"max_model_len": 10**6})
    )
    sock = connect(server)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    sock.sendall(
        request_bytes({"prompt": [5], "max_tokens": 47_000, "stream": True, "logprobs": 20})
    )
    assert wait_for(lambda: len(server.engine.aborted) == 1)
    assert not server.engine.live and len(server.engine.seen) == 1
    sock.close()


# -- what is read ------------------------------------------------------------------------------


def test_body_limit_by_content_length(launch: Launch) -> None:
    server = launch(max_body_bytes=10_000)
    reply = server.post(C, {"prompt": "x" * 20_000})
    assert reply.status_code == 413
    assert reply.json()["error"]["code"] == "request_too_large"
    assert "10000" in reply.json()["error"]["message"]
    assert server.post(C, {"prompt": "x" * 100}).status_code != 413
    sock = connect(server)  # only the head: answered without waiting for the body
    sock.sendall(
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999999\r\n"
        b"Expect: 100-continue\r\n\r\n"
    )
    assert b" 413 " in read_all(sock)


def test_body_limit_of_chunked_bodies(launch: Launch) -> None:
    server = launch(max_body_bytes=10_000)
    headers = {"Content-Type": "application/json"}
    # More than the server can have received in one go, or it may refuse it with the body whole.
    chunks = iter([b'{"prompt": "'] + [b"x" * 1000] * 600 + [b'"}'])
    reply = httpx.post(server.url + C, content=chunks, headers=headers, verify=False)
    assert reply.status_code == 413 and reply.headers["connection"] == "close"
    reply = httpx.post(
        server.url + C, content=iter([b'{"prompt"', b': "x"}']), headers=headers, verify=False
    )
    assert reply.status_code == 200


def test_endless_chunked_body_is_cut(launch: Launch) -> None:
    server = launch(max_body_bytes=10_000)
    sock = connect(server)
    sock.sendall(
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n"
    )
    end, sent = time.monotonic() + PATIENCE_S, 0
    with pytest.raises(OSError):
        while time.monotonic() < end:
            sent += sock.send(b"2710\r\n" + b"x" * 10_000 + b"\r\n")
        pytest.fail(f"still open after {sent} bytes")


def test_half_sent_body_is_a_408(launch: Launch) -> None:
    server = launch(body_timeout_s=0.4, header_timeout_s=600.0)
    sock = connect(server)
    sock.sendall(request_bytes({"prompt": "x" * 100})[:-20])
    raw = read_all(sock)
    assert b" 408 " in raw and body_of(raw)["error"]["code"] == "body_timeout"
    assert server.engine.seen == []


def test_dripping_body_is_cut(launch: Launch) -> None:
    server = launch(body_timeout_s=0.5)
    sock = connect(server)
    data = request_bytes({"prompt": "x" * 1000})
    sock.sendall(data[:200])
    with pytest.raises(OSError):
        for byte in data[200:500]:  # 6 s, less than a body may take without the setting
            sock.sendall(bytes([byte]))
            time.sleep(0.02)


@pytest.mark.parametrize(
    "start", [b"", b"POST /v1/compl", b"GET / HTTP/1.1\r\nHost: localhost\r\nA: b\r\n"]
)
def test_half_sent_head_is_closed(launch: Launch, start: bytes) -> None:
    server = launch(header_timeout_s=0.4)
    sock = connect(server)
    sock.sendall(start)
    begun = time.monotonic()
    raw = read_all(sock)
    assert time.monotonic() - begun < 8  # 10 s without the setting
    assert (b" 408 " in raw) == bool(start)


def test_half_sent_second_head_is_closed(launch: Launch) -> None:
    server = launch(header_timeout_s=0.4)
    sock = connect(server)
    sock.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert b" 200 " in read_answer(sock)
    time.sleep(0.6)  # an idle connection may live longer than a head may take
    sock.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert b" 200 " in read_answer(sock)
    sock.sendall(b"GET /hea")
    begun = time.monotonic()
    read_all(sock)
    assert time.monotonic() - begun < 8


def test_long_answers_outlive_the_head_timer(launch: Launch) -> None:
    server = launch(header_timeout_s=0.3)
    server.engine.delay_s = 0.1
    assert server.post(C, {"prompt": [5], "max_tokens": 10}).status_code == 200


def test_header_and_url_limits(served: Running) -> None:
    reply = served.get("/health", headers={"X-Big": "a" * 40_000})
    assert reply.status_code in (400, 431)
    assert reply.json()["error"]["type"] == "invalid_request_error"
    room = wire.MAX_HEAD_BYTES - 1000  # the same bound, in one read or many
    for size, status in ((room, 200), (room + 1000, 431), (room + 10_000, 431)):
        sock = connect(served)
        sock.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nX-Big: ")
        sock.sendall(b"a" * size + b"\r\n\r\n")
        assert b" %d " % status in read_all(sock)[:20]
    reply = served.get("/health", params={"q": "a" * 9000})
    assert reply.status_code == 414
    sock = connect(served)
    sock.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Big: " + b"a" * 2_000_000)
    raw = read_all(sock)  # it is told, since the server reads on for a while
    assert b" 431 " in raw and "bytes" in body_of(raw)["error"]["message"]


def test_what_is_no_http(served: Running) -> None:
    for junk in (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", b"HELLO\r\n\r\n"):
        sock = connect(served)
        sock.sendall(junk)
        raw = read_all(sock)
        assert raw.startswith(b"HTTP/1.1 400 Bad Request\r\n")
        assert body_of(raw)["error"]["type"] == "invalid_request_error"
    both = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    both += b"Content-Length: 4\r\nContent-Length: 5\r\n\r\n{}"
    sock = connect(served)
    sock.sendall(both)
    assert b" 400 " in read_all(sock)


# -- keys and ids ------------------------------------------------------------------------------


def test_api_keys(launch: Launch) -> None:
    server = launch(api_key=("first-key", "second-k\u00e9y"))
    paths = ["/v1/models", "/metrics", "/version", "/openapi.json", "/nothing", "/health/x"]
    for path in paths:
        reply = server.get(path)
        assert reply.status_code == 401, path
        assert reply.json()["error"]["code"] == "invalid_api_key"
        assert reply.headers["www-authenticate"] == "Bearer"
    for path in ("/health", "/health/"):
        assert server.get(path).status_code == 200
    for sent in ("first-ke", "first-key2", "FIRST-KEY"):
        with pytest.raises(openai.AuthenticationError):
            server.client(sent).models.list()
    for header in ("Bearer", "Bearer ,", "Basic first-key", "first-key"):
        assert server.get("/version", headers={"Authorization": header}).status_code == 401
    assert server.client("first-key").models.list().data
    second = "Bearer second-k\u00e9y".encode()
    assert server.get("/version", headers={b"Authorization": second}).status_code == 200
    body = {"prompt": [5]}
    assert server.post(C, body).status_code == 401
    assert server.engine.seen == []
    assert server.post(C, body, headers={"Authorization": "bearer first-key"}).status_code == 200


def test_request_ids(served: Running) -> None:
    given = {"X-Request-Id": "abc-1.2_3"}
    assert served.get("/health", headers=given).headers["x-request-id"] == "abc-1.2_3"
    made = set()
    for bad in ("a b", "x" * 65, "a;b", "<script>"):
        reply = served.get("/health", headers={"X-Request-Id": bad})
        made.add(reply.headers["x-request-id"])
    assert len(made) == 4 and all(len(name) == 32 and name.isalnum() for name in made)


# -- start and end -----------------------------------------------------------------------------


def test_drain_lets_requests_finish(launch: Launch) -> None:
    server = launch(drain_timeout_s=600.0)
    server.engine.steps_of_prompt = [PromptProgress(1, 0, 0, 0.0)]  # no first token yet
    replies: list[Any] = []

    def ask(stream: bool) -> None:
        replies.append(server.post(C, {"prompt": [5], "max_tokens": 20, "stream": stream}))

    threads = [threading.Thread(target=ask, args=(stream,)) for stream in (False, True)]
    for thread in threads:
        thread.start()
    assert wait_for(lambda: len(server.engine.live) == 2)
    server.stop()

    def refuses() -> bool:
        try:
            connect(server).close()
        except OSError:
            return True
        return False

    assert wait_for(refuses) and len(server.engine.live) == 2
    server.engine.steps_of_prompt.clear()
    for thread in threads:
        thread.join(PATIENCE_S)
    server.thread.join(PATIENCE_S)
    assert not server.thread.is_alive()
    assert [reply.status_code for reply in replies] == [200, 200]
    assert server.engine.aborted == []


def test_clients_hear_of_the_end_of_the_drain(launch: Launch) -> None:
    server = launch(drain_timeout_s=1.0)
    server.engine.delay_s = 1.0  # longer than the drain, by far
    replies: dict[bool, httpx.Response] = {}

    def ask(stream: bool) -> None:
        body = {"prompt": [5], "max_tokens": 120, "stream": stream}
        replies[stream] = server.post(C, body)

    threads = [threading.Thread(target=ask, args=(stream,)) for stream in (False, True)]
    for thread in threads:
        thread.start()
    assert wait_for(lambda: len(server.engine.live) == 2)
    server.stop()
    server.thread.join(PATIENCE_S)
    assert not server.thread.is_alive()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert replies[False].status_code == 503
    assert replies[False].json()["error"]["code"] == "shutting_down"
    assert replies[True].text.endswith("data: [DONE]\n\n")
    assert '"shutting_down"' in replies[True].text
    assert len(server.engine.aborted) == 2 and not server.engine.live
