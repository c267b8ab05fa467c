"""Clients that ask and do not read: their connections end, and the server ends in spite of them."""

from __future__ import annotations

import json
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from tests.helpers.front import Front, front, honest_streams
from tests.helpers.raw import answers, read_all

pytestmark = pytest.mark.quiet

C = "/v1/completions"
# Answers above what the kernel takes for a client that does not read.
ENGINE = {"max_model_len": 5_000}
LONG = {"prompt": [5], "max_tokens": 4_000, "logprobs": 5}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    with front(tmp_path_factory.mktemp("readers"), write_timeout_s=1.0, engine=ENGINE) as running:
        yield running


def deaf_client(
    served: Front, body: dict[str, object], *extra: str, room: int = 2048
) -> socket.socket:
    """A client that asks, and whose host has room for ``room`` bytes of the answer."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, room)
    sock.settimeout(20)
    sock.connect(("127.0.0.1", served.port))
    data = json.dumps(body).encode()
    head = [f"POST {C} HTTP/1.1", "Host: localhost", "Content-Type: application/json", *extra]
    sock.sendall("\r\n".join([*head, f"Content-Length: {len(data)}", "", ""]).encode() + data)
    return sock


def sockets(served: Front) -> int:
    """Open TCP sockets, without what template processes have."""
    return len(psutil.Process(served.process.pid).net_connections("tcp"))


def wait_until_closed(served: Front, before: int, seconds: float) -> None:
    begun = time.monotonic()
    while sockets(served) > before:
        assert time.monotonic() - begun < seconds, served.log.read_text()
        time.sleep(0.05)


def settled(served: Front) -> int:
    """TCP sockets once a connection has come and gone: libraries open theirs by then."""
    assert httpx.post(served.url + C, json={"prompt": [5], "max_tokens": 1}).status_code == 200
    time.sleep(0.2)
    return sockets(served)


def test_a_client_that_does_not_read_is_closed(served: Front) -> None:
    before, memory = settled(served), served.memory
    with honest_streams(served.url, 5) as met:
        deaf = [
            deaf_client(served, LONG | {"stream": stream}, *extra)
            for stream in (False, True)
            for extra in ((), ("Connection: close",))
        ]
        time.sleep(1.0)
    wait_until_closed(served, before, 30)
    assert served.memory - memory < 100 << 20
    for sock in deaf:
        sock.close()
    assert not met.lost and met.gap_s < met.bound_s, met
    lines = served.log.read_text().splitlines()
    assert 1 <= len(lines) <= 4 and all("did not read" in line for line in lines), lines


def tokens(body: str) -> list[str]:
    """The tokens of an answer, whole or in events, which may hold several each."""
    parts = [part.removeprefix("data: ") for part in body.split("\n\n") if part.strip()]
    choices = [json.loads(part)["choices"][0] for part in parts if part != "[DONE]"]
    return [token for choice in choices for token in choice["logprobs"]["tokens"]]


def test_a_client_that_reads_slowly_keeps_its_connection(served: Front) -> None:
    """It takes longer than the deadline altogether, and never stops for that long. The server's
    host asks for more only once a third of what it holds is taken, which takes longer too."""
    kinds = (False, True)  # of LONG's stream
    whole = [httpx.post(served.url + C, json=LONG | {"stream": s}, timeout=60) for s in kinds]
    log = served.log.read_text()
    raw = [b"", b""]
    socks = [deaf_client(served, LONG | {"stream": s}, "Connection: close") for s in kinds]
    for _ in range(35):
        for i, sock in enumerate(socks):
            part = sock.recv(2048)
            assert part, (kinds[i], len(raw[i]))
            raw[i] += part
        time.sleep(0.1)
    for i, sock in enumerate(socks):
        raw[i] += read_all(sock)
        sock.close()
        [answer] = answers(raw[i])
        assert len(raw[i]) > 400_000
        assert tokens(answer.body.decode()) == tokens(whole[i].text)
        assert len(tokens(whole[i].text)) == LONG["max_tokens"]
    assert raw[1].endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n") and served.log.read_text() == log


def test_they_do_not_hold_up_the_end(tmp_path: Path) -> None:
    """A drain does not wait for them as long as for others, and not at all in a hurry."""
    settings = {"drain_timeout_s": 120.0, "engine": ENGINE}
    (tmp_path / "hurried").mkdir()
    with front(tmp_path, **settings) as one, front(tmp_path / "hurried", **settings) as two:
        deaf = [deaf_client(it, LONG | {"stream": s}) for it in (one, two) for s in (False, True)]
        for sock in deaf:
            assert sock.recv(10)  # its answer has begun
        begun = time.monotonic()
        for served in (one, two, two):
            served.process.send_signal(signal.SIGTERM)
            time.sleep(0.3)
        # A client gets 5 s to read on once the server ends, or half a second in a hurry; then the
        # process has to end, on a machine that may be busy.
        for served, seconds in ((two, 10.0), (one, 20.0)):
            served.process.wait(30)
            assert time.monotonic() - begun < seconds
        for sock in deaf:
            sock.close()
