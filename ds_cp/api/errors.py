"""Every error answer in OpenAI's shape: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from ds_cp.errors import CapacityError, DsCpError, EngineDeadError, QueueFullError, RequestError

RETRY_AFTER_S = 1
INTERNAL_MESSAGE = "internal error; the server's log has the details under request id {request_id}"


class ErrorDetail(BaseModel):
    """What went wrong. ``param`` names the field at fault, ``code`` is for programs."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """The body of every answer that is not 2xx."""

    error: ErrorDetail


class ApiError(HTTPException):
    """An answer that is not 2xx; ``message`` is one line and safe to show to the client."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status_code=status, detail=message, headers=headers)
        self.param = param
        self.code = code

    def body(self) -> dict[str, Any]:
        """The JSON body, also used as the data of an error event in a stream."""
        return {
            "error": {
                "message": self.detail,
                "type": error_type(self.status_code),
                "param": self.param,
                "code": self.code,
            }
        }

    def response(self) -> JSONResponse:
        """The whole HTTP answer."""
        return JSONResponse(self.body(), status_code=self.status_code, headers=self.headers)


class FieldError(ValueError):
    """Raised by validators; ``param`` is the field below the place where the validator sits."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


def error_type(status: int) -> str:
    """OpenAI's ``type`` for an HTTP status."""
    named = {
        401: "authentication_error",
        403: "permission_error",
        404: "not_found_error",
        429: "rate_limit_error",
        503: "service_unavailable_error",
    }
    return named.get(status, "server_error" if status >= 500 else "invalid_request_error")


def internal_error(request_id: str) -> ApiError:
    """A fixed text: the reason stays in the log."""
    return ApiError(500, INTERNAL_MESSAGE.format(request_id=request_id), code="internal_error")


def shutting_down() -> ApiError:
    """The answer to a request that outlives the drain."""
    return ApiError(503, "the server is shutting down", code="shutting_down")


def not_ready(state: str) -> ApiError:
    """The answer while the engine is starting or dead."""
    if state == "starting":
        return ApiError(
            503,
            "the engine is starting; try again in a moment (GET /health tells when it is ready)",
            code="engine_starting",
            headers={"Retry-After": "2"},
        )
    return ApiError(503, "the engine has stopped; restart the server", code="engine_dead")


def from_engine(error: DsCpError) -> ApiError | None:
    """The answer for a typed error of ours, or None when it is not the client's business."""
    message = one_line(str(error))
    if isinstance(error, CapacityError):
        need, have, largest = error.need, error.have, error.largest
        if not all(str(number) in message for number in (need, have, largest)):
            message += f" (tokens: need {need}, have {have}, largest possible {largest})"
        return ApiError(400, message, param=error.param, code="kv_capacity_exceeded")
    if isinstance(error, RequestError):
        return ApiError(400, message, param=error.param, code="invalid_value")
    if isinstance(error, QueueFullError):
        retry = {"Retry-After": str(RETRY_AFTER_S)}
        return ApiError(429, message, code="queue_full", headers=retry)
    if isinstance(error, EngineDeadError):
        return ApiError(503, "the engine has stopped; restart the server", code="engine_dead")
    return None


def from_validation(errors: Sequence[Any]) -> ApiError:
    """One line for the first of pydantic's errors, naming the field."""
    first = errors[0]
    loc = [part for part in first.get("loc", ()) if part not in ("body", "path")]
    kind = first.get("type")
    if kind == "json_invalid":
        reason = first.get("ctx", {}).get("error", "not valid JSON")
        at = f" at character {loc[0]}" if loc else ""
        return ApiError(400, f"the body is not valid JSON: {reason}{at}", code="invalid_json")
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, FieldError):
        param = path_of([*loc, *([cause.param] if cause.param else [])])
        return ApiError(400, one_line(str(cause)), param=param or None, code="invalid_value")
    if not loc:
        return ApiError(400, "the body must be a JSON object with the request's fields")
    param = path_of(loc)
    if kind == "missing":
        return ApiError(400, f"{param} is missing; it is required", param=param, code="missing")
    message = first.get("msg", "not valid").removeprefix("Value error, ")
    value = first.get("input")
    shown = "" if isinstance(value, dict | list) else f", not {shorten(value)}"
    return ApiError(400, one_line(f"{param}: {message}{shown}"), param=param, code="invalid_value")


def path_of(parts: Sequence[str | int]) -> str:
    """``("messages", 0, "content")`` -> ``messages[0].content``."""
    text = ""
    for part in parts:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def shorten(value: object, limit: int = 60) -> str:
    """A short printable form of a client's value."""
    text = repr(value if not isinstance(value, str) else value[: 2 * limit])
    return text if len(text) <= limit else text[: limit - 3] + "..."


def one_line(text: str) -> str:
    """Control characters and line breaks to single blanks; at most 1,000 characters."""
    return re.sub(r"[\s\x00-\x1f\x7f-\x9f]+", " ", text).strip()[:1000]
