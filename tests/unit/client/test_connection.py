"""The client side against a server that says anything: typed errors, bounds, no byte too many."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from ds_cp.client import connection
from ds_cp.client import events as events_module
from ds_cp.client.chat import Begun, Ended, Piece, Progress, Usage, chat_events, first_model
from ds_cp.client.connection import Server, get_json
from ds_cp.client.state import frame_of, frame_once
from ds_cp.errors import LaunchError, NoServerError, RequestError, ServerError
from tests.helpers.scripted import Scripted, scripted

CHAT = "/v1/chat/completions"


@pytest.fixture
def there() -> Iterator[Scripted]:
    with scripted() as server:
        yield server


def ask(there: Scripted, key: str | None = None, timeout: float = 30.0, **body: Any) -> list[Any]:
    server = Server.of(there.url, key, timeout)

    async def run() -> list[Any]:
        async with server.client() as client:
            return [event async for event in chat_events(server, client, body)]

    return asyncio.run(run())


def get(there: Scripted, path: str) -> Any:
    server = Server.of(there.url, None, 30.0)

    async def run() -> Any:
        async with server.client() as client:
            return await get_json(server, client, path)

    return asyncio.run(run())


def test_addresses() -> None:
    for given, url in (
        ("http://a:80/v1/", "http://a"), ("https://a/x/v1", "https://a/x"),
        (" http://[::1]:8000 ", "http://[::1]:8000"),
    ):  # fmt: skip
        assert Server.of(given, "", 1.0).url == url
    for wrong in ("", "a", "ftp://a", "http://", "http://a?x=1", "file:///etc/passwd", "x" * 3000,
                  "http://a:99999999", "\x1b[31mhttp"):  # fmt: skip
        with pytest.raises(LaunchError, match="--url is"):
            Server.of(wrong, None, 1.0)
    with pytest.raises(LaunchError, match="--api-key"):
        Server.of("http://me:secret@a", None, 1.0)
    with pytest.raises(LaunchError, match="printable ASCII"):
        Server.of("http://a", "k\n", 1.0)
    for wrong_s in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(LaunchError, match="--timeout is"):
            Server.of("http://a", None, wrong_s)


def test_nothing_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as one:
        port = one.getsockname()[1]
    server = Server.of(f"http://127.0.0.1:{port}", None, 30.0)

    async def run() -> None:
        async with server.client() as client:
            await first_model(server, client)

    with pytest.raises(NoServerError, match="start one with ds-cp serve") as err:
        asyncio.run(run())
    assert err.value.exit_code == 2


def test_the_events_of_a_chat(there: Scripted) -> None:
    def answer(h: Any, body: Any) -> None:
        h.begin()
        h.write(b": keep-alive\n\n")
        h.event({"id": "chatcmpl-9", "choices": [], "prompt_progress":
                 {"total": 10, "processed": 4, "cache": 2, "time_ms": 5}})  # fmt: skip
        h.write(b'data: {"choices": [{"delta": {"reasoning_content": "hm"}}]}\r\n\r\n')
        h.write(b'data: {"choices": [{"delta": {"content": "\xc3')  # half a character
        h.write(b'\xa9"}, "finish_reason": "stop"}]}\n\nevent: x\ndata:')
        h.write(b'{"choices": [], "usage": {"prompt_tokens": 10, "completion_tokens": 2}}\n\n')
        h.event("[DONE]")
        h.event({"id": "after the end"})

    there.answers[CHAT] = answer
    assert ask(there, "k", model="m") == [
        Begun("chatcmpl-9"), Progress(4, 10, 2), Piece("hm", True), Piece("é"), Ended("stop"),
        Usage(10, 2, 0),
    ]  # fmt: skip
    [(_, body, headers)] = there.seen
    assert body["stream"] is True and body["model"] == "m" and body["return_progress"] is True
    assert headers["Authorization"] == "Bearer k"


def test_fields_that_a_server_refuses_by_name_are_left_out(there: Scripted) -> None:
    def answer(h: Any, body: Any) -> None:
        for name in ("stream_options", "return_progress"):
            if name in body:
                h.reply({"error": {"message": f"unknown field {name}"}}, 400)
                return
        h.chat("fine")

    there.answers[CHAT] = answer
    assert Piece("fine") in ask(there, model="m")
    assert len(there.bodies(CHAT)) == 3


@pytest.mark.parametrize(
    ("status", "body", "kind", "part"),
    [
        (400, {"error": {"message": "bad \x1b[2J\nx"}}, RequestError, "HTTP 400: bad  [2J x"),
        (401, {"error": "no"}, RequestError, "give its key by --api-key"),
        (404, b"<html>", RequestError, "HTTP 404: <html>"),
        (400, b"\xff\x00" * 5000, RequestError, "HTTP 400: "),
        (429, {"error": {"message": "full"}}, ServerError, "HTTP 429: full"),
        (503, {}, ServerError, "HTTP 503: {}"),
        (500, b"", ServerError, "HTTP 500: Internal Server Error"),
        (302, b"", ServerError, "redirects"),
    ],
)  # fmt: skip
def test_refusals(there: Scripted, status: int, body: Any, kind: type, part: str) -> None:
    there.answers[CHAT] = lambda h, _: h.reply(body, status)
    with pytest.raises(kind) as err:
        ask(there)
    said = str(err.value)
    assert part in said and said.isprintable() and len(said) < 1200
    assert err.value.exit_code == (2 if kind is RequestError else 1)


def broken(h: Any, what: str) -> None:
    h.begin("text/html" if what == "html" else "text/event-stream")
    chunk = {"id": "x", "choices": [{"delta": {"content": "a"}}]}
    h.event(chunk)
    if what == "error":
        h.event({"error": {"message": "the engine\x1b]0;x\x07 died", "code": 5}})
    elif what == "json":
        h.event("{nonsense")
    elif what == "list":
        h.event([1])
    elif what == "utf8":
        h.write(b"data: \xff\n\n")
    elif what == "long":
        h.write(b"data: " + b"x" * 5000)
        h.write(b"x" * 5000 + b"\n\n")
    elif what == "lines":
        h.write(b"data: x\n" * 4000 + b"\n")


@pytest.mark.parametrize(
    ("what", "part"),
    [
        ("error", "the engine ]0;x  died"), ("json", "not valid JSON"),
        ("list", "chat completions"),
        ("utf8", "not UTF-8"), ("cut", "broke off its answer"), ("html", "no stream of events"),
        ("long", "more than 8000 bytes"), ("lines", "more than 8000 bytes"),
    ],
)  # fmt: skip
def test_broken_streams(there: Scripted, monkeypatch: Any, what: str, part: str) -> None:
    monkeypatch.setattr(events_module.events, "__defaults__", (8000,))
    there.answers[CHAT] = lambda h, _: broken(h, what)
    with pytest.raises(ServerError) as err:
        ask(there)
    assert part in str(err.value) and str(err.value).isprintable()


def test_a_silent_server_is_given_up(there: Scripted) -> None:
    def silent(h: Any, body: Any) -> None:
        h.begin()
        h.connection.recv(1)  # until the client leaves

    there.answers[CHAT] = silent
    with pytest.raises(ServerError, match="sent nothing for 0.3 s; --timeout waits longer"):
        ask(there, timeout=0.3)


def test_answers_are_bounded_and_json(there: Scripted, monkeypatch: Any) -> None:
    monkeypatch.setattr(connection.read, "__defaults__", (1000,))
    there.answers["/a"] = lambda h, _: h.reply(b"[" + b" " * 2000 + b"]")
    there.answers["/b"] = lambda h, _: h.reply(b'{"a": 1, "a": 2}')
    there.answers["/c"] = lambda h, _: h.reply(b"\xff")
    for path, part in (("/a", "more than 1000 bytes"), ("/b", "given twice"), ("/c", "utf-8")):
        with pytest.raises(ServerError, match=part):
            get(there, path)


def test_compressed_answers_are_refused(there: Scripted) -> None:
    def answer(h: Any, body: Any) -> None:
        h.send_response(200)
        h.send_header("Content-Encoding", "gzip")
        h.send_header("Content-Length", "0")
        h.end_headers()

    there.answers["/x"] = answer
    with pytest.raises(ServerError, match="compresses"):
        get(there, "/x")


def test_models(there: Scripted) -> None:
    server = Server.of(there.url, None, 30.0)

    async def run() -> Any:
        async with server.client() as client:
            return await first_model(server, client)

    assert asyncio.run(run()) == ("m-1", 512)
    for wrong in ({}, [], {"data": []}, {"data": [{}]}, {"data": [{"id": 5}]}, {"data": "x"}):
        there.answers["/v1/models"] = lambda h, _, wrong=wrong: h.reply(wrong)  # type: ignore[misc]
        with pytest.raises(ServerError, match="--model"):
            asyncio.run(run())


def test_state_of_another_server(there: Scripted) -> None:
    server = Server.of(there.url, None, 30.0)

    async def run() -> Any:
        async with server.client() as client:
            return await frame_once(server, client)

    with pytest.raises(RequestError, match="no ds_cp server, or an old one"):
        asyncio.run(run())
    for wrong in (b"{}", b"[]", b"nonsense", b'{"at": "x"}'):
        with pytest.raises(ServerError, match="use the ds-cp of the server's version"):
            frame_of(wrong)
