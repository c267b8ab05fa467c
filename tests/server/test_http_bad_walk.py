"""Bad input on every route of openapi.json: each field of each body, and each id and query, is a
4xx in the protocol's own shape that names it, while a stream goes on.

What is bad follows from the document, so that a field that is added is walked too.
"""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import httpx
import pytest

from tests.helpers.document import Field, fields, routes
from tests.helpers.places import INSIDE
from tests.helpers.raw import answers, connect, read_all
from tests.server.conftest import PATIENCE_S, Running, error_of

HELLO = [{"role": "user", "content": "hi"}]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "x"},
    "/v1/chat/completions": {"messages": HELLO},
    "/tokenize": {"prompt": "x"},
    "/detokenize": {"tokens": [5]},
    "/v1/responses": {"input": "x"},
    "/v1/responses/input_tokens": {"input": "x"},
    "/v1/messages": {"messages": HELLO, "max_tokens": 4},
    "/v1/messages/count_tokens": {"messages": HELLO},
}
UNREAD = "/v1/responses/{response_id}/cancel"  # its body is not looked at
HUGE = 10**40
LARGE: dict[str, Any] = {  # below server.max_body_bytes
    "string": "a" * 300_000,
    "array": [1] * 40_000,
    "object": {f"k{i}": 1 for i in range(70_000)},
}
Launch = Callable[..., Running]


@contextmanager
def beside_a_stream(server: Running) -> Iterator[httpx.Client]:
    """A client to be bad with. Meanwhile a stream of another one is open, which then goes on to its
    end, and the engine saw nothing else."""
    server.engine.delay_s = 0.1
    with (
        httpx.Client(base_url=server.url, timeout=PATIENCE_S) as honest,
        httpx.Client(base_url=server.url, timeout=PATIENCE_S) as client,
    ):
        body = {"prompt": "x", "stream": True, "max_tokens": 8000}
        with honest.stream("POST", "/v1/completions", json=body) as stream:
            lines = stream.iter_lines()
            assert next(lines).startswith("data: ")
            yield client
            server.engine.delay_s = 0.0
            rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]" and '"finish_reason": "stop"' in rest[-2]
    assert len(server.engine.seen) == 1


@pytest.fixture
def talking(spoken: Launch) -> Running:
    """Its stream lasts for as long as a test is bad."""
    return spoken("word " * 400)


def send(client: httpx.Client, path: str, body: bytes) -> httpx.Response:
    return client.post(path, content=body, headers={"Content-Type": "application/json"})


def walk(document: Any, path: str) -> Iterator[Field]:
    """The fields of a path's body, each in a body that is valid without it."""
    if path == "/tokenize":  # either a prompt or messages
        yield from (f for f in fields(document, path, BODIES[path]) if "messages" not in f.name)
        yield from (f for f in fields(document, path, {}) if "messages" in f.name)
    else:
        yield from fields(document, path, BODIES[path])


def named(reply: httpx.Response, field: Field, what: object) -> None:
    """A 400 that names the field."""
    assert reply.status_code == 400, (field.name, what, reply.status_code, reply.text[:300])
    error = error_of(reply, 400)
    shown = (field.name, what, error)
    assert error["type"] == "invalid_request_error", shown
    if "context_length_exceeded" in error["message"]:  # what is too long is the whole prompt
        assert what in ("string", "array"), shown
        return
    assert field.leaf in error["message"], shown
    if "param" in error:
        assert (error["param"] or "").startswith(field.name.split(".")[0].split("[")[0]), shown


@pytest.fixture(scope="module")
def document(shared: Running) -> Any:
    return shared.get("/openapi.json").json()


def test_every_route_with_a_body_is_walked(document: Any) -> None:
    taken = {path for path, route in routes(document, "post").items() if "requestBody" in route}
    assert taken == set(BODIES)
    for path, body in BODIES.items():
        names = {field.name for field in fields(document, path, body)}
        assert set(body) < names and len(names) >= 2


@pytest.mark.parametrize("path", BODIES)
def test_a_wrong_type(talking: Running, document: Any, path: str) -> None:
    with beside_a_stream(talking) as client:
        for field in walk(document, path):
            for value in field.wrong():
                named(send(client, path, json.dumps(field.body(value)).encode()), field, value)


