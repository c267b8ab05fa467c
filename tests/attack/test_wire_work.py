"""Requests whose bytes, lines, chunks and segments are many for what they carry.

Each attack runs on several connections at once, beside honest streams: the server refuses what is
beyond its bounds (``ds_cp/api/transport/wire.py``), and the streams do not notice.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from itertools import chain, repeat

import pytest

from benchmarks.attacks import warm
from ds_cp.api.transport import wire
from tests.helpers.front import Front, front, honest_streams
from tests.helpers.raw import answers, ask

pytestmark = pytest.mark.quiet

GET = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"
POST = (
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n"
)
KIB = 1024


def many(piece: bytes, times: int = 4 * KIB) -> bytes:
    return piece * times


# Name -> the start, what is repeated as fast as it is taken, and the status that ends it.
ATTACKS: dict[str, tuple[bytes, bytes, int]] = {
    "tiny chunks": (POST, many(b"1\r\n \r\n"), 400),
    "chunk extensions": (POST, many(b"1;" + b"a=b;" * 400 + b"c\r\n \r\n", 20), 400),
    "one endless extension": (POST + b"1;a=", many(b"b", 64 * KIB), 400),
    "zeros before a chunk size": (POST, many(b"0", 64 * KIB), 400),
    "endless trailers": (POST + b"0\r\n", many(b"a: b\r\n"), 431),
    "one endless trailer": (POST + b"0\r\na: ", many(b"b", 64 * KIB), 400),
    "endless header lines": (GET, many(b"a: b\r\n"), 431),
    "one endless header": (GET + b"a: ", many(b"b", 64 * KIB), 431),
    "one endless name": (GET, many(b"b", 64 * KIB), 431),
    "an endless target": (b"GET /", many(b"b", 64 * KIB), 431),
    "endless empty lines": (b"", many(b"\r\n", 32 * KIB), 431),
    "spaces in the request line": (b"GET ", many(b" ", 64 * KIB), 431),
    "spaces before a value": (GET + b"a:", many(b" ", 64 * KIB), 431),
}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    waits = {"header_timeout_s": 2.0, "body_timeout_s": 2.0}
    with front(tmp_path_factory.mktemp("wire"), engine={"delay_s": 0.02}, **waits) as running:
        yield running


async def send_all(port: int, start: bytes, piece: bytes, times: int) -> bytes:
    """Send until the server has closed, and return what it said."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    reading = asyncio.create_task(reader.read())
    try:
        for data in chain([start], repeat(piece, times)):
            writer.write(data)
            await writer.drain()
            await asyncio.sleep(0)
            if reading.done():
                break
        return await asyncio.wait_for(reading, 30)
    except OSError:
        reading.cancel()
        return b""
    finally:
        writer.close()


def attack(
    port: int, connections: int, seconds: float, start: bytes, piece: bytes, times: int = 100
) -> list[bytes]:
    """Attack on many connections, each followed by another, for some seconds. What was answered."""
    end = time.monotonic() + seconds
    said: list[bytes] = []

    async def one() -> None:
        said.append(await send_all(port, start, piece, times))
        while time.monotonic() < end:
            said.append(await send_all(port, start, piece, times))

    async def main() -> None:
        await asyncio.gather(*(one() for _ in range(connections)))

    asyncio.run(main())
    return said


@pytest.mark.parametrize("name", ATTACKS)
def test_what_carries_too_little_is_refused(served: Front, name: str) -> None:
    start, piece, status = ATTACKS[name]
    (said,) = attack(served.port, 1, 0.0, start, piece)
    (answer,) = answers(said)
    assert answer.status == status and answer.error["type"] == "invalid_request_error"


def test_all_of_it_beside_honest_streams(served: Front) -> None:
    warm(served.url)
    memory = served.memory
    with honest_streams(served.url, 20) as met:
        for start, piece, _ in ATTACKS.values():
            attack(served.port, 10, 0.2, start, piece)
    assert not met.lost and met.whole >= 20 and met.gap_s < met.bound_s, met
    assert served.memory - memory < 100 << 20
    assert served.log.read_text() == ""


def test_tiny_segments_beside_honest_streams(served: Front) -> None:
    """Bodies and heads that arrive byte by byte are not refused: segments are not the sender's
    choice alone. They are read in turns: tests/server/test_http_connections.py counts the reads."""
    body = POST.replace(b"Transfer-Encoding: chunked", b"Content-Length: 5000")
    with honest_streams(served.url, 20) as met:
        for start in (GET + b"a: ", body):
            attack(served.port, 30, 0.5, start, b" ", 1500)
    assert not met.lost and met.gap_s < met.bound_s, met


def test_honest_chunks_and_heads_pass(served: Front) -> None:
    """As many as the bounds say; more are refused."""
    body = b'{"prompt": [5], "max_tokens": 1}'

    def chunks(count: int, size: int) -> bytes:
        text = body.ljust(count * size)
        parts = (text[i * size : (i + 1) * size] for i in range(count))
        return POST + b"".join(b"%x\r\n%s\r\n" % (size, part) for part in parts) + b"0\r\n\r\n"

    def lines(count: int) -> bytes:
        return GET + b"a: b\r\n" * (count - 2) + b"Connection: close\r\n\r\n"

    for data, status in (
        (chunks(wire.FREE_CHUNKS - 1, 1), 200),  # and the last one, which is empty
        (chunks(wire.FREE_CHUNKS + 100, 1), 400),
        (chunks(20_000, wire.CHUNK_BYTES), 200),
        (lines(wire.MAX_LINES), 200),
        (lines(wire.MAX_LINES + 1), 431),
    ):
        data = data.replace(
            b"Host: localhost\r\n", b"Host: localhost\r\nConnection: close\r\n", data[:1] == b"P"
        )
        assert [answer.status for answer in ask(served.port, data)] == [status]


def test_pipelined_requests_are_bounded(served: Front) -> None:
    """Those behind the bound are not read: their client asks again on another connection."""
    found = ask(served.port, (GET + b"\r\n") * 1000)
    assert 1 <= len(found) <= wire.MAX_PIPELINED + 1
    assert all(answer.status == 200 for answer in found)
    few = (GET + b"\r\n") * (wire.MAX_PIPELINED - 1) + GET + b"Connection: close\r\n\r\n"
    assert len(ask(served.port, few)) == wire.MAX_PIPELINED
    with honest_streams(served.url, 20) as met:
        attack(served.port, 20, 1.0, many(GET + b"\r\n", 1000), b"", 0)
    assert not met.lost and met.gap_s < met.bound_s, met
