"""What an error looks like in each protocol that is served."""

from __future__ import annotations

from typing import Any

MESSAGES_PATH = "/v1/messages"  # and what lies below it


def is_messages_path(path: str) -> bool:
    """Whether a path is of Anthropic's protocol."""
    return path == MESSAGES_PATH or path.startswith(MESSAGES_PATH + "/")


def messages_type(status: int) -> str:
    """Anthropic's ``type`` for an HTTP status."""
    named = {
        401: "authentication_error",
        403: "permission_error",
        404: "not_found_error",
        408: "timeout_error",
        413: "request_too_large",
        429: "rate_limit_error",
        503: "overloaded_error",
        504: "timeout_error",
    }
    return named.get(status, "api_error" if status >= 500 else "invalid_request_error")


def messages_error(
    status: int, message: str, request_id: str | None, param: str | None = None
) -> dict[str, Any]:
    """An error in Anthropic's shape, of which the message alone names the field ``param``. By the
    details of the one about ``thread`` its client knows to send whole conversations instead."""
    detail: dict[str, Any] = {"type": messages_type(status), "message": message}
    if param == "thread":
        detail["details"] = {"error_code": "thread_unsupported_request", "unsupported": [param]}
    return {"type": "error", "error": detail, "request_id": request_id}
