"""Answers that a connection writes by itself, before or instead of the application."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from http import HTTPStatus

from ds_cp.api.error_shapes import is_messages_path, messages_error
from ds_cp.api.errors import error_type


class RefusedError(Exception):
    """A request that the connection does not pass on: it answers ``status`` and closes."""

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.headers = dict(headers or {})

    def answer(self, target: bytes = b"") -> bytes:
        """The whole answer with an id of its own, in OpenAI's shape, or in Anthropic's where the
        request's ``target``, as far as it was read, is of that protocol."""
        request_id = uuid.uuid4().hex
        named = {"x-request-id": request_id}
        if is_messages_path(target.partition(b"?")[0].decode("latin-1")):
            content = messages_error(self.status, self.message, request_id)
            named["request-id"] = request_id
        else:
            about = {"message": self.message, "type": error_type(self.status)}
            content = {"error": about | {"param": None, "code": None}}
        body = json.dumps(content).encode()
        headers = {
            "content-type": "application/json",
            "content-length": str(len(body)),
            "connection": "close",
            **named,
            **self.headers,
        }
        lines = [f"HTTP/1.1 {self.status} {HTTPStatus(self.status).phrase}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        return "\r\n".join([*lines, "", ""]).encode() + body


def not_http(reason: str) -> RefusedError:
    """400: what was sent is not HTTP/1.1; ``reason`` says where."""
    return RefusedError(400, f"this is not valid HTTP/1.1: {reason}")
