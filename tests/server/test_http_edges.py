"""The edges of HTTP: HEAD, OPTIONS, Allow, CORS, content codings, slashes, Accept, Host."""

from __future__ import annotations

import gzip
import json
import socket
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from ds_cp.api.transport.head import METHODS
from ds_cp.errors import QueueFullError
from tests.helpers.fake_engine import FakeEngine
from tests.server.conftest import Running, error_of, wait_for

Launch = Callable[..., Running]
COMPLETIONS = "/v1/completions"
APP = "https://app.example"
KEY = {"Authorization": "Bearer secret"}
NO_RESPONSE = "resp_none"  # the id of a response that is not kept


def routes_of(server: Running) -> dict[str, set[str]]:
    """The methods of every path that the application documents, with its parameters filled in."""
    found = {"/openapi.json": {"GET"}}
    for path, operations in server.get("/openapi.json").json()["paths"].items():
        url = path.replace("{model}", "fake-model").replace("{rank}", "1")
        url = url.replace("{response_id}", NO_RESPONSE)
        found[url] = {method.upper() for method in operations}
    assert len(found) > 10
    assert set().union(*found.values()) <= set(METHODS)
    found["/v1/responses/input_tokens"] |= found[f"/v1/responses/{NO_RESPONSE}"]  # an id as any
    return found


@pytest.fixture
def client(served: Running) -> Iterator[httpx.Client]:
    """One connection to ``served``: it has to stay in step over all answers."""
    with httpx.Client(base_url=served.url, timeout=20, verify=False) as found:
        yield found


def cors_of(reply: httpx.Response) -> dict[str, str]:
    return {k: v for k, v in reply.headers.items() if k.startswith("access-control-")}


# -- methods -----------------------------------------------------------------------------------


def test_head_wherever_get_is(served: Running, client: httpx.Client) -> None:
    """The same status and headers, and no body."""
    varying = {"date", "x-request-id"}
    gets = [path for path, methods in routes_of(served).items() if "GET" in methods]
    assert {"/health", "/metrics", "/v1/models", "/v1/models/fake-model", "/ranks"} <= set(gets)
    for path in [*gets, "/health/", "/nothing", "/v1/models/other"]:
        got, head = client.get(path), client.head(path)
        assert head.status_code == got.status_code, path
        assert head.content == b"" and got.content
        kept = {k: v for k, v in got.headers.items() if k not in varying}
        assert {k: v for k, v in head.headers.items() if k not in varying} == kept
    for path in (COMPLETIONS, "/rebalance"):
        head = client.head(path)
        assert head.status_code == 405 and head.headers["allow"] == "POST"
    assert client.get("/health").json() == {"status": "ready"}
    served.engine.state = "dead"
    assert client.head("/health").status_code == 503
    assert served.engine.drained == set() and served.engine.seen == []


def test_options_and_405_name_the_methods(served: Running, client: httpx.Client) -> None:
    for path, methods in routes_of(served).items():
        allowed = methods | ({"HEAD"} if "GET" in methods else set())
        reply = client.options(path)
        assert reply.status_code == 200 and reply.content == b""
        assert set(reply.headers["allow"].split(", ")) == allowed | {"OPTIONS"}, path
        assert cors_of(reply) == {}
        for method in {"GET", "POST", "PUT", "DELETE", "PATCH", "TRACE"} - methods:
            reply = client.request(method, path)
            error_of(reply, 405)
            assert set(reply.headers["allow"].split(", ")) == allowed, (method, path)
    error_of(client.options("/nothing"), 404)
    assert served.engine.drained == set()


def test_options_asks_for_no_key_and_tells_nothing(launch: Launch) -> None:
    server = launch(api_key=("secret",))
    assert httpx.options(server.url + COMPLETIONS).status_code == 200
    assert httpx.head(server.url + "/v1/models").status_code == 401
    assert httpx.head(server.url + "/v1/models", headers=KEY).status_code == 200
    assert httpx.head(server.url + "/health").status_code == 200


# -- pages of other origins --------------------------------------------------------------------


def preflight(server: Running, origin: str, path: str = COMPLETIONS, **more: str) -> httpx.Response:
    headers = {
        "Origin": origin,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type,x-stainless-os",
    }
    return httpx.options(server.url + path, headers=headers | more)


def test_without_origins_no_page_is_allowed(served: Running) -> None:
    reply = preflight(served, "http://localhost:3000")
    assert reply.status_code == 200 and cors_of(reply) == {}
    reply = served.get("/v1/models", headers={"Origin": "http://localhost:3000"})
    assert reply.status_code == 200 and cors_of(reply) == {}


