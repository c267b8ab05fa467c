"""Counts the HTTP answers by route and status, and says of errors which request and field it was.

Clients often hide why they were refused. Neither a text of the client nor the message of the error,
which may quote one, is written: the field, the code and the request's id.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Collection, Iterable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ds_cp.api.transport.head import METHODS
from ds_cp.text import shorten

OTHER = "other"  # the route of a path that there is not, and the method of one that is unknown
BURST, PER_S = 20, 2.0  # lines at once, and a second after that
_FIELD = re.compile(r"[A-Za-z0-9_.\[\]-]*")


class AnswerLog:
    """A layer. ``paths`` are the routes', such as ``/v1/models/{id}``; ``count`` gets method, route
    and status of each answer; ``say``, if given, a line for each error but those of no route, at
    most ``PER_S`` a second: the next line says how many had none. The routes ``left_out``, which
    are asked every few seconds, are neither counted nor told."""

    def __init__(
        self,
        app: ASGIApp,
        paths: Iterable[str],
        count: Callable[[str, str, int], None],
        say: Callable[[str], None] | None = None,
        left_out: Collection[str] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.app = app
        self._count = count
        self._say = say
        self._clock = clock
        known = list(paths)
        self._plain = frozenset(path for path in known if "{" not in path)
        self._patterns = [(_pattern(path), path) for path in known if "{" in path]
        self._room, self._since = float(BURST), clock()
        self._more = 0  # that had no line since the last one
        self._left_out = frozenset(left_out)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def watched(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._answered(scope, message["status"])
            await send(message)

        await self.app(scope, receive, watched)

    def _answered(self, scope: Scope, status: int) -> None:
        method = scope["method"] if scope["method"] in METHODS else OTHER
        route = self._route(scope["path"])
        if route in self._left_out:
            return
        self._count(method, route, status)
        if self._say is not None and status >= 400 and route != OTHER:
            self._tell(self._say, scope, f"{status} for {method} {route}")

    def _tell(self, say: Callable[[str], None], scope: Scope, what: str) -> None:
        now = self._clock()
        self._room = min(BURST, self._room + PER_S * (now - self._since))
        self._since = now
        if self._room < 1:
            self._more += 1
            return
        self._room -= 1
        state = scope.get("state", {})
        field, code = (_FIELD.fullmatch(word or "") for word in state.get("refused", ("", "")))
        why = " ".join(shorten(found[0], 60) for found in (code, field) if found and found[0])
        more = f"; {self._more} more before it" if self._more else ""
        self._more = 0
        request_id = state.get("request_id", "")
        told = f": {why}" if why else ""
        say(f"{what}{told}; request {request_id}{more}")

    def _route(self, path: str) -> str:
        path = path.removesuffix("/") or "/"
        if path in self._plain:
            return path
        return next((name for known, name in self._patterns if known.fullmatch(path)), OTHER)


def _pattern(path: str) -> re.Pattern[str]:
    """Of the paths that a route with parameters has."""
    return re.compile(re.sub(r"\\\{[^}]*\\\}", "[^/]+", re.escape(path)))
