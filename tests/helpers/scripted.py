"""A server that answers what a test tells it: for what the real one never says."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = Callable[["Handler", Any], None]


class Handler(BaseHTTPRequestHandler):
    """One request; an ``Answer`` writes with these."""

    protocol_version = "HTTP/1.1"
    server: Scripted

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def reply(self, value: Any, status: int = 200) -> None:
        """JSON, or bytes as they are."""
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def begin(self, kind: str = "text/event-stream") -> None:
        """A stream, to the end of the connection."""
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True

    def write(self, data: bytes) -> None:
        """Bytes of a stream."""
        self.wfile.write(data)
        self.wfile.flush()

    def event(self, value: Any) -> None:
        """One event: JSON, or a text as it is."""
        text = value if isinstance(value, str) else json.dumps(value)
        self.write(f"data: {text}\n\n".encode())

    def chat(self, *texts: str, reason: str = "stop", **chunk: Any) -> None:
        """A whole stream of a chat."""
        self.begin()
        self.event({"id": "chatcmpl-1", "choices": [{"delta": {"role": "assistant"}}]} | chunk)
        for text in texts:
            self.event({"id": "chatcmpl-1", "choices": [{"delta": {"content": text}}]})
        self.event({"id": "chatcmpl-1", "choices": [{"delta": {}, "finish_reason": reason}]})
        self.event("[DONE]")

    def do_GET(self) -> None:
        self._answer(None)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._answer(json.loads(body))

    def _answer(self, body: Any) -> None:
        path = self.path.partition("?")[0]
        with self.server.lock:
            self.server.seen.append((path, body, dict(self.headers)))
        answer = self.server.answers.get(path)
        try:
            if answer is None:
                self.reply({"error": {"message": "Not Found"}}, 404)
            else:
                answer(self, body)
        except OSError:  # the client has left
            self.close_connection = True


class Scripted(ThreadingHTTPServer):
    """``answers``: by path. ``seen``: (path, body, headers) of each request."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.lock = threading.Lock()
        self.seen: list[tuple[str, Any, dict[str, str]]] = []
        self.answers: dict[str, Answer] = {
            "/v1/models": lambda h, _: h.reply({"data": [{"id": "m-1", "max_model_len": 512}]})
        }

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def bodies(self, path: str) -> list[Any]:
        """The bodies of the requests for ``path``."""
        return [body for at, body, _ in self.seen if at == path]


@contextmanager
def scripted() -> Iterator[Scripted]:
    """A server until the end of the block."""
    server = Scripted()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join(30)
