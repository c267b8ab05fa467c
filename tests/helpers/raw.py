"""Requests as bytes over plain sockets."""

from __future__ import annotations

import json
import socket
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Answer:
    """One answer on the wire; names of headers in lower case."""

    version: str
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def error(self) -> dict[str, Any]:
        """The error in OpenAI's shape. Raises AssertionError for another shape."""
        assert self.headers["content-type"] == "application/json", self
        found = json.loads(self.body)["error"]
        assert set(found) == {"message", "type", "param", "code"} and found["message"], found
        assert self.headers["x-request-id"], self
        return dict(found)


def connect(port: int, timeout: float = 15.0) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=timeout)


def read_all(sock: socket.socket) -> bytes:
    """What comes until the server closes; also when it resets the connection."""
    parts = []
    try:
        while part := sock.recv(1 << 16):
            parts.append(part)
    except ConnectionError:
        pass
    return b"".join(parts)


def answers(raw: bytes, heads: int = 0) -> list[Answer]:
    """The answers on a connection, in order; the last ``heads`` of them have no body."""
    found = []
    while raw:
        top, _, raw = raw.partition(b"\r\n\r\n")
        lines = top.decode("latin-1").split("\r\n")
        version, status, _ = lines[0].split(" ", 2)
        headers = {name.lower(): value.strip() for name, _, value in
                   (line.partition(":") for line in lines[1:])}  # fmt: skip
        code = int(status)
        if code < 200 or code == 204 or heads:
            body = b""
        elif headers.get("transfer-encoding") == "chunked":
            body, raw = _unchunk(raw)
        else:
            size = int(headers.get("content-length", len(raw)))
            body, raw = raw[:size], raw[size:]
        found.append(Answer(version, code, headers, body))
    return found


def _unchunk(raw: bytes) -> tuple[bytes, bytes]:
    body = b""
    while True:
        line, _, raw = raw.partition(b"\r\n")
        size = int(line, 16)
        body, raw = body + raw[:size], raw[size + 2 :]
        if not size:
            return body, raw


def ask(port: int, data: bytes, heads: int = 0) -> list[Answer]:
    """Send ``data`` on a connection and read until the server closes it."""
    with connect(port) as sock:
        sock.sendall(data)
        return answers(read_all(sock), heads)
