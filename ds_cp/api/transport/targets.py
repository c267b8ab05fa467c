"""Where a request is addressed to: the forms of its target, its host, the slash at its end.

RFC 9112 3.2 has four forms of target: a path, ``http://HOST/PATH``, ``*`` and, for CONNECT,
``HOST:PORT``. The layers and routes inside see a path that begins with a slash, and the host that
counts as ``Host``.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from urllib.parse import unquote

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Receive, Scope, Send

from ds_cp.api.errors import ApiError
from ds_cp.api.transport.methods import METHODS
from ds_cp.config import split_authority

_ABSOLUTE = re.compile(rb"([A-Za-z][A-Za-z0-9+.-]*)://([^/?#]*)([^?#]*)")


class Targets:
    """Refuses what is not addressed to this server, and brings the rest into one form.

    ``hosts``: the hosts, in their canonical spelling, that are answered; None for all. Any other
    is a 421, since a web page could make a browser come here under a name that it owns (DNS
    rebinding), and its scripts could then use the server as their own. The IP address that the
    connection came in on is answered too: no page can own it. What RFC 9112 says a server has to
    refuse is a 400: no Host in HTTP/1.1, several, one that is not valid, a target in no form.

    The authority of a target counts instead of Host (RFC 9112 3.2.2). One slash at the end of a
    path does not count.
    """

    def __init__(self, app: ASGIApp, hosts: Collection[str] | None) -> None:
        self.app = app
        self._hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            scope = self._addressed(scope)
        except ApiError as err:
            await err.response()(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _addressed(self, scope: Scope) -> Scope:
        """The scope with path and Host in their one form. Raises ``ApiError`` 400, 405 or 421."""
        scope = dict(scope)
        hosts = [value for name, value in scope["headers"] if name == b"host"]
        if len(hosts) > 1:
            raise ApiError(400, f"the request has {len(hosts)} Host headers; send one")
        if not hosts and scope.get("http_version", "1.1") == "1.1":
            raise ApiError(400, "HTTP/1.1 wants a Host header; send Host: NAME[:PORT]")
        authority = _whole(hosts[0]) if hosts else None
        raw: bytes = scope.get("raw_path") or scope["path"].encode("utf-8", "surrogateescape")
        absolute = _ABSOLUTE.fullmatch(raw)
        if absolute is not None:
            authority = _whole(absolute[2])
            if absolute[1].lower() != b"http":
                raise ApiError(421, "this server speaks plain HTTP; TLS belongs to a proxy")
            raw = absolute[3] or (b"*" if scope["method"] == "OPTIONS" else b"/")
            scope["raw_path"], scope["path"] = raw, unquote(raw.decode("latin-1"))
            MutableHeaders(scope=scope)["host"] = absolute[2].decode("latin-1")
        self._check_form(scope["method"], raw)
        if authority is not None:
            self._check_host(scope, authority)
        _without_last_slash(scope)
        return scope

    def _check_form(self, method: str, raw: bytes) -> None:
        if method == "CONNECT":
            allow = {"Allow": ", ".join(METHODS)}
            raise ApiError(405, "this server is no proxy: there is no CONNECT", headers=allow)
        if not raw.startswith(b"/") and not (raw == b"*" and method == "OPTIONS"):
            raise ApiError(400, "the request's target is not valid; send a path such as /v1/models")

    def _check_host(self, scope: Scope, host: str) -> None:
        if self._hosts is None or host in self._hosts:
            return
        here = split_authority(_bracketed((scope.get("server") or ("",))[0]))
        if here is not None and here[0] == host and _is_address(host):
            return
        raise ApiError(
            421,
            f"this server does not answer to the host {host[:100]}; add it to "
            "server.allowed_hosts in the config if it is this server's",
            code="host_not_allowed",
        )


def _whole(value: bytes) -> str:
    """The host of a Host header or an authority, in its canonical spelling; ``ApiError`` 400."""
    found = split_authority(value.decode("latin-1").strip(" \t"))
    if found is None:
        raise ApiError(400, "the request's host is not valid; send Host: NAME[:PORT]")
    return found[0]


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _is_address(host: str) -> bool:
    return ":" in host or host.replace(".", "").isdigit()


def _without_last_slash(scope: Scope) -> None:
    path: str = scope["path"]
    if path.endswith("/") and len(path) > 1:
        scope["path"] = path[:-1]
        raw = scope.get("raw_path")
        if raw and raw.endswith(b"/"):
            scope["raw_path"] = raw[:-1]
