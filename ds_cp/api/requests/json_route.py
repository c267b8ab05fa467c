"""Routes whose bodies are strict JSON, sent as JSON."""

from __future__ import annotations

import re
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope

from ds_cp.api.errors import ApiError, from_engine
from ds_cp.api.requests.bodies import Bodies
from ds_cp.api.requests.strict_model import Notes
from ds_cp.errors import DsCpError

WARNING_HEADER = "X-Ds-Cp-Warning"
_SHOWN_NAMES = 8  # names of one kind in the header
_SHOWN_CHARS = 40  # characters of each


class ModelRequest(Request):
    """A request whose body has been read: ``json()`` is the validated model."""

    def __init__(self, scope: Scope, receive: Receive, value: BaseModel | None) -> None:
        super().__init__(scope, receive)
        self._value = value

    async def body(self) -> bytes:
        """Whether there was a body: FastAPI asks for no more before it calls ``json``."""
        return b"" if self._value is None else b"{}"

    async def json(self) -> Any:
        """The model, which pydantic takes as it is."""
        return self._value


def strict_json_route(
    bodies: Bodies, refuse_unknown: bool, count_ignored: Callable[[int], None]
) -> type[APIRoute]:
    """A class of routes for POST bodies in JSON, which ``bodies`` reads.

    Another content type is a 415: JSON's own is the one that pages of other sites cannot send
    unasked. Fields of a valid body that were ignored because they are unknown are named in a header
    of the answer, also of a refusal, and counted unless it is one; ``refuse_unknown`` makes them a
    400.
    """

    class StrictJsonRoute(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            handler = super().get_route_handler()
            field = self.body_field
            kind: Any = None if field is None else field.field_info.annotation

            async def strict(request: Request) -> Response:
                content = request.headers.get("content-type", "").partition(";")[0].strip().lower()
                if request.method == "POST" and content != "application/json":
                    raise ApiError(
                        415, "send the body as JSON with the header Content-Type: application/json"
                    )
                if kind is None:
                    return await handler(request)
                notes = Notes(refuse_unknown)
                value = await bodies.model(request, kind, notes)
                ignored, text = notes.ignored, told(notes)
                headers = {WARNING_HEADER: text} if text else {}
                try:
                    response = await handler(ModelRequest(request.scope, request.receive, value))
                except (ApiError, DsCpError) as err:
                    refusal = from_engine(err) if isinstance(err, DsCpError) else err
                    if refusal is None:
                        raise
                    refusal.headers = {**(refusal.headers or {}), **headers}
                    raise refusal from err
                if ignored:
                    count_ignored(len(ignored))
                response.headers.update(headers)
                return response

            return strict

    return StrictJsonRoute


def told(notes: Notes) -> str:
    """The header's value for what a body's validation left out; "" for nothing."""
    parts = [warning(notes.ignored)] if notes.ignored else []
    if notes.skipped:
        parts.append("skipped, not served here: " + _some_of(notes.skipped))
    return "; ".join(parts)


def warning(names: list[str]) -> str:
    """The header's value for unknown fields that were ignored: printable ASCII, of bounded size."""
    return "ignored unknown fields: " + _some_of(names)


def _some_of(names: list[str]) -> str:
    shown = [re.sub(r"[^A-Za-z0-9_.-]", "?", name[:_SHOWN_CHARS]) for name in names[:_SHOWN_NAMES]]
    more = len(names) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")
