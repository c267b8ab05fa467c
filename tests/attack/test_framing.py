"""Requests as bytes, and what a server owes to each of them.

The numbers are sections of RFC 9112 (HTTP/1.1), and of RFC 9110 where it says so. Whatever is not
HTTP/1.1 is a 400 in OpenAI's shape, and the connection ends: what follows on it is never answered.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import nullcontext, suppress

import pytest

from tests.helpers.front import Front, front
from tests.helpers.raw import answers, ask, connect, read_all

PING = b"GET /health HTTP/1.1\r\nHost: x\r\n"
BODY = b'{"prompt": [5], "max_tokens": 1}'
POST = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
LENGTH = b"Content-Length: %d\r\n" % len(BODY)
CHUNKED = b"Transfer-Encoding: chunked\r\n"
CHUNKS = b"8\r\n%s\r\n18\r\n%s\r\n" % (BODY[:8], BODY[8:])
END = b"0\r\n\r\n"
# A second request, hidden where a proxy in front would see a body or a header.
SMUGGLED = b"GET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n"

REFUSED: dict[str, bytes] = {
    "6.3 Content-Length beside Transfer-Encoding": POST
    + LENGTH + CHUNKED + b"\r\n" + END + SMUGGLED,
    "6.3 Transfer-Encoding beside Content-Length": POST
    + CHUNKED + LENGTH + b"\r\n" + END + SMUGGLED,
    "2.2 a bare LF ends the request line": b"GET /health HTTP/1.1\nHost: x\r\n\r\n",
    "2.2 a bare LF ends a header": b"GET /health HTTP/1.1\r\nHost: x\nA: b\r\n\r\n",
    "2.2 a bare LF ends the head": PING + b"\n" + SMUGGLED,
    "2.2 only bare LF": b"GET /health HTTP/1.1\nHost: x\n\n",
    "2.2 a bare CR in a value": PING + b"A: b\rTransfer-Encoding: chunked\r\n\r\n",
    "2.2 a bare CR ends the request line": b"GET /health HTTP/1.1\rHost: x\r\n\r\n",
    "2.2 white space before the first header": b"GET /health HTTP/1.1\r\n Host: x\r\n\r\n",
    "5.1 a space before the colon": POST + b"Content-Length : 32\r\n\r\n" + BODY,
    "5.1 a space before the colon of Transfer-Encoding": POST
    + b"Transfer-Encoding : chunked\r\n\r\n" + CHUNKS + END,
    "5.2 a folded line": PING + b"A: b\r\n c\r\n\r\n",
    "5.2 a folded Transfer-Encoding": POST + b"Transfer-Encoding:\r\n chunked\r\n\r\n" + END,
    "5 a line without a colon": PING + b"Content-Length\r\n\r\n",
    "5 an empty name": PING + b": b\r\n\r\n",
    "5 a name that is no token": PING + b"A(b): c\r\n\r\n",
    "9110 5.5 NUL in a value": PING + b"A: b\0c\r\n\r\n",
    "9110 5.5 a control character in a value": PING + b"A: b\x01c\r\n\r\n",
    "9110 5.5 NUL in a name": PING + b"A\0: b\r\n\r\n",
    "6.3 two Content-Length": POST + LENGTH + b"Content-Length: 5\r\n\r\n" + BODY,
    "6.3 the same Content-Length twice": POST + LENGTH + LENGTH + b"\r\n" + BODY,
    "6.3 a list as Content-Length": POST + b"Content-Length: 32, 32\r\n\r\n" + BODY,
    "6.2 a sign in Content-Length": POST + b"Content-Length: +32\r\n\r\n" + BODY,
    "6.2 a negative Content-Length": POST + b"Content-Length: -1\r\n\r\n" + BODY,
    "6.2 a hexadecimal Content-Length": POST + b"Content-Length: 0x20\r\n\r\n" + BODY,
    "6.2 two numbers as Content-Length": POST + b"Content-Length: 3 2\r\n\r\n" + BODY,
    "6.2 an empty Content-Length": POST + b"Content-Length: \r\n\r\n" + BODY,
    "6.2 a Content-Length above 2 ** 64": POST + b"Content-Length: 1%s\r\n\r\n" % (b"0" * 40),
    "6.3 chunked is not the last coding": POST
    + b"Transfer-Encoding: chunked, gzip\r\n\r\n" + CHUNKS + END,
    "6.3 no coding is chunked": POST + b"Transfer-Encoding: gzip\r\n\r\n" + BODY,
    "6.3 the coding identity": POST + b"Transfer-Encoding: identity\r\n\r\n" + BODY,
    "6.3 a coding that only ends in chunked": POST + b"Transfer-Encoding: xchunked\r\n\r\n" + END,
    "6.3 a name in quotes": POST + b'Transfer-Encoding: "chunked"\r\n\r\n' + END,
    "6.1 chunked twice": POST + b"Transfer-Encoding: chunked, chunked\r\n\r\n" + END,
    "6.1 Transfer-Encoding twice": POST + CHUNKED + CHUNKED + b"\r\n" + END,
    "6.1 an empty Transfer-Encoding": POST + b"Transfer-Encoding: \r\n\r\n" + END,
    "6.1 Transfer-Encoding in HTTP/1.0": POST.replace(b"1.1", b"1.0")
    + CHUNKED + b"\r\n" + CHUNKS + END,
    "7.1 a chunk size that is no number": POST + CHUNKED + b"\r\nx\r\nab\r\n" + END,
    "7.1 a chunk size with 0x": POST + CHUNKED + b"\r\n0x2\r\n{}\r\n" + END,
    "7.1 a negative chunk size": POST + CHUNKED + b"\r\n-2\r\n{}\r\n" + END,
    "7.1 an empty chunk size": POST + CHUNKED + b"\r\n\r\n{}\r\n" + END,
    "7.1 a chunk size above 2 ** 64": POST + CHUNKED + b"\r\n1" + b"0" * 16 + b"\r\n{}\r\n" + END,
    "7.1 a space after a chunk size": POST + CHUNKED + b"\r\n2 \r\n{}\r\n" + END,
    "7.1 a bare LF after a chunk size": POST + CHUNKED + b"\r\n2\n{}\r\n" + END,
    "7.1 a bare LF after a chunk": POST + CHUNKED + b"\r\n2\r\n{}\n" + END,
    "7.1 a chunk longer than its size": POST + CHUNKED + b"\r\n2\r\n{} \r\n" + END,
    "7.1 a bare LF in the last chunk": POST + CHUNKED + b"\r\n2\r\n{}\r\n0\n\n" + SMUGGLED,
    "7.1 a bare LF after the last chunk": POST + CHUNKED + b"\r\n2\r\n{}\r\n0\r\n\n" + SMUGGLED,
    "7.1.1 a bare LF in an extension": POST + CHUNKED + b"\r\n2;a\nb\r\n{}\r\n" + END,
    "7.1.2 a trailer that frames": POST + CHUNKED + b"\r\n0\r\nContent-Length: 3\r\n\r\n",
    "3.2 no Host": b"GET /health HTTP/1.1\r\n\r\n",
    "3.2 two Hosts": PING + b"Host: x\r\n\r\n",
    "3.2 two different Hosts": PING + b"Host: y\r\n\r\n",
    "3.2 a Host that is none": b"GET /health HTTP/1.1\r\nHost: a b\r\n\r\n",
    "3.2 a Host with a user": b"GET /health HTTP/1.1\r\nHost: a@b\r\n\r\n",
    "3.2 a Host with a path": b"GET /health HTTP/1.1\r\nHost: x/y\r\n\r\n",
    "3 a space in the target": b"GET /he alth HTTP/1.1\r\nHost: x\r\n\r\n",
    "3 NUL in the target": b"GET /\0 HTTP/1.1\r\nHost: x\r\n\r\n",
    "3 a byte above 127 in the target": b"GET /\xe9 HTTP/1.1\r\nHost: x\r\n\r\n",
    "3 a tab in the request line": b"GET\t/health\tHTTP/1.1\r\nHost: x\r\n\r\n",
    "3.2 a target that is no path": b"GET health HTTP/1.1\r\nHost: x\r\n\r\n",
    "3.2 a fragment in the target": b"GET /health#a HTTP/1.1\r\nHost: x\r\n\r\n",
    "3.2.2 a URL of another scheme": b"GET ftp://x/health HTTP/1.1\r\nHost: x\r\n\r\n",
    "3.2.2 a URL without a host": b"GET http:///health HTTP/1.1\r\nHost: x\r\n\r\n",
    "9110 4.2.4 a user in a URL": b"GET http://u:p@x/health HTTP/1.1\r\nHost: x\r\n\r\n",
    "3.2.3 an authority for GET": b"GET x:80 HTTP/1.1\r\nHost: x\r\n\r\n",
    "3.2.4 * for GET": b"GET * HTTP/1.1\r\nHost: x\r\n\r\n",
    "2.3 a version in lower case": b"GET /health http/1.1\r\nHost: x\r\n\r\n",
    "2.3 a version of another protocol": b"GET /health XTTP/1.1\r\nHost: x\r\n\r\n",
    "2.3 white space after the version": b"GET /health HTTP/1.1 \r\nHost: x\r\n\r\n",
    "2.3 HTTP/0.9": b"GET /health\r\n\r\n",
    "3 a space before the request line": b" " + PING + b"\r\n",
    "9113 3.4 the preface of HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "a hello of TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
}  # fmt: skip

# What a server takes, or refuses in another way: the bytes, and the status of each answer.
OTHERS: dict[str, tuple[bytes, list[int]]] = {
    "3.2.1 a path": (PING + b"\r\n", [200]),
    "3.2.1 a path with a query": (b"GET /health?a=b?c HTTP/1.1\r\nHost: x\r\n\r\n", [200]),
    "3.2.1 percent-encoding": (b"GET /%68ea%6Cth HTTP/1.1\r\nHost: x\r\n\r\n", [200]),
    "3.2.1 two slashes are no host": (b"GET //health HTTP/1.1\r\nHost: x\r\n\r\n", [404]),
    "3.2.2 a URL": (b"GET http://x:8000/health HTTP/1.1\r\nHost: x\r\n\r\n", [200]),
    "3.2.2 a URL in capitals": (b"GET HTTP://X/health HTTP/1.1\r\nHost: x\r\n\r\n", [200]),
    "3.2.2 a URL of https": (b"GET https://x/health?a HTTP/1.1\r\nHost: x\r\n\r\n", [200]),
    "3.2.2 a URL of IPv6": (b"GET http://[::1]:80/health HTTP/1.1\r\nHost: x\r\n\r\n", [200]),
    "3.2.2 a URL without a path": (b"GET http://x HTTP/1.1\r\nHost: x\r\n\r\n", [200]),
    "3.2.2 a URL for POST": (
        POST.replace(b"/v1", b"http://x/v1") + LENGTH + b"\r\n" + BODY, [200]),
    "3.2.4 OPTIONS *": (b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n", [204]),
    "3.2.4 OPTIONS of a URL without a path": (
        b"OPTIONS http://x HTTP/1.1\r\nHost: x\r\n\r\n", [204]),
    "3.2.3 CONNECT": (b"CONNECT x:80 HTTP/1.1\r\nHost: x:80\r\n\r\n" + SMUGGLED, [405]),
    "9110 9.1 a method nobody knows": (b"FOO /health HTTP/1.1\r\nHost: x\r\n\r\n", [501]),
    "9110 9.1 methods have their case": (b"get /health HTTP/1.1\r\nHost: x\r\n\r\n", [501]),
    "9110 9.1 a method not used here": (b"DELETE /v1/models HTTP/1.1\r\nHost: x\r\n\r\n", [405]),
    "6.1 a coding before chunked": (
        POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n" + CHUNKS + END, [501]),
    "6.1 CHUNKED": (POST + b"Transfer-Encoding: CHUNKED\r\n\r\n" + CHUNKS + END, [200]),
    "7.1.1 extensions are ignored": (
        POST + CHUNKED + b'\r\n20;a=b;c="d"\r\n' + BODY + b"\r\n0;e\r\n\r\n", [200]),
    "7.1.2 trailers are ignored": (
        POST + CHUNKED + b"\r\n" + CHUNKS + b"0\r\nX-Request-Id: no\r\n\r\n", [200]),
    "6.3 spaces around Content-Length": (
        POST + b"Content-Length: \t 32 \r\n\r\n" + BODY, [200]),
    "6.2 zeros before Content-Length": (
        POST + b"Content-Length: %s32\r\n\r\n" % (b"0" * 5000) + BODY, [200]),
    "5.5 a tab and bytes above 127 in a value": (PING + b"A: b\tc\xff\r\n\r\n", [200]),
    "2.2 empty lines before a request": (b"\r\n\r\n" + PING + b"\r\n", [200]),
    "2.5 HTTP/1.0 needs no Host": (b"GET /health HTTP/1.0\r\n\r\n", [200]),
    "2.3 a later HTTP/1": (b"GET /health HTTP/1.2\r\nHost: x\r\n\r\n", [200]),
    "9110 15.6.6 HTTP/2.0": (b"GET /health HTTP/2.0\r\nHost: x\r\n\r\n", [505]),
    "9.3 two requests on a connection": (PING + b"\r\n" + PING + b"\r\n", [200, 200]),
    "9.6 nothing follows Connection: close": (
        PING + b"Connection: close\r\n\r\n" + SMUGGLED, [200]),
    "9.6 nothing follows a refusal": (PING + b"\r\nA B\r\n\r\n" + SMUGGLED, [200, 400]),
    "a body of GET is no request": (
        PING + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(SMUGGLED) + SMUGGLED,
        [200]),
    "9110 7.8 the upgrade of a browser is ignored": (
        PING + b"Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n" + PING + b"\r\n", [200, 200]),
    "9110 7.8 the upgrade of Java's client is ignored": (
        POST + b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEA\r\n"
        + LENGTH + b"\r\n" + BODY + PING + b"\r\n", [200, 200]),
    "9110 7.8 an upgrade with chunks": (
        POST + b"Connection: upgrade, x\r\nUpgrade: h2c\r\n" + CHUNKED + b"\r\n" + CHUNKS + END
        + PING + b"\r\n", [200, 200]),
    "9110 10.1.1 Expect": (
        POST + b"Expect: 100-continue\r\n" + LENGTH + b"\r\n" + BODY, [100, 200]),
    "9110 10.1.1 HTTP/1.0 expects nothing": (
        POST.replace(b"1.1", b"1.0") + b"Expect: 100-continue\r\n" + LENGTH + b"\r\n" + BODY,
        [200]),
}  # fmt: skip


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    """A front whose idle connections end soon, so that every answer can be read to its end."""
    with front(
        tmp_path_factory.mktemp("framing"), header_timeout_s=2.0, allowed_hosts=["x"]
    ) as running:
        yield running


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_http_is_refused(served: Front, case: str) -> None:
    for data in (REFUSED[case], PING + b"\r\n" + REFUSED[case]):  # alone, and behind another
        found = ask(served.port, data)
        last = found[-1]
        assert (last.status, last.headers["connection"]) == (400, "close"), found
        assert last.error["type"] == "invalid_request_error"
        assert "HTTP/1.1" in last.error["message"]
        before = [answer.status for answer in found[:-1]]
        assert before == ([] if data is REFUSED[case] else [200])


@pytest.mark.parametrize("case", OTHERS)
def test_what_a_server_takes(served: Front, case: str) -> None:
    data, expected = OTHERS[case]
    ends = (
        "close" in case
        or "GET is no" in case
        or "CONNECT" in case
        or b"HTTP/1.0" in data
        or expected[-1] >= 500
    )
    ends = ends or "refusal" in case
    last = b"" if ends else b"GET /version HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    # A method is known to be unknown only where its line is read at once.
    for pieces in (1,) if expected[-1] == 501 else (1, 7):
        with connect(served.port) as sock:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            size = -(-len(data) // pieces)
            # A server that has ended the connection may have done so before the last piece.
            with suppress(ConnectionError) if ends else nullcontext():
                for start in range(0, len(data), size):
                    sock.sendall(data[start : start + size])
                sock.sendall(last)
            found = answers(read_all(sock))
        if not ends:  # the connection goes on
            assert json.loads(found.pop().body).keys() == {"version"}
        assert [answer.status for answer in found] == expected, (case, pieces, found)
        assert all(answer.error for answer in found if answer.status >= 400)
        assert not any(b"smuggled" in answer.body for answer in found)


@pytest.mark.parametrize("stream", [False, True])
def test_http_1_0_gets_no_chunks(served: Front, stream: bool) -> None:
    """6.1: HTTP/1.0 does not know them, so the end of the connection ends the answer."""
    body = json.dumps({"prompt": [5], "max_tokens": 3, "stream": stream}).encode()
    head = POST.replace(b"1.1", b"1.0") + b"Connection: keep-alive\r\n"
    (answer,) = ask(served.port, head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
    assert answer.status == 200 and answer.headers["connection"] == "close"
    assert "transfer-encoding" not in answer.headers
    if stream:
        events = answer.body.decode().split("\n\n")
        assert all(event.startswith("data: ") for event in events[:-1])
        assert events[-2:] == ["data: [DONE]", ""]
    else:
        assert json.loads(answer.body)["usage"]["completion_tokens"] == 3
