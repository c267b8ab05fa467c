"""Routes that read JSON as RFC 8259 has it, sent as JSON, or answer with what is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import Response

from ds_cp.api.errors import ApiError


class StrictJsonRequest(Request):
    """A request whose ``json()`` refuses NaN and Infinity, and never fails in an untyped way."""

    async def json(self) -> Any:
        """The parsed body. Raises ``ApiError`` 400; ``json.JSONDecodeError`` becomes one in the
        app.
        """
        body = await self.body()
        try:
            return json.loads(body.decode(), parse_constant=_refuse_constant)
        except json.JSONDecodeError:
            raise
        except UnicodeDecodeError as error:
            raise _invalid(f"not UTF-8 at byte {error.start}") from None
        except RecursionError:
            raise _invalid("nested too deeply") from None
        except ValueError:  # Python's own bound on the digits of an integer
            raise _invalid("a number has too many digits") from None


class StrictJsonRoute(APIRoute):
    """A route for POST bodies in JSON; another content type is 415 (a web page cannot forge it)."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's handler, given the strict request."""
        handler = super().get_route_handler()

        async def strict(request: Request) -> Response:
            kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
            if request.method == "POST" and kind != "application/json":
                raise ApiError(
                    415, "send the body as JSON with the header Content-Type: application/json"
                )
            return await handler(StrictJsonRequest(request.scope, request.receive))

        return strict


def _refuse_constant(name: str) -> Any:
    raise _invalid(f"{name} is not a JSON number")


def _invalid(reason: str) -> ApiError:
    return ApiError(400, f"the body is not valid JSON: {reason}", code="invalid_json")
