"""What other servers taught, over HTTP: SECURITY.md says of whom each is."""

from __future__ import annotations

import re
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from ds_cp.api.app import create_app
from ds_cp.api.page_files import page_paths
from ds_cp.api.state import HEALTH_PATHS
from ds_cp.api.transport import middleware
from ds_cp.api.transport.routing import flat
from ds_cp.config import Server
from ds_cp.errors import CommError, LaunchError, ModelError
from tests.helpers.fake_engine import FakeEngine
from tests.server.conftest import Running

Launch = Callable[..., Running]
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "hello"}]
ADDRESS = "0x7f3b2c0011a0"
PATH = "/srv/private/weights.py"


def test_every_route_wants_the_key(launch: Launch, tokenizer: Any) -> None:
    """By what there is, not by a list of what to guard: a new route is guarded as well."""
    server = launch(api_key=("right",))
    app = create_app(FakeEngine(tokenizer), Server(api_key=("right",)))
    asked = 0
    for route in flat(app.router.routes):
        path = re.sub(r"{[^}]*}", "1", route.path)
        for method in {"GET", "POST"} & (route.methods or set()):
            if path not in HEALTH_PATHS | page_paths():
                reply = server.get(path) if method == "GET" else server.post(path, {})
                assert reply.status_code == 401, (method, path, reply.text)
                asked += 1
    assert asked >= 15
    assert server.engine.seen == []


def test_every_key_is_compared_whichever_fits(
    launch: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In constant time, as digests of one length: the first key, the last one, and none."""
    compared: list[tuple[int, int]] = []
    plain = middleware.secrets.compare_digest

    def counting(a: Any, b: Any) -> bool:
        compared.append((len(a), len(b)))
        return plain(a, b)

    keys = tuple(f"key-{i}" for i in range(5))
    server = launch(api_key=keys)
    monkeypatch.setattr(middleware.secrets, "compare_digest", counting)
    counts = []
    for sent in (keys[0], keys[-1], "key", "k" * 4000):
        compared.clear()
        server.get("/version", headers={"Authorization": f"Bearer {sent}"})
        counts.append(len(compared))
        assert set(compared) == {(32, 32)}
    assert counts == [counts[0]] * 4 and counts[0] >= len(keys)


SECRETIVE = [
    RuntimeError(f"<Block object at {ADDRESS}> in {PATH}"),
    KeyError(PATH),
    MemoryError(f"{ADDRESS}"),
    ModelError(f"model {PATH} cannot be loaded"),
    LaunchError(f"cannot write {PATH}"),
    CommError(f"the worker at {ADDRESS} is gone"),
]


@pytest.mark.parametrize("err", SECRETIVE, ids=lambda err: type(err).__name__)
@pytest.mark.parametrize("path", [CHAT, TEXT, "/v1/messages", "/v1/responses"])
def test_errors_hold_no_address_and_no_path(shared: Running, path: str, err: Exception) -> None:
    """Before the answer begins, and within a stream."""
    text = {"prompt": "x"} if path == TEXT else {"messages": HELLO, "max_tokens": 3}
    body = {"input": "x"} if path == "/v1/responses" else text
    try:
        for stream in (False, True):
            shared.engine.refuse = err
            said = shared.post(path, body | {"stream": stream}).text
            shared.engine.refuse = None
            assert "error" in said
            assert ADDRESS not in said and PATH not in said, said
            assert not re.search(r"0x[0-9a-f]{6}|\.py\b|Traceback|line \d+", said), said
    finally:
        shared.engine.refuse = None


AWAY = "http://203.0.113.9:81/x.json"  # RFC 5737: nobody has it
LINK = {"url": AWAY}
WISHES = [
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": LINK}]}]}),
    (CHAT, {"messages": [{"role": "user", "content": [
        {"type": "input_audio", "input_audio": {"data": AWAY, "format": "wav"}}]}]}),
    (CHAT, {"messages": [{"role": "user", "content": [
        {"type": "file", "file": {"file_id": AWAY, "file_data": f"file://{PATH}"}}]}]}),
    (CHAT, {"messages": HELLO, "documents": [LINK]}),
    (CHAT, {"messages": HELLO, "response_format": {"type": "json_schema", "json_schema": {
        "name": "a", "schema": {"$ref": AWAY}}}}),
    (CHAT, {"messages": HELLO, "response_format": {"type": "json_schema", "json_schema": {
        "name": "a", "schema": {"$schema": AWAY, "$id": AWAY, "type": "object"}}}}),
    (CHAT, {"messages": HELLO, "chat_template": "{% include '" + AWAY + "' %}"}),
    (CHAT, {"messages": HELLO, "web_search_options": LINK}),
    (TEXT, {"prompt": "x", "prompt_embeds": AWAY}),
    (TEXT, {"prompt": "x", "lora_path": AWAY}),
    ("/v1/responses", {"input": [{"role": "user", "content": [
        {"type": "input_image", "image_url": AWAY}]}]}),
    ("/v1/responses", {"input": "x", "tools": [{"type": "mcp", "server_url": AWAY}]}),
    ("/v1/messages", {"max_tokens": 3, "messages": [{"role": "user", "content": [
        {"type": "image", "source": {"type": "url", "url": AWAY}}]}]}),
    ("/v1/messages", {"max_tokens": 3, "messages": HELLO, "mcp_servers": [LINK]}),
]  # fmt: skip


@contextmanager
def outbound() -> Iterator[list[str]]:
    """Names that are looked up and addresses that are connected to, beyond this host."""
    seen: list[str] = []
    watching = [True]

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if watching[0] and event in ("socket.connect", "socket.getaddrinfo", "socket.sendto"):
            to = str(args[1] if event != "socket.getaddrinfo" else args[0])
            if not re.search(r"127\.0\.0\.1|localhost|::1", to):
                seen.append(f"{event} {to}")

    sys.addaudithook(hook)  # for good; silent once nobody watches
    try:
        yield seen
    finally:
        watching[0] = False


def test_addresses_in_bodies_are_never_asked(shared: Running) -> None:
    """Pictures, files, schemas, tools of other places: refused by name, or of no effect."""
    with outbound() as seen:
        for path, body in WISHES:
            reply = shared.post(path, body)
            assert reply.status_code in (200, 400), (body, reply.text)
            media = re.search("image|audio|file", str(body))
            assert reply.status_code == 400 or not media, (body, reply.text)
    assert seen == []


def test_the_watch_sees_what_is_asked() -> None:
    with outbound() as seen, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("203.0.113.9", 81))  # a datagram socket sends nothing by it
    assert len(seen) == 1 and "203.0.113.9" in seen[0]