def test_preflights_of_listed_origins(launch: Launch) -> None:
    server = launch(api_key=("secret",), cors_origins=[APP, "http://localhost:3000"])
    for origin in (APP, "http://localhost:3000"):
        reply = preflight(server, origin)
        assert reply.status_code == 200 and reply.headers["x-request-id"]
        found = cors_of(reply)
        assert found["access-control-allow-origin"] == origin
        assert {"GET", "HEAD", "POST"} <= set(found["access-control-allow-methods"].split(", "))
        allowed = found["access-control-allow-headers"]
        assert allowed == "authorization,content-type,x-stainless-os"
        assert "access-control-allow-credentials" not in found
        assert "Origin" in reply.headers["vary"]
    local = {"Access-Control-Request-Private-Network": "true"}
    assert preflight(server, APP, **local).headers["access-control-allow-private-network"] == "true"
    refused = preflight(server, APP, **{"Access-Control-Request-Method": "PATCH"})
    assert "PATCH" in error_of(refused, 400)["message"]
    for origin in ("https://evil.example", APP + ".evil.example", APP + ":444", "null", ""):
        reply = preflight(server, origin)
        assert reply.status_code == 200 and "access-control-allow-origin" not in reply.headers
        assert "allow" in reply.headers and "Origin" in reply.headers["vary"]


def test_every_answer_can_be_read_by_its_page(launch: Launch, tokenizer: Any) -> None:
    """Those of the layers too, and errors in the middle: else a page sees a network error."""
    server = launch(api_key=("secret",), cors_origins=[APP], allowed_hosts=["gpu1.example"])
    base = KEY | {"Origin": APP, "Content-Type": "application/json"}

    def send(status: int, body: Any = None, path: str = COMPLETIONS, **more: str) -> None:
        data = json.dumps(body or {"prompt": [5], "max_tokens": 2})
        headers = base | {name.replace("_", "-"): value for name, value in more.items()}
        reply = httpx.post(
            server.url + path, content=data, headers=headers, timeout=20, verify=False
        )
        assert reply.status_code == status, reply.text
        assert reply.headers["access-control-allow-origin"] == APP
        exposed = reply.headers["access-control-expose-headers"].lower()
        assert {"x-request-id", "retry-after", "x-ds-cp-warning"} <= set(exposed.split(", "))
        assert "origin" in reply.headers["vary"].lower()
        assert reply.headers["x-request-id"]

    send(200)
    send(200, {"prompt": [5], "max_tokens": 2, "stream": True})
    send(400, {"prompt": [5], "max_tokens": -1})
    send(401, Authorization="Bearer other")
    send(404, path="/nothing")
    send(405, path="/v1/models")
    send(413, {"prompt": "x" * (8 << 20)})
    send(415, Content_Type="text/plain")
    send(415, Content_Encoding="br")
    send(421, Host="evil.example")
    server.engine.refuse = QueueFullError("5 requests are waiting")
    send(429)
    server.engine.refuse = ZeroDivisionError("a fault")
    send(500)
    server.engine.state = "dead"
    send(503)
    reply = server.get("/version", headers=KEY | {"Origin": "https://evil.example"})
    assert reply.status_code == 200 and "access-control-allow-origin" not in reply.headers
    assert "origin" in server.get("/version", headers=KEY).headers["vary"].lower()


def test_every_page(launch: Launch) -> None:
    server = launch(cors_origins=["*"])
    for origin in (APP, "null"):
        assert preflight(server, origin).headers["access-control-allow-origin"] == "*"
        reply = server.post(COMPLETIONS, {"prompt": [5]}, headers={"Origin": origin})
        assert reply.status_code == 200 and reply.headers["access-control-allow-origin"] == "*"


def test_a_page_that_leaves_ends_its_request(launch: Launch, tokenizer: Any) -> None:
    engine = FakeEngine(tokenizer)
    engine.delay_s = 0.05
    server = launch(engine, cors_origins=[APP])
    body = {"prompt": [5], "max_tokens": 100}
    for stream in (True, False):
        data = json.dumps(body | {"stream": stream}).encode()
        sock = socket.create_connection(("127.0.0.1", server.port), timeout=10)
        sock.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nOrigin: https://app.example\r\n"
            b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(data) + data
        )
        assert wait_for(lambda: bool(engine.live))
        sock.close()
        assert wait_for(lambda: not engine.live)


# -- bodies ------------------------------------------------------------------------------------


def test_compressed_bodies(served: Running, client: httpx.Client) -> None:
    data = json.dumps({"prompt": [5], "max_tokens": 2}).encode()
    posts = [path for path, methods in routes_of(served).items() if "POST" in methods]
    for path in posts:
        for coding in ("gzip", "GZIP", "br", "identity, x-gzip", "deflate , identity", "nonsense"):
            headers = {"Content-Type": "application/json", "Content-Encoding": coding}
            reply = client.post(path, content=gzip.compress(data), headers=headers)
            error = error_of(reply, 415)
            if not path.startswith("/v1/messages"):  # whose errors have no code
                assert error["code"] == "unsupported_content_encoding"
            assert reply.headers["accept-encoding"] == "identity"
    two = [("Content-Type", "application/json"), ("Content-Encoding", "identity")]
    for more in ([], [("Content-Encoding", "")], [("Content-Encoding", "Identity")]):
        reply = client.post(COMPLETIONS, content=data, headers=[*two, *more])
        assert reply.status_code == 200
    headers = [*two, ("Content-Encoding", "gzip")]
    error_of(client.post(COMPLETIONS, content=data, headers=headers), 415)
    assert served.engine.drained == set() and len(served.engine.seen) == 3


