"""Targets, Host and versions, as RFC 9112 asks of a server."""

from __future__ import annotations

import pytest

from ds_cp.api.transport.head import check_head, is_unknown_method, without_upgrade
from ds_cp.api.transport.refusal import RefusedError

HOST = [(b"host", b"x")]


@pytest.mark.parametrize(
    ("method", "target", "path", "host"),
    [
        (b"GET", b"/a?b", b"/a?b", b"x"),
        (b"GET", b"//a/b", b"//a/b", b"x"),
        (b"GET", b"/http://y/", b"/http://y/", b"x"),
        (b"GET", b"http://y/a?b", b"/a?b", b"y"),
        (b"GET", b"http://y:81", b"/", b"y:81"),
        (b"GET", b"http://y?b", b"/?b", b"y"),
        (b"GET", b"HTTPS://[::1]:81/a", b"/a", b"[::1]:81"),
        (b"GET", b"http://y//a", b"//a", b"y"),
        (b"OPTIONS", b"*", b"*", b"x"),
        (b"OPTIONS", b"http://y", b"*", b"y"),
        (b"OPTIONS", b"http://y/", b"/", b"y"),
    ],
)
def test_targets(method: bytes, target: bytes, path: bytes, host: bytes) -> None:
    """The host of a target takes the place of the header's (3.2.2)."""
    head = check_head(method, "1.1", target, [(b"a", b"b"), *HOST])
    assert head.target == path
    assert [value for name, value in head.headers if name == b"host"] == [host]
    assert (b"a", b"b") in head.headers


@pytest.mark.parametrize(
    ("host", "fits"),
    [
        (b"example.com", True),
        (b"example.com:8000", True),
        (b"127.0.0.1", True),
        (b"[::1]:80", True),
        (b"", True),
        (b"x:", True),
        (b"x:port", False),
        (b"x:123456", False),
        (b"a b", False),
        (b"a,b", True),  # a sub-delimiter may stand in a name (RFC 3986, 3.2.2)
        (b"a/b", False),
        (b"a@b", False),
        (b"[::1", False),
        (b"::1", False),
        (b"a\xff", False),
    ],
)
def test_hosts(host: bytes, fits: bool) -> None:
    if fits:
        check_head(b"GET", "1.1", b"/", [(b"host", host)])
        return
    with pytest.raises(RefusedError, match="Host"):
        check_head(b"GET", "1.1", b"/", [(b"host", host)])


@pytest.mark.parametrize(
    ("version", "headers", "status"),
    [
        ("1.0", [], 0),
        ("1.1", [], 400),
        ("1.1", HOST * 2, 400),
        ("1.9", HOST, 0),
        ("0.9", HOST, 400),
        ("2.0", HOST, 505),
        ("1.1", [*HOST, (b"transfer-encoding", b"Chunked")], 0),
        ("1.1", [*HOST, (b"transfer-encoding", b"gzip, chunked")], 501),
        ("1.1", [*HOST, (b"transfer-encoding", b"gzip")], 400),
        ("1.1", [*HOST, (b"transfer-encoding", b"chunked"), (b"transfer-encoding", b"x")], 400),
        ("1.0", [(b"transfer-encoding", b"chunked")], 400),
    ],
)
def test_versions_and_codings(
    version: str, headers: list[tuple[bytes, bytes]], status: int
) -> None:
    if not status:
        check_head(b"POST", version, b"/", headers)
        return
    with pytest.raises(RefusedError) as caught:
        check_head(b"POST", version, b"/", headers)
    assert caught.value.status == status


def test_a_head_without_its_upgrade() -> None:
    headers = [
        (b"host", b"x"),
        (b"connection", b"Upgrade, HTTP2-Settings, close"),
        (b"upgrade", b"h2c"),
        (b"http2-settings", b"AAEA"),
        (b"content-length", b"2"),
    ]
    assert without_upgrade(b"POST", b"/a", "1.1", headers) == (
        b"POST /a HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: 2\r\n\r\n"
    )


def test_unknown_methods_are_told_from_what_is_no_request() -> None:
    assert is_unknown_method(b"FOO /a HTTP/1.1\r\nHost")
    assert is_unknown_method(b"\r\nfoo * HTTP/1.0\r\n")
    for data in (b"FOO /a HTTP/1.1", b"FOO  /a HTTP/1.1\r\n", b"F(O /a HTTP/1.1\r\n", b"FOO\r\n"):
        assert not is_unknown_method(data)


@pytest.mark.parametrize(
    ("given", "seen"),
    [(b"14", b"14"), (b"0", b"0"), (b"000", b"0"), (b" 014\t", b"14"), (b"0" * 5000 + b"14", b"14"),
     (b"9" * 19, b"9" * 19), (b"1" + b"0" * 19, None), (b"1" * 5000, None)],
)  # fmt: skip
def test_a_content_length_is_a_number_that_fits(given: bytes, seen: bytes | None) -> None:
    """``int()`` refuses more than 4300 digits, zeros in front included."""
    headers = [*HOST, (b"content-length", given)]
    if seen is None:
        with pytest.raises(RefusedError, match="Content-Length"):
            check_head(b"POST", "1.1", b"/", headers)
        return
    found = check_head(b"POST", "1.1", b"/", headers).headers
    assert dict(found)[b"content-length"] == seen
