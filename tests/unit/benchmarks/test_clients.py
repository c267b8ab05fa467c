"""The recording proxy of the clients, their page, and what a client's script reports."""

from __future__ import annotations

import http.server
import json
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.clients.proxy import Proxy
from benchmarks.clients.report import BEGIN, END, page, write
from benchmarks.clients.run import told

EVENTS = [b'data: {"n": %d}\n\n' % n for n in range(9)]


class Upstream(http.server.BaseHTTPRequestHandler):
    """Answers with what it was sent; with a stream of nine events where that is asked."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        if b"stream" in body:
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for event in EVENTS:
                self.wfile.write(b"%x\r\n%s\r\n" % (len(event), event))
            self.wfile.write(b"0\r\n\r\n")
            return
        answer = json.dumps({"path": self.path, "body": json.loads(body)}).encode()
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Upstream)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    with Proxy(f"http://127.0.0.1:{server.server_address[1]}") as running:
        yield running
    server.shutdown()
    server.server_close()


def post(url: str, body: Any) -> bytes:
    headers = {"Content-Type": "application/json", "X-Own": "yes"}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=10) as answer:
        found: bytes = answer.read()
    return found


def test_a_request_goes_through_and_is_recorded(proxy: Proxy) -> None:
    answer = json.loads(post(f"{proxy.url}/t/a/none/v1/chat", {"model": "m", "n": 1}))
    assert answer == {"path": "/v1/chat", "body": {"model": "m", "n": 1}}
    [sent] = proxy.sent
    assert told(sent) | {"agent": ""} == {
        "method": "POST",
        "path": "/v1/chat",
        "fields": ["model", "n"],
        "headers": ["x-own"],
        "agent": "",
    }


@pytest.mark.parametrize("status", [429, 503])
def test_the_first_request_of_a_label_is_refused(proxy: Proxy, status: int) -> None:
    url = f"{proxy.url}/t/b/{status}x1/v1/chat"
    with pytest.raises(urllib.error.HTTPError) as refused:
        post(url, {})
    assert refused.value.code == status and int(refused.value.headers["Retry-After"]) >= 1
    assert set(json.load(refused.value)["error"]) == {"message", "type", "param", "code"}
    post(url, {})
    with urllib.request.urlopen(f"{proxy.url}/t/b/count", timeout=10) as answer:
        assert json.load(answer) == {"count": 2}
    proxy.forget()
    with pytest.raises(urllib.error.HTTPError):
        post(url, {})


def test_a_stream_ends_with_an_error_event(proxy: Proxy) -> None:
    assert post(f"{proxy.url}/t/c/none/v1/x", {"stream": True}) == b"".join(EVENTS)
    lines = post(f"{proxy.url}/t/c/events3/v1/x", {"stream": True}).splitlines()
    events = [line[6:] for line in lines if line.startswith(b"data: ")]
    assert [json.loads(event) for event in events[:3]] == [{"n": 0}, {"n": 1}, {"n": 2}]
    assert len(events) == 5 and events[-1] == b"[DONE]"
    assert json.loads(events[-2])["error"]["code"] == "engine_dead"
    lines = post(f"{proxy.url}/t/c/events3/v1/messages?x=1", {"stream": True}).splitlines()
    assert lines[-3] == b"event: error" and len(lines) == 9
    assert json.loads(lines[-2][6:])["error"]["type"] == "overloaded_error"


def result(name: str, *rows: tuple[str, str]) -> dict[str, Any]:
    listed = [{"check": check, "result": found, "detail": "a | b"} for check, found in rows]
    sent = {"method": "POST", "path": "/v1/x", "fields": ["a", "b"], "headers": []}
    taken = "2026-01-02, commit c"
    return {"name": name, "version": "1", "rows": listed, "sent": [sent], "taken": taken}


def test_the_page_has_a_column_a_client_and_says_what_failed(tmp_path: Path) -> None:
    first = result("one", ("chat", "ok"), ("tools", "ok"))
    second = result("two", ("chat", "failed"), ("tools", "none"))
    facts = {"model": "m", "ranks": 4, "machine": "2 cores"}
    text = page([first, second], facts)
    assert text.startswith("Taken 2026-01-02, commit c; m on 4 ranks, 2 cores.")
    assert "| chat | ok | **failed** |" in text and "| tools | ok | - |" in text
    assert "- two, chat: failed: `a / b`" in text and "- one, " not in text
    assert "| one | POST /v1/x | `a`, `b` |" in text

    file = tmp_path / "page.md"
    file.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    write(file, text)
    write(file, text)  # the same again
    assert file.read_text() == f"before\n{BEGIN}\n\n{text}\n\n{END}\nafter\n"
    file.write_text("no markers")
    with pytest.raises(ValueError, match="has no lines"):
        write(file, text)