# -- paths -------------------------------------------------------------------------------------


def test_a_slash_at_the_end(served: Running, client: httpx.Client) -> None:
    """Answered as without it, and not by a redirect: that would name http and our own host."""
    proxy = {"X-Forwarded-Proto": "https", "X-Forwarded-Host": "api.example"}
    for path, methods in routes_of(served).items():
        if "GET" in methods:
            with_it = client.get(path + "/", headers=proxy)
            missing = "/v1/responses/" in path
            assert with_it.status_code == (404 if missing else 200)
            assert with_it.content == client.get(path).content
    for path, body in ((COMPLETIONS, {"prompt": [5]}), ("/tokenize", {"prompt": "x"})):
        reply = client.post(path + "/", json=body, headers=proxy)
        assert reply.status_code == 200 and "location" not in reply.headers
    messages = [{"role": "user", "content": "hi"}]
    for stream in (False, True):
        body = {"messages": messages, "stream": stream, "max_tokens": 2}
        assert client.post("/v1/chat/completions/", json=body).status_code == 200
    assert client.post("/ranks/1/drain/").json() == {"rank": 1, "drained": True}


def test_odd_paths(served: Running) -> None:
    """None is a redirect or a fault of the server."""
    for path in (
        "//", "///", "//health", "/health//", "/v1//models", "/v1/models//", "/v1%2Fmodels",
        "/v1/models%2F", "/v1/models/%2F", "/v1/models/%2E%2E/x", "/v1/models/..", "/%00", "/%ff",
        "/%", "/%zz", "/./health", "//evil.example/health", "/\\evil.example", "/health;a=b",
        "/health%3F", "/ranks/%2F/drain/", "/ranks//drain", "/openapi.json/", "/?",
        "/v1/models/?x=/", "/" + "/" * 5000,
    ):  # fmt: skip
        for method in ("GET", "HEAD", "OPTIONS", "POST"):
            status, head = raw(served, f"{method} {path} HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert status in (200, 400, 404, 405, 415), (method, path, status)
            assert b"location" not in head.lower()
    assert raw(served, "GET /v1/models%2F HTTP/1.1\r\nHost: localhost\r\n\r\n")[0] == 200
    assert raw(served, "GET /health// HTTP/1.1\r\nHost: localhost\r\n\r\n")[0] == 404
    assert served.engine.drained == set()


def raw(server: Running, request: str) -> tuple[int, bytes]:
    """Send bytes; the status, and the whole answer."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as sock:
        sock.sendall(request.replace("\r\n\r\n", "\r\nConnection: close\r\n\r\n").encode("latin-1"))
        answer = b"".join(iter(lambda: sock.recv(65536), b""))
    return int(answer.split(b" ")[1]), answer


# -- hosts: tests/attack/test_rebinding.py has them without a key -------------------------------


def test_with_a_key_the_key_counts(launch: Launch) -> None:
    """A page has no key, so that names are not compared unless some are listed."""
    server = launch(api_key=("secret",))
    for host in ("gpu1.example", "10.0.0.7:8000"):
        assert server.get("/v1/models", headers=KEY | {"Host": host}).status_code == 200
        assert server.get("/v1/models", headers={"Host": host}).status_code == 401
    error_of(server.get("/v1/models", headers=KEY | {"Host": "a@b"}), 400)
    assert server.get("/v1/models", headers=KEY | {"Host": ""}).status_code == 200  # RFC 9112, 3.2
    server = launch(api_key=("secret",), allowed_hosts=["gpu1.example"])
    for host, status in (("gpu1.example:80", 200), ("localhost", 200), ("gpu2.example", 421)):
        assert server.get("/v1/models", headers=KEY | {"Host": host}).status_code == status


# -- metrics -----------------------------------------------------------------------------------


def test_metrics_for_any_accept(client: httpx.Client) -> None:
    for accept in (
        "", "*/*", "text/plain", "application/json", "application/openmetrics-text;version=99",
        "application/openmetrics-text; version=1.0.x", "text/plain;version=a.b, */*;q=0",
        "image/png", ";;;", "application/openmetrics-text;version=1.0.0;q=0.8,text/plain;q=0.5",
    ):  # fmt: skip
        reply = client.get("/metrics", headers={"Accept": accept})
        assert reply.status_code == 200, accept
        sends_open = "version=1.0.0" in accept
        kind = "application/openmetrics-text" if sends_open else "text/plain"
        assert reply.headers["content-type"].startswith(f"{kind}; version="), accept
    two = [("Accept", "image/png"), ("Accept", "application/openmetrics-text;version=1.0.0")]
    kind = client.get("/metrics", headers=two).headers["content-type"]
    assert kind.startswith("application/openmetrics-text")
