"""Answers that a connection writes by itself, before or instead of the application."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from http import HTTPStatus

from ds_cp.api.errors import error_type


class RefusedError(Exception):
    """A request that the connection does not pass on: it answers ``status`` and closes."""

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.headers = dict(headers or {})

    def answer(self) -> bytes:
        """The whole answer in OpenAI's shape, with an id of its own."""
        detail = {
            "message": self.message,
            "type": error_type(self.status),
            "param": None,
            "code": None,
        }
        body = json.dumps({"error": detail}).encode()
        headers = {
            "content-type": "application/json",
            "content-length": str(len(body)),
            "connection": "close",
            "x-request-id": uuid.uuid4().hex,
            **self.headers,
        }
        lines = [f"HTTP/1.1 {self.status} {HTTPStatus(self.status).phrase}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        return "\r\n".join([*lines, "", ""]).encode() + body


def not_http(reason: str) -> RefusedError:
    """400: what was sent is not HTTP/1.1; ``reason`` says where."""
    return RefusedError(400, f"this is not valid HTTP/1.1: {reason}")
