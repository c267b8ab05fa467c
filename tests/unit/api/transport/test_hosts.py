"""Which hosts a request may be for, in all their spellings."""

from __future__ import annotations

import asyncio
import json

import pytest
from starlette.types import Message, Receive, Scope, Send

from ds_cp.api.transport.hosts import Hosts

HOSTS = frozenset({"localhost", "127.0.0.1", "::1", "gpu1.example"})


def ask(
    *hosts: str,
    version: str = "1.1",
    known: frozenset[str] | None = HOSTS,
    server: tuple[str, int | None] | None = ("127.0.0.1", 8000),
) -> tuple[int, str]:
    """The status and the message; 200 when the application inside was called."""
    seen: list[Scope] = []
    sent: list[Message] = []

    async def inside(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope)

    async def receive() -> Message:
        raise AssertionError("nothing is read")

    async def send(message: Message) -> None:
        sent.append(message)

    scope: Scope = {
        "type": "http",
        "http_version": version,
        "method": "GET",
        "path": "/x",
        "headers": [(b"x", b"y"), *((b"host", host.encode("latin-1")) for host in hosts)],
        "server": server,
    }
    asyncio.run(Hosts(inside, known)(scope, receive, send))
    if not sent:
        assert seen == [scope]
        return 200, ""
    assert not seen
    return sent[0]["status"], json.loads(sent[1]["body"])["error"]["message"]


@pytest.mark.parametrize(
    "host",
    ["localhost", "localhost:8000", "LOCALHOST:1", "localhost.", "localhost.:80", "127.0.0.1:",
     "127.0.0.1:8000", "[::1]", "[::1]:8000", "[0:0::0:1]:80", "[::ffff:127.0.0.1]",
     "gpu1.example", "GPU1.Example.:443", " localhost\t"],
)  # fmt: skip
def test_own_names_in_any_spelling(host: str) -> None:
    assert ask(host)[0] == 200


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example",
     "x.localhost", "127.1", "2130706433", "0x7f000001", "0.0.0.0", "10.0.0.1",
     "127.0.0.2", "[::2]", "[::]", "gpu1.example.com", "xgpu1.example",
     "localhost,evil.example", "%6cocalhost"],
)  # fmt: skip
def test_other_names_are_not_answered(host: str) -> None:
    status, message = ask(host)
    assert status == 421 and "server.allowed_hosts" in message
    assert ask(host, known=None)[0] == 200  # with an API key


@pytest.mark.parametrize(
    "host",
    ["", " ", ":80", "localhost:x", "localhost:99999", "user@localhost", "evil@127.0.0.1", "a b",
     "[::1", "::1", "[::1]x", "http://localhost", "localhost/", "l\xf6calhost",
     "localhost\x00", "localhost:80:80", "localhost..", "[fe80::1%25lo]"],
)  # fmt: skip
def test_what_is_no_host_is_none_of_ours(host: str) -> None:
    """What may not stand in Host at all is refused before, by ``check_head``."""
    assert ask(host, known=None)[0] == 200  # with an API key
    assert ask(host)[0] == 421


def test_every_host_must_be_ours() -> None:
    for hosts, status in (
        ([], 200),
        (["localhost", "[::1]:80"], 200),
        (["localhost", "evil.example"], 421),
        (["evil.example", "localhost"], 421),
        (["localhost", ""], 421),
    ):
        assert ask(*hosts, version="1.0")[0] == status
        assert ask(*hosts, version="1.0", known=None)[0] == 200


def test_the_address_that_a_connection_came_in_on() -> None:
    """It cannot be a name that a page owns: a probe by address works beside ``allowed_hosts``."""
    for server, host in (("10.1.2.3", "10.1.2.3:8000"), ("2001:db8::1", "[2001:DB8::0:1]")):
        assert ask(host, server=(server, 8000))[0] == 200
        assert ask("evil.example", server=(server, 8000))[0] == 421
    assert ask("10.1.2.4", server=("10.1.2.3", 8000))[0] == 421
    assert ask("evil", server=("evil", None))[0] == 421  # a name is no address
    assert ask("evil.example", server=None)[0] == 421
    assert ask("localhost", server=("/run/socket", None))[0] == 200
