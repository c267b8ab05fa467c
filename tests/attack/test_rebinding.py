"""A web page makes a browser come to the server under a name that the page's owner has (DNS
rebinding): to the browser, its scripts are then of the server's own origin."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

from tests.helpers.front import front

OTHERS = (
    "evil.example", "evil.example:{port}", "EVIL.example.", "localhost.evil.example",
    "127.0.0.1.evil.example:{port}", "x.localhost", "0.0.0.0:{port}", "192.168.1.5:{port}",
    "[::2]:{port}", "127.0.0.1@evil.example", "evil.example:80@127.0.0.1", "", "127.0.0.1,evil",
)  # fmt: skip
OWN = (
    "localhost", "localhost:{port}", "LOCALHOST.:{port}", "127.0.0.1:{port}", "[::1]:{port}",
    "127.0.0.1:1", "[0:0:0:0:0:0:0:1]", "gpu1.example",
)  # fmt: skip
# What such a page would ask: the model's answers, the load of others, where KV lies.
REQUESTS: tuple[tuple[str, str, Any], ...] = (
    ("POST", "/v1/completions", {"prompt": "hello", "max_tokens": 2}),
    ("POST", "/v1/completions/", {"prompt": "hello", "max_tokens": 2, "stream": True}),
    ("POST", "/tokenize", {"prompt": "hello"}),
    ("GET", "/v1/models", None),
    ("GET", "/metrics", None),
    ("GET", "/", None),
    ("GET", "/state", None),
    ("GET", "/state?once=1", None),
    ("GET", "/openapi.json", None),
    ("GET", "/health", None),
    ("HEAD", "/health", None),
    ("OPTIONS", "/v1/models", None),
    ("GET", "/nothing", None),
    ("POST", "/ranks/1/drain", None),
)


def ask(
    port: int, method: str, target: str, host: str | None, body: Any = None, *more: str
) -> tuple[int, bytes]:
    """The status and the body of an answer. ``host`` None: HTTP/1.0 without Host."""
    data = b"" if body is None else json.dumps(body).encode()
    lines = [f"{method} {target} HTTP/1.{0 if host is None else 1}", "Connection: close", *more]
    lines += [] if host is None else [f"Host: {host.format(port=port)}"]
    lines += [f"Content-Length: {len(data)}", "Content-Type: application/json", "", ""]
    with socket.create_connection(("127.0.0.1", port), timeout=20) as sock:
        sock.sendall("\r\n".join(lines).encode() + data)
        answer = b"".join(iter(lambda: sock.recv(65536), b""))
    head, _, rest = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), rest


def test_without_a_key_only_the_servers_own_names_are_answered(tmp_path: Path) -> None:
    with front(tmp_path, allowed_hosts=["gpu1.example"]) as attacked:
        port = attacked.port
        for host in OTHERS:
            refused = 400 if "@" in host else 421
            for method, path, body in REQUESTS:
                origin = f"Origin: http://{host.format(port=port)}"
                status, text = ask(port, method, path, host, body, origin)
                assert status == refused, (host, method, path, status)
                if status == 421 and method != "HEAD":
                    error = json.loads(text)["error"]
                    assert error["code"] == "host_not_allowed"
                    assert "server.allowed_hosts" in error["message"]
        # The authority of a target counts, and one Host does not hide another.
        for target in ("http://evil.example/v1/models", f"http://evil.example:{port}/health"):
            assert ask(port, "GET", target, "127.0.0.1")[0] == 421
        assert ask(port, "GET", "http://localhost/health", "evil.example")[0] == 200
        assert ask(port, "GET", "/health", "127.0.0.1", None, "Host: evil.example")[0] == 400
        assert ask(port, "GET", "/health", "evil.example", None, "Host: 127.0.0.1")[0] == 400
        assert b'"drained"' not in ask(port, "GET", "/ranks", "localhost")[1]
        for host in (*OWN, None):
            for method, path, body in REQUESTS[:6]:
                assert ask(port, method, path, host, body)[0] == 200, (host, path)
        # A page of another port, another scheme or in a sandbox is of another origin.
        own = f"127.0.0.1:{port}"
        for origin in ("http://evil.example", "null", f"https://{own}", "http://127.0.0.1", ""):
            for path in ("/ranks/1/drain", "/ranks/1/reopen", "/rebalance"):
                assert ask(port, "POST", path, own, None, f"Origin: {origin}")[0] == 403
        assert ask(port, "POST", "/rebalance", own, None, f"Origin: http://{own}")[0] == 200
        assert b"drain" not in ask(port, "GET", "/ranks", own)[1]
