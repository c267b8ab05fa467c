"""Listening on every address of a name, and what is said when that cannot be."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest

from ds_cp.api.transport.listen import bind, urls
from ds_cp.errors import LaunchError

V4 = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 0))
V6 = (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("::1", 0, 0, 0))


def has_ipv6() -> bool:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="this machine has no ::1")


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    """What names have for addresses; more can be put in."""
    found: dict[str, list[Any]] = {"localhost": [V6, V4, V4]}
    monkeypatch.setattr(socket, "getaddrinfo", lambda name, *_, **__: found[name])
    return found


@pytest.fixture
def opened() -> Iterator[list[socket.socket]]:
    sockets: list[socket.socket] = []
    yield sockets
    for sock in sockets:
        sock.close()


def reaches(address: str, port: int) -> bool:
    try:
        with socket.create_connection((address, port), timeout=5):
            return True
    except OSError:
        return False


@needs_ipv6
@pytest.mark.parametrize("given", [True, False])
def test_localhost_is_every_address_of_the_name(
    names: dict[str, list[Any]], opened: list[socket.socket], given: bool
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        free = probe.getsockname()[1]
    opened += bind("localhost", free if given else 0)
    assert [sock.family for sock in opened] == [socket.AF_INET, socket.AF_INET6]
    (port,) = {sock.getsockname()[1] for sock in opened}
    assert port == free or not given
    assert reaches_all(names, port)
    assert urls(opened) == f"http://127.0.0.1:{port} and http://[::1]:{port}"


def reaches_all(names: dict[str, list[Any]], port: int) -> bool:
    names["127.0.0.1"] = [(*V4[:4], ("127.0.0.1", port))]
    names["::1"] = [(*V6[:4], ("::1", port, 0, 0))]
    return reaches("127.0.0.1", port) and reaches("::1", port)


@needs_ipv6
def test_a_port_in_use_on_one_address_is_an_error(names: dict[str, list[Any]]) -> None:
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(LaunchError, match=f"port {port} is in use; choose another") as error:
            bind("localhost", port)
    assert "\n" not in str(error.value)
    for sock in bind("localhost", port):  # and nothing was left listening
        sock.close()


@needs_ipv6
def test_port_0_is_chosen_once_and_again_where_it_is_taken(
    names: dict[str, list[Any]], opened: list[socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, asked = socket.socket.bind, []

    def bind_once_taken(sock: socket.socket, address: Any) -> None:
        asked.append(address[1])
        if len(asked) == 2:
            raise OSError(errno.EADDRINUSE, "Address already in use")
        real(sock, address)

    class Socket(socket.socket):
        bind = bind_once_taken

    monkeypatch.setattr(socket, "socket", Socket)
    opened += bind("localhost", 0)
    assert len(opened) == 2 and asked[0] == asked[2] == 0 and asked[1] and asked[3]
    assert {sock.getsockname()[1] for sock in opened} == {asked[3]}


@pytest.mark.parametrize("code", [errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT])
def test_a_disabled_family_is_left_out_with_a_word(
    names: dict[str, list[Any]],
    opened: list[socket.socket],
    monkeypatch: pytest.MonkeyPatch,
    code: int,
) -> None:
    class Socket(socket.socket):
        def bind(self, address: Any) -> None:
            if self.family == socket.AF_INET6:
                raise OSError(code, "not here")
            super().bind(address)

    monkeypatch.setattr(socket, "socket", Socket)
    said: list[str] = []
    opened += bind("localhost", 0, said.append)
    assert [sock.family for sock in opened] == [socket.AF_INET]
    assert said == ["not listening on ::1: not here"]
    names["six"] = [V6]
    with pytest.raises(LaunchError, match="no address of this machine"):
        bind("six", 0)  # nothing else works


def test_one_foreign_address_among_the_own_is_an_error(names: dict[str, list[Any]]) -> None:
    names["mixed"] = [V4, (*V4[:4], ("203.0.113.9", 0))]
    with pytest.raises(LaunchError, match=r"mixed port 0 .*no address of this machine"):
        bind("mixed", 0)


@needs_ipv6
def test_the_ipv6_wildcard_serves_ipv4_too() -> None:
    (sock,) = bind("::", 0)
    with closing(sock):
        port = sock.getsockname()[1]
        assert reaches("127.0.0.1", port) and reaches("::1", port)


def test_bind_says_what_is_wrong() -> None:
    (first,) = bind("127.0.0.1", 0)
    port = first.getsockname()[1]
    with pytest.raises(LaunchError, match=f"port {port} is in use; choose another") as error:
        bind("127.0.0.1", port)
    assert "\n" not in str(error.value)
    first.close()
    (again,) = bind("127.0.0.1", port)
    again.close()
    with pytest.raises(LaunchError, match="no address of this machine"):
        bind("192.0.2.1", 0)
    for port in (70_000, -1):
        with pytest.raises(LaunchError, match="0 to 65535"):
            bind("127.0.0.1", port)
    with pytest.raises(LaunchError, match="server.host"):
        bind("not a host", 8000)
