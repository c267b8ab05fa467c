"""What every route has without saying so: HEAD beside GET (RFC 9110 9.3.2), OPTIONS (9.3.7), and a
slash at its end that does not count."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from fastapi.routing import APIRoute
from starlette.responses import Response
from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ds_cp.api.transport.head import METHODS


class Routing:
    """Takes one slash from the end of a path, answers HEAD as GET without the body, and OPTIONS
    with the methods of the path in ``Allow``. ``scope["state"]["head"]`` tells a route whose answer
    has no end that its body is not wanted.

    A redirect to the path without the slash would name a scheme and a host, which behind a proxy
    are not the client's. It is meant to be outside the check of the API key: browsers ask by
    OPTIONS, without a key, before they send a request with one. That answer has no header that
    would allow another origin anything.
    """

    def __init__(self, app: ASGIApp, routes: Sequence[BaseRoute]) -> None:
        self.app = app
        self._routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        scope = _without_last_slash(scope)
        if scope["method"] == "HEAD":
            scope.setdefault("state", {})["head"] = True
            await self.app({**scope, "method": "GET"}, receive, _without_body(send))
            return
        if scope["method"] == "OPTIONS":
            allowed = allowed_methods(self._routes, scope["path"])
            if allowed:
                allow = ", ".join(sorted({*allowed, "OPTIONS"}))
                await Response(headers={"Allow": allow})(scope, receive, send)
                return
        await self.app(scope, receive, send)


def flat(routes: Iterable[BaseRoute]) -> Iterator[APIRoute]:
    """The routes, those of routers that are included in place of these."""
    for route in routes:
        if isinstance(route, APIRoute):
            yield route
        elif (inner := getattr(route, "original_router", None)) is not None:
            yield from flat(inner.routes)


def allowed_methods(routes: Sequence[BaseRoute], path: str) -> tuple[str, ...]:
    """The methods that ``path`` has, sorted, with HEAD wherever GET is and without OPTIONS; empty
    when there is no such path."""

    def has(method: str) -> bool:
        scope: Scope = {
            "type": "http", "method": method, "path": path, "root_path": "", "headers": [],
        }  # fmt: skip
        return any(route.matches(scope)[0] is Match.FULL for route in routes)

    found = {method for method in METHODS if has(method)}
    return tuple(sorted(found | ({"HEAD"} if "GET" in found else set())))


def _without_last_slash(scope: Scope) -> Scope:
    path: str = scope["path"]
    if not path.endswith("/") or path == "/":
        return scope
    raw: bytes = scope.get("raw_path") or b""
    return {**scope, "path": path[:-1], "raw_path": raw[:-1] if raw.endswith(b"/") else raw}


def _without_body(send: Send) -> Send:
    async def bare(message: Message) -> None:
        if message["type"] == "http.response.body":
            message = {**message, "body": b""}
        await send(message)

    return bare
