"""Routes whose bodies are strict JSON, sent as JSON."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import Response

from ds_cp.api.errors import ApiError
from ds_cp.text import MAX_NAME_CHARS, JsonError, parse_json


class StrictJsonRequest(Request):
    """A request whose ``json()`` reads with ``ds_cp.text.parse_json``, as config and batch do."""

    async def json(self) -> Any:
        """The parsed body. Raises ``ApiError`` 400, which names a key that is given twice."""
        body = await self.body()
        try:
            return parse_json(body.decode())
        except UnicodeDecodeError as err:
            raise _invalid(f"not UTF-8 text (byte {err.start})") from None
        except JsonError as err:
            raise _invalid(str(err), err.key) from None


class StrictJsonRoute(APIRoute):
    """A route for POST bodies in JSON. Another content type is a 415: JSON's own is the one that
    pages of other sites cannot send unasked."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's handler, over a ``StrictJsonRequest``; ``ApiError`` 415 for other types."""
        handler = super().get_route_handler()

        async def strict(request: Request) -> Response:
            kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
            if request.method == "POST" and kind != "application/json":
                raise ApiError(
                    415, "send the body as JSON with the header Content-Type: application/json"
                )
            return await handler(StrictJsonRequest(request.scope, request.receive))

        return strict


def _invalid(reason: str, key: str | None = None) -> ApiError:
    param = None if key is None else key[:MAX_NAME_CHARS]
    return ApiError(400, f"the body is {reason}", param=param, code="invalid_json")