@pytest.mark.parametrize("path", BODIES)
def test_out_of_range(talking: Running, document: Any, path: str) -> None:
    with beside_a_stream(talking) as client:
        for field in walk(document, path):
            if field.types & {"integer", "number"}:
                for text in (str(HUGE), str(-HUGE), "1e999", "NaN", "9" * 5000):
                    body = json.dumps(field.body("@@")).replace('"@@"', text)
                    reply = send(client, path, body.encode())
                    if abs(float(text)) == HUGE:
                        named(reply, field, text)
                    else:  # no number of JSON, or none that is read
                        error_of(reply, 400)


@pytest.mark.parametrize("path", BODIES)
def test_too_large(talking: Running, document: Any, path: str) -> None:
    with beside_a_stream(talking) as client:
        for field in walk(document, path):
            for kind in field.types & set(LARGE):
                reply = send(client, path, json.dumps(field.body(LARGE[kind])).encode())
                named(reply, field, kind)


@pytest.mark.parametrize("path", BODIES)
def test_what_is_not_text(talking: Running, document: Any, path: str) -> None:
    """Half a surrogate pair, bytes that are not UTF-8, and half of the JSON."""
    with beside_a_stream(talking) as client:
        for field in walk(document, path):
            text = json.dumps(field.body("@@"))
            if "string" in field.types:
                named(send(client, path, text.replace("@@", "\\ud800").encode()), field, "half")
            before, _, _ = text.partition("@@")
            reply = send(client, path, before.encode() + b'\xff"}')
            assert "UTF-8" in error_of(reply, 400)["message"]
            assert "not valid JSON" in error_of(send(client, path, before.encode()), 400)["message"]


@pytest.mark.parametrize("path", BODIES)
def test_unknown(spoken: Launch, document: Any, path: str) -> None:
    """A name that is nearly a field's; and with the setting, any other in every object."""
    server = spoken("word " * 400, unknown_fields="refuse")
    with beside_a_stream(server) as client:
        for field in walk(document, path):
            for name in (field.leaf[:-1] + "q", "zz9"):
                if name in field.within or (name != "zz9" and len(name) < 6):
                    continue
                text = json.dumps(field.body("@@"))
                text = text.replace(f'"{field.leaf}": "@@"', f'"{name}": 5')
                error = error_of(send(client, path, text.encode()), 400)
                assert name in error["message"], (field.name, error)
                assert name == "zz9" or field.leaf in error["message"], (field.name, error)
                assert error.get("param", name).endswith(name), (field.name, error)


# Models of bodies that are read by hand in part -> the path that is asked.
BY_HAND = {
    "ChatCompletionRequest": "/v1/chat/completions",
    "MessagesRequest": "/v1/messages/count_tokens",
    "ResponseRequest": "/v1/responses/input_tokens",
}
WRONG = ("5", "1e300", "true", '"\\ud800"', "[[]]", '{"zz": [5]}', json.dumps("a" * 300_000))


@pytest.mark.parametrize("model", INSIDE, ids=lambda model: model.__name__)
def test_what_is_read_by_hand(spoken: Launch, model: Any) -> None:
    """Every place in it: what is refused names a field on the way to it, and nothing is a 5xx."""
    server = spoken("x")
    path, refused = BY_HAND[model.__name__], 0
    with httpx.Client(base_url=server.url, timeout=PATIENCE_S) as client:
        for place in INSIDE[model]:
            for value in WRONG:
                text = "{" + place.replace("@", value) + "}"
                reply = send(client, path, text.encode())
                assert reply.status_code in (200, 400, 404), (place, value[:20], reply.text[:300])
                if reply.status_code != 200:
                    error, refused = error_of(reply, reply.status_code), refused + 1
                    shown = (place, value[:20], error)
                    names = re.findall(r'"(\w+)":', place)
                    too_long = "context_length_exceeded" in error["message"]
                    assert too_long or any(name in error["message"] for name in names), shown
                    assert error.get("param", "x"), shown
    assert refused > 4 * len(INSIDE[model])


def test_a_client_that_leaves(talking: Running, document: Any, caplog: Any) -> None:
    """In the middle of a body: others do not notice, and nothing is logged as a failure."""
    server = talking
    with beside_a_stream(server), ExitStack() as stack:
        for path in routes(document, "post"):
            stack.enter_context(begun(server, path))
    server.engine.seen.clear()
    with beside_a_stream(server):
        pass
    assert not [one for one in caplog.records if one.levelname == "ERROR"]


