"""Sockets of gloo: those at which it listens for its peers, and goes on to once they have all come,
and its connections, of which its own abort wakes nobody who waits."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from collections.abc import Iterator


def close_listeners(keep: int | None = None) -> int:
    """Close every TCP socket at which this process listens, but the port ``keep``; returns how many
    they were. Linux; elsewhere nothing happens.

    For a process of which all that listens is gloo, whose groups have been made and used: gloo
    never again needs those sockets, and it keeps the connection of every stranger who finds one,
    until the process has no descriptor left. Their numbers stay taken, by sockets that are not
    connected to anything, since gloo will close them. Not where ``TORCH_GLOO_LAZY_INIT`` has peers
    connect when they first exchange something.
    """
    closed = 0
    for fd in _inet(listens=True):
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(fd)) as found:
            if found.getsockname()[1] != keep:
                with socket.socket() as nowhere:
                    os.dup2(nowhere.fileno(), fd, inheritable=False)
                closed += 1
    return closed


def cut_connections(keep: int | None) -> int:
    """End every TCP connection of this process, but those to and from the port ``keep``, the
    store's; returns how many they were. Whoever waits in gloo for a peer that does not answer, as
    when the network to it is lost, wakes as if it had left. Linux; elsewhere nothing happens."""
    cut = 0
    for fd in _inet(listens=False):
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(fd)) as found:
            if keep not in (found.getsockname()[1], found.getpeername()[1]):
                found.shutdown(socket.SHUT_RDWR)
                cut += 1
    return cut


def _inet(listens: bool) -> Iterator[int]:
    """TCP sockets of this process: those that listen, or the others."""
    try:
        numbers = [int(name) for name in os.listdir("/proc/self/fd")]
    except OSError:
        return
    for fd in numbers:
        if not _is_socket(fd):
            continue
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(fd)) as found:
            inet = found.family in (socket.AF_INET, socket.AF_INET6)
            if not inet or found.type != socket.SOCK_STREAM:
                continue
            if bool(found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)) == listens:
                yield fd


def _is_socket(fd: int) -> bool:
    try:
        return stat.S_ISSOCK(os.fstat(fd).st_mode)
    except OSError:  # the directory was read by one that is closed by now
        return False
