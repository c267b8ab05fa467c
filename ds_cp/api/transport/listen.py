"""Listening sockets of the server: one for each address that its host name has."""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable, Sequence
from typing import Any

from ds_cp.errors import LaunchError

BACKLOG = 128  # connections that the kernel holds until they are accepted, each socket
# Bytes that the kernel holds for each connection until its client reads; left to itself Linux takes
# megabytes.
SEND_BUFFER = 128 * 1024
_PORT_TRIES = 16  # free ports that are tried until one is free on every address
# How a host refuses an address of a family that it does not use (IPv6 is often disabled).
_NO_SUCH_FAMILY = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT, errno.EPROTONOSUPPORT)

_Address = tuple[socket.AddressFamily, tuple[Any, ...]]  # family, (IP, port, ...)


def bind(
    host: str, port: int, on_left_out: Callable[[str], None] = lambda text: None
) -> list[socket.socket]:
    """Listening TCP sockets, IPv4 first, one for each address that ``host`` has, all of one port:
    ``localhost`` is 127.0.0.1 and ::1. Port 0 takes a free one.

    They listen at once: a socket that is only bound would not keep a second server from the port.
    Where another family works, an address of a family that this host does not use (IPv6 is often
    disabled) is left out, and ``on_left_out`` gets a line about it. Everything else that is wrong
    is a ``LaunchError`` of one line; then nothing listens.
    """
    where = f"{host} port {port}"
    if not 0 <= port <= 65535:  # getaddrinfo would wrap it around
        raise LaunchError(f"cannot listen on {where}: a port is from 0 to 65535; set server.port")
    addresses = _resolve(host, where)
    for last in [False] * (_PORT_TRIES - 1) + [True]:
        try:
            return _listen_on_all(addresses, port, on_left_out)
        except OSError as err:
            if port == 0 and err.errno == errno.EADDRINUSE and not last:
                continue  # the first address had that port free, another had not
            reason = err.strerror or str(err)
            raise LaunchError(
                f"cannot listen on {where} ({reason}): {_way_out(err, port)}"
            ) from None
    raise AssertionError("unreachable")


def urls(listeners: Sequence[socket.socket]) -> str:
    """``http://127.0.0.1:8000 and http://[::1]:8000``"""
    found = []
    for listener in listeners:
        ip, port = listener.getsockname()[:2]
        found.append(f"http://[{ip}]:{port}" if ":" in ip else f"http://{ip}:{port}")
    return " and ".join(found)


def _resolve(host: str, where: str) -> list[_Address]:
    try:
        found = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as err:
        reason = getattr(err, "strerror", None) or str(err)
        raise LaunchError(
            f"cannot listen on {where} ({reason}): "
            f"set server.host to an address of this machine, such as 127.0.0.1"
        ) from None
    addresses = list(dict.fromkeys((entry[0], entry[4]) for entry in found))
    return sorted(addresses, key=lambda address: address[0] != socket.AF_INET)


def _listen_on_all(
    addresses: Sequence[_Address], port: int, on_left_out: Callable[[str], None]
) -> list[socket.socket]:
    """A socket for each address. ``OSError``, with none left open, when one cannot be had."""
    listeners: list[socket.socket] = []
    refused: list[tuple[_Address, OSError]] = []
    both = len({family for family, _ in addresses}) > 1
    try:
        for family, address in addresses:
            try:
                listener = _listen(family, address, port, both)
            except OSError as err:
                if err.errno not in _NO_SUCH_FAMILY:
                    raise
                refused.append(((family, address), err))
                continue
            listeners.append(listener)
            port = listener.getsockname()[1]
        families = {listener.family for listener in listeners}
        for (family, address), refusal in refused:
            if not families or family in families:
                raise refusal
            on_left_out(f"not listening on {address[0]}: {refusal.strerror}")
    except OSError:
        for listener in listeners:
            listener.close()
        raise
    return listeners


def _listen(
    family: socket.AddressFamily, address: tuple[Any, ...], port: int, both: bool
) -> socket.socket:
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if both and family == socket.AF_INET6:  # IPv4 has a socket of its own
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)  # of its connections
        listener.bind((address[0], port, *address[2:]))
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except OSError:
        listener.close()
        raise
    return listener


def _way_out(err: OSError, port: int) -> str:
    if err.errno == errno.EADDRINUSE:
        return (
            f"port {port} is in use; choose another with --port N or server.port "
            "(0 takes any free one), or stop what holds it"
        )
    if err.errno in _NO_SUCH_FAMILY:
        return (
            "it is no address of this machine; "
            "check server.host and server.port, or listen on 127.0.0.1"
        )
    if err.errno == errno.EACCES:
        return f"port {port} is not allowed for this user; choose one from 1024 to 65535"
    return "check server.host and server.port"