@contextmanager
def begun(server: Running, path: str) -> Iterator[socket.socket]:
    """A connection with the first bytes of a body."""
    path = path.replace("{rank}", "0").replace("{response_id}", "resp_x")
    with connect(server.port, PATIENCE_S) as sock:
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        sock.sendall(f'{head}Content-Length: 90\r\n\r\n{{"model": '.encode())
        yield sock


@pytest.mark.parametrize("slowly", [False, True], ids=["nothing more", "byte by byte"])
def test_a_slow_sender(spoken: Launch, document: Any, slowly: bool) -> None:
    """One that says nothing more, or sends a byte now and then: each is answered in time."""
    server = spoken("word " * 400, body_timeout_s=0.5)
    with beside_a_stream(server), ExitStack() as stack:
        paths = list(routes(document, "post"))
        socks = [stack.enter_context(begun(server, path)) for path in paths]
        waiting = dict(zip(paths, socks, strict=True))
        found: dict[str, bytes] = {}
        while waiting:
            for path, sock in list(waiting.items()):
                sock.settimeout(0.05 if slowly else PATIENCE_S)
                try:
                    if slowly:
                        sock.sendall(b" ")
                    data = read_all(sock)
                except TimeoutError:
                    continue
                except ConnectionError:
                    data = b""
                found[path] = data
                del waiting[path]
    for path, data in found.items():
        if slowly and not data:  # reset: a byte came behind the answer
            continue
        (answer,) = answers(data)
        expected = 408 if path in BODIES else 404 if path == UNREAD else 400  # it takes none
        assert answer.status == expected, (path, answer)
        error = json.loads(answer.body)
        assert (error.get("type") == "error") == path.startswith("/v1/messages"), (path, error)
        assert path == UNREAD or "body" in error["error"]["message"], (path, error)


def test_a_body_that_is_too_large(spoken: Launch, document: Any) -> None:
    server = spoken("word " * 400, max_body_bytes=2000)
    with beside_a_stream(server) as client:
        for path in set(routes(document, "post")) - {UNREAD}:
            path = path.replace("{rank}", "0")
            for content in (b" " * 2001, iter([b" " * 1500] * 2)):  # its length told or not
                reply = client.post(
                    path, content=content, headers={"Content-Type": "application/json"}
                )
                early = path not in BODIES and reply.status_code == 400  # it takes none
                error_of(reply, 400 if early else 413)


IDS = (
    "x", "-1", str(HUGE), "9" * 5000, "a" * 5000, "1.5", "%00", "%ff", "%ed%a0%80", "%0d%0aX:y",
    "..%2f..%2fetc%2fpasswd", "%F0%9F%98%80", "%7B%7D", "null", "true", "%20", "a%2Fb",
)  # fmt: skip


@pytest.mark.parametrize("method", ["get", "delete", "post"])
def test_ids(talking: Running, document: Any, method: str) -> None:
    """Of what is not there, too long, no text, or another type."""
    walked = 0
    with beside_a_stream(talking) as client:
        for path, route in routes(document, method).items():
            names = [one["name"] for one in route.get("parameters", ()) if one["in"] == "path"]
            for text in IDS if names else ():
                reply = client.request(method, path.replace(f"{{{names[0]}}}", text))
                assert reply.status_code in (400, 404), (path, text, reply.text)
                error_of(reply, reply.status_code)
                walked += 1
    assert walked >= len(IDS)


def test_queries(talking: Running, document: Any) -> None:
    """Of another type, out of range, too long, and given twice."""
    walked = 0
    kept = talking.post("/v1/responses", {"input": "x", "max_output_tokens": 2}).json()["id"]
    talking.engine.seen.clear()
    with beside_a_stream(talking) as client:
        for path, route in routes(document, "get").items():
            for one in route.get("parameters", ()):
                if one["in"] != "query":
                    continue
                bad = ["a" * 5000, "\x00", str(HUGE), "9" * 5000, "-1", "1.5"]
                name = one["name"]
                for text in bad:
                    query = {name: text}
                    reply = client.get(path.replace("{response_id}", kept), params=query)
                    error = error_of(reply, 400)
                    assert error["param"] == name, (path, query, error)
                    assert name in error["message"], (path, query, error)
                    walked += 1
    assert walked >= 20
