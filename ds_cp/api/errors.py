"""Every error answer in OpenAI's shape: ``{"error": {"message", "type", "param", "code"}}``; on the
paths of Anthropic's protocol in its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from ds_cp.api.error_shapes import is_messages_path, messages_error
from ds_cp.errors import (
    CapacityError,
    DsCpError,
    EngineDeadError,
    GrammarBusyError,
    LongWaitError,
    QueueFullError,
    RequestError,
    StoppingError,
)
from ds_cp.text import shorten

# Seconds that a client is asked to wait, whatever was full, but for places in the engine's queue.
RETRY_AFTER: Mapping[str, str] = {"Retry-After": "1"}
OVERFLOW = "context_length_exceeded"  # the code of what is longer than the model
MAX_MESSAGE_CHARS = 1000  # characters of a message
MAX_VALUE_CHARS = 60  # characters of a client's value in a message
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
    """An answer that is not 2xx; ``message`` is one line and safe to show to the client.

    What cannot be printed becomes a blank: a client's own name for a field may hold half a
    surrogate pair, which UTF-8 cannot encode.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status_code=status, detail=one_line(message), headers=headers)
        self.param = None if param is None else one_line(param)
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
        """The whole HTTP answer, in the shape of the path that it is sent to."""
        return _ErrorResponse(self)


class _ErrorResponse(JSONResponse):
    """It learns the path when it is sent: layers make it that know nothing of protocols."""

    def __init__(self, error: ApiError) -> None:
        super().__init__(error.body(), status_code=error.status_code, headers=error.headers)
        self._message, self._param = error.detail, error.param
        self._names = error.param, error.code

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope.setdefault("state", {})["refused"] = self._names  # for the log
        if is_messages_path(scope.get("path", "")):
            request_id = scope.get("state", {}).get("request_id")
            error = messages_error(self.status_code, self._message, request_id, self._param)
            self.body = self.render(error)
            self.headers["content-length"] = str(len(self.body))
            if request_id:
                self.headers["request-id"] = request_id
        await super().__call__(scope, receive, send)


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
    """500 with a fixed text; the cause is in the log."""
    return ApiError(500, INTERNAL_MESSAGE.format(request_id=request_id), code="internal_error")


def shutting_down() -> ApiError:
    """503, for a request that comes while the server stops, or has not finished by then."""
    return ApiError(503, "the server is shutting down", code="shutting_down")


def context_overflow(message: str, param: str) -> ApiError:
    """400, for what is longer than the model. The code is in the message as well: langchain-openai
    looks for it in the text of an error, where openai 3 shows the message alone."""
    return ApiError(400, f"{message} ({OVERFLOW})", param=param, code=OVERFLOW)


def not_ready(state: str) -> ApiError:
    """503, while the engine is starting, stopping or dead."""
    if state == "starting":
        return ApiError(
            503,
            "the engine is starting; try again in a moment (GET /health tells when it is ready)",
            code="engine_starting",
            headers=RETRY_AFTER,
        )
    if state == "stopping":
        return shutting_down()
    return ApiError(503, "the engine has stopped; restart the server", code="engine_dead")


def from_engine(err: DsCpError) -> ApiError | None:
    """The answer for a typed error of ds_cp, or None where the client must not see the cause."""
    message = one_line(str(err))
    if isinstance(err, CapacityError):
        need, have, largest = err.need, err.have, err.largest
        if not all(str(number) in message for number in (need, have, largest)):
            message += f" (tokens: need {need}, have {have}, largest possible {largest})"
        return ApiError(400, message, param=err.param, code="kv_capacity_exceeded")
    if isinstance(err, RequestError):
        return ApiError(400, message, param=err.param, code="invalid_value")
    if isinstance(err, GrammarBusyError):
        return ApiError(503, message, code="grammars_busy", headers=RETRY_AFTER)
    if isinstance(err, QueueFullError):
        code = "queue_wait_too_long" if isinstance(err, LongWaitError) else "queue_full"
        retry = {"Retry-After": str(err.retry_after_s)}
        return ApiError(429, message, code=code, headers=retry)
    if isinstance(err, StoppingError):
        return shutting_down()
    if isinstance(err, EngineDeadError):
        return ApiError(503, "the engine has stopped; restart the server", code="engine_dead")
    return None


def from_validation(errors: Sequence[Any]) -> ApiError:
    """One line for the first of pydantic's errors, naming the field."""
    first = errors[0]
    loc = list(first.get("loc", ()))
    if loc and loc[0] in ("body", "path", "query"):  # where FastAPI found it
        del loc[0]
    kind = first.get("type")
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, FieldError):
        param = path_of([*loc, *([cause.param] if cause.param else [])])
        message = str(cause)
        if _leaf(param) not in message:  # of a rule that many fields share
            message = f"{param}: {message}"
        return ApiError(400, message, param=param or None, code="invalid_value")
    if not loc:
        return ApiError(400, "the body must be a JSON object with the request's fields")
    param = path_of(loc)
    if kind == "missing":
        return ApiError(400, f"{param} is missing; it is required", param=param, code="missing")
    message = first.get("msg", "not valid").removeprefix("Value error, ")
    value = first.get("input")
    given = "" if isinstance(value, dict | list) else f", not {shown(value)}"
    return ApiError(400, f"{param}: {message}{given}", param=param, code="invalid_value")


def _leaf(param: str) -> str:
    """The last name of a path: ``messages[0].content[1]`` -> ``content``."""
    return param.rpartition(".")[2].partition("[")[0]


def path_of(parts: Sequence[str | int]) -> str:
    """``("messages", 0, "content")`` -> ``messages[0].content``. A part may be a path itself."""
    text = ""
    for part in parts:
        if isinstance(part, int):
            part = f"[{part}]"
        text += f".{part}" if text and not part.startswith("[") else part
    return text


def shown(value: object) -> str:
    """A client's value, short, for a message."""
    cut = value[: 2 * MAX_VALUE_CHARS] if isinstance(value, str | list) else value
    if isinstance(value, dict):
        cut = dict(islice(value.items(), MAX_VALUE_CHARS))
    try:
        return shorten(repr(cut), MAX_VALUE_CHARS)
    except RecursionError:  # nested just less deep than is read
        return f"of type {type(value).__name__}"


def one_line(message: str) -> str:
    """A message without line breaks or other control characters, at most 1,000 characters."""
    return shorten(message, MAX_MESSAGE_CHARS)
