"""Which hosts a request may be for."""

from __future__ import annotations

from collections.abc import Collection

from starlette.types import ASGIApp, Receive, Scope, Send

from ds_cp.api.errors import ApiError
from ds_cp.config import canonical_host, split_authority


class Hosts:
    """Answers 421 to requests for other hosts than ``hosts``, which are in their canonical
    spelling; None answers all.

    A web page can make a browser come here under a name that it owns (DNS rebinding); to the
    browser its scripts are then of this server. The name is in Host, which the page cannot choose.
    The IP address that the connection came in on is answered too: no page can own it. Ports are not
    compared, since proxies and tunnels change them.

    A request without Host, which only HTTP/1.0 may send, comes from no browser and is answered. How
    many there are and how they are written is the connection's to check (``check_head``); it also
    puts the authority of a target in absolute form into Host.
    """

    def __init__(self, app: ASGIApp, hosts: Collection[str] | None) -> None:
        self.app = app
        self._hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        error = self._refusal(scope) if scope["type"] == "http" else None
        if error is not None:
            await error.response()(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    def _refusal(self, scope: Scope) -> ApiError | None:
        if self._hosts is None:
            return None
        for name, value in scope["headers"]:
            if name != b"host":
                continue
            given = value.decode("latin-1")
            found = split_authority(given.strip(" \t"))
            host = found[0] if found else None
            if host is None or (host not in self._hosts and host != _address_here(scope)):
                return ApiError(
                    421,
                    f"this server does not answer to the host {given[:100]!r}; if that is its "
                    "name, add it to server.allowed_hosts in the config",
                    code="host_not_allowed",
                )
        return None


def _address_here(scope: Scope) -> str | None:
    """The IP address of this end of the connection, in its canonical spelling."""
    host: str = (scope.get("server") or ("",))[0]
    if ":" not in host and not host.replace(".", "").isdigit():
        return None  # a name, or the path of a socket
    return canonical_host(host)
