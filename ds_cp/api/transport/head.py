"""What a server owes to the head of a request beyond its grammar (RFC 9112, sections 2 to 6).

The parser checks lines, names, values and lengths. Here: the version, the four forms of a target,
Host, and which transfer codings are understood.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ds_cp.api.transport.refusal import RefusedError, not_http

METHODS = ("GET", "HEAD", "POST", "DELETE", "OPTIONS")  # of all routes together
EVERYTHING = b"*"  # the target of OPTIONS that means the server itself
_ABSOLUTE = re.compile(rb"([a-z][a-z0-9+.-]*)://([^/?#]*)([^#]*)", re.IGNORECASE)
_HOST = re.compile(rb"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._~!$&'()*+,;=%-]*)(:[0-9]{0,5})?")
_REQUEST_LINE = re.compile(rb"(?:\r\n)*[!#$%&'*+.^_`|~0-9A-Za-z-]+ [!-~]+ HTTP/1\.[0-9]\r\n")
_UPGRADES = {b"upgrade", b"http2-settings"}
_LENGTH_DIGITS = 19  # of a Content-Length, without zeros in front

Headers = list[tuple[bytes, bytes]]  # names in lower case


@dataclass(frozen=True)
class Head:
    """A request's head as the application is to see it.

    ``target`` is a path that begins with ``/``, with its query, or ``EVERYTHING``. ``headers`` has
    one Host, that of the target where the target names one (RFC 9112, 3.2.2), and Content-Length
    without zeros in front.
    """

    target: bytes
    headers: Headers


def check_head(method: bytes, version: str, target: bytes, headers: Headers) -> Head:
    """Raises ``RefusedError`` for what RFC 9112 asks a server to refuse."""
    if version.startswith("0."):
        raise not_http("it names no version")
    if not version.startswith("1."):
        raise RefusedError(505, f"HTTP/{version} is not spoken here; use HTTP/1.1")
    if method == b"CONNECT":
        raise RefusedError(
            405, "this server is no proxy for CONNECT", {"allow": ", ".join(METHODS)}
        )
    path, authority = _read_target(method, target)
    _check_codings(version, [value for name, value in headers if name == b"transfer-encoding"])
    hosts = [value for name, value in headers if name == b"host"]
    if len(hosts) > 1 or (not hosts and version != "1.0"):
        raise not_http(f"it has {len(hosts)} Host headers, not one")
    if authority is not None:
        headers = [(b"host", authority), *(pair for pair in headers if pair[0] != b"host")]
        hosts = [authority, *hosts]
    if not all(_HOST.fullmatch(host) for host in hosts):
        raise not_http("its Host is no host with an optional port")
    return Head(path, [(name, _plain(name, value)) for name, value in headers])


def is_unknown_method(data: bytes) -> bool:
    """Whether ``data`` begins with a sound request line: then only its method is unknown."""
    return _REQUEST_LINE.match(data) is not None


def without_upgrade(method: bytes, target: bytes, version: str, headers: Headers) -> bytes:
    """The same head without what asks for another protocol, which a server may ignore (RFC 9110,
    7.8)."""
    lines = [b"%s %s HTTP/%s" % (method, target, version.encode())]
    for name, value in headers:
        if name in _UPGRADES:
            continue
        if name == b"connection":
            words = [word.strip() for word in value.split(b",")]
            value = b", ".join(word for word in words if word.lower() not in _UPGRADES)
        lines.append(b"%s: %s" % (name, value))
    return b"\r\n".join([*lines, b"", b""])


def _read_target(method: bytes, target: bytes) -> tuple[bytes, bytes | None]:
    """The target in origin form, and the authority where it was in absolute form."""
    if target == EVERYTHING:
        if method == b"OPTIONS":
            return EVERYTHING, None
        raise not_http("the target * is for OPTIONS alone")
    if b"#" in target:
        raise not_http("its target has a fragment")
    if target.startswith(b"/"):
        return target, None
    absolute = _ABSOLUTE.fullmatch(target)
    if absolute is None:
        raise not_http("its target is neither a path nor a URL")
    scheme, authority, rest = absolute.groups()
    if scheme.lower() not in (b"http", b"https") or not authority or b"@" in authority:
        raise not_http("its target is a URL of another kind than http://HOST/PATH")
    if method == b"OPTIONS" and not rest:
        return EVERYTHING, authority
    return (rest if rest.startswith(b"/") else b"/" + rest), authority


def _plain(name: bytes, value: bytes) -> bytes:
    """The value of a header, with a Content-Length that ``int()`` takes at no cost."""
    if name != b"content-length":
        return value
    digits = value.strip(b" \t").lstrip(b"0") or b"0"
    if len(digits) > _LENGTH_DIGITS:
        raise not_http(f"its Content-Length has {len(digits)} digits")
    return digits


def _check_codings(version: str, values: Sequence[bytes]) -> None:
    codings = [word.strip().lower() for value in values for word in value.split(b",")]
    if not codings:
        return
    if version == "1.0" or codings[-1] != b"chunked":
        raise not_http("its Transfer-Encoding does not tell where the body ends")
    if len(codings) > 1:
        raise RefusedError(501, "of transfer codings only chunked is understood")
