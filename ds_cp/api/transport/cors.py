"""Answers to web pages of other origins (the fetch standard's CORS protocol)."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from ds_cp.api.errors import ApiError
from ds_cp.api.requests.json_route import WARNING_HEADER
from ds_cp.api.transport.head import METHODS

# Response headers that a page's script may read, beside those that it always may.
EXPOSED = ("X-Request-Id", "Request-Id", "Retry-After", WARNING_HEADER)
_PREFLIGHT_S = 600  # seconds that a browser may remember a preflight's answer


class Cors(CORSMiddleware):
    """starlette's CORS layer with the settings of this server.

    Preflights of an origin in ``origins`` (or of any, with "*") are answered here, all of its other
    answers get the headers that let its page read them. An origin that is not listed is answered as
    without this layer, without such a header: the browser keeps the answer from its page. No
    cookies and no other credentials of the browser are allowed, only what the page's script sends.
    """

    def __init__(self, app: ASGIApp, origins: Sequence[str]) -> None:
        super().__init__(
            app,
            allow_origins=origins,
            allow_methods=METHODS,
            allow_headers=("*",),  # the headers of OpenAI's SDKs differ from version to version
            allow_private_network=True,
            expose_headers=EXPOSED,
            max_age=_PREFLIGHT_S,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            if not self.is_allowed_origin(headers.get("origin", "")):
                await self.simple_response(scope, receive, send, request_headers=headers)
                return
        await super().__call__(scope, receive, send)

    def preflight_response(self, request_headers: Headers) -> Response:
        """200 with what is allowed, or 400 in OpenAI's shape for a method that no route has."""
        answer = super().preflight_response(request_headers)
        if answer.status_code < 400:
            return answer
        asked = request_headers["access-control-request-method"][:40]
        refusal = ApiError(400, f"no route takes {asked}; see /openapi.json").response()
        refusal.headers["Vary"] = answer.headers["Vary"]
        return refusal
