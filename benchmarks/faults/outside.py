"""What can be done to a process from outside of it, by a user who may debug it (Linux)."""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import resource
import socket
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil

PIDFD_GETFD = 438  # the same number on every architecture
UNLIMITED = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
_libc = ctypes.CDLL(None, use_errno=True)


@contextlib.contextmanager
def borrowed(pid: int, fd: int) -> Iterator[socket.socket]:
    """A process's own connection, as a socket of this process too. ``OSError`` when it has gone."""
    handle = os.pidfd_open(pid)
    try:
        copy = _libc.syscall(PIDFD_GETFD, handle, fd, 0)
        if copy < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    finally:
        os.close(handle)
    with socket.socket(fileno=copy) as sock:
        yield sock


def connections(process: psutil.Process) -> list[int]:
    """Descriptors of its connected sockets: streams, of any family."""
    found = []
    for fd in _descriptors(process.pid):
        with contextlib.suppress(OSError), borrowed(process.pid, fd) as sock:
            if sock.type & socket.SOCK_STREAM and not _listens(sock):
                sock.getpeername()
                found.append(fd)
    return found


def _descriptors(pid: int) -> list[int]:
    found = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            if os.readlink(entry).startswith("socket:"):
                found.append(int(entry.name))
    return found


def _listens(sock: socket.socket) -> bool:
    return bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))


def describe(process: psutil.Process, fd: int) -> str:
    """Which connection of a process it is."""
    with borrowed(process.pid, fd) as sock:
        ends = sock.getsockname() or "unnamed", sock.getpeername() or "unnamed"
        return f"process {process.pid}, descriptor {fd}, {sock.family.name}: {ends}"


def close_connection(process: psutil.Process, fd: int) -> None:
    """Both directions are shut, as by a peer that has gone."""
    with borrowed(process.pid, fd) as sock:
        sock.shutdown(socket.SHUT_RDWR)


def send_half(process: psutil.Process, fd: int, rng: random.Random) -> None:
    """Write the beginning of a message that never ends to whoever reads the other end: a length,
    some of that many bytes, then the end of the stream."""
    with borrowed(process.pid, fd) as sock:
        sock.send((1000).to_bytes(4, "little") + rng.randbytes(100), socket.MSG_DONTWAIT)
        sock.shutdown(socket.SHUT_RDWR)


def no_more_memory(process: psutil.Process, headroom: int) -> None:
    """From now on it may map only ``headroom`` bytes more."""
    used = process.memory_info().vms
    resource.prlimit(process.pid, resource.RLIMIT_AS, (used + headroom, resource.RLIM_INFINITY))


def memory_again(process: psutil.Process) -> None:
    """The end of ``no_more_memory``."""
    with contextlib.suppress(ProcessLookupError):
        resource.prlimit(process.pid, resource.RLIMIT_AS, UNLIMITED)


def listening(processes: Sequence[psutil.Process]) -> list[tuple[str, int]]:
    """Addresses at which these listen for TCP."""
    found = set()
    for process in processes:
        with contextlib.suppress(psutil.Error):
            for one in process.net_connections("tcp"):
                if one.status == psutil.CONN_LISTEN:
                    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(one.laddr.ip, one.laddr.ip)
                    found.add((host, one.laddr.port))
    return sorted(found)


def garbage(address: tuple[str, int], rng: random.Random) -> None:
    """Connect, say something that means nothing, and leave, sometimes without a word."""
    with contextlib.suppress(OSError), socket.create_connection(address, 2.0) as sock:
        sock.settimeout(0.2)
        sock.sendall(rng.choice([
            b"", b"\0", b"GET / HTTP/1.1\r\n", b"\xff" * 8, rng.randbytes(16), rng.randbytes(65536),
            (2**31 - 1).to_bytes(4, "little"), (2**63).to_bytes(8, "little") + b"x" * 100,
        ]))  # fmt: skip
        with contextlib.suppress(OSError):
            sock.recv(100)


class SmallDisk:
    """A file system of its own in memory, which can be filled. Root only."""

    def __init__(self, folder: Path, size: str = "16m") -> None:
        self.folder = folder
        folder.mkdir()
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size},mode=0700", "tmpfs", str(folder)],
            check=True,
        )

    def fill(self) -> None:
        """Not a byte is free afterwards."""
        with (
            (self.folder / "filling").open("wb", buffering=0) as file,
            contextlib.suppress(OSError),
        ):
            while True:
                file.write(bytes(1 << 16))

    def free(self) -> None:
        """The end of ``fill``."""
        (self.folder / "filling").unlink(missing_ok=True)

    def close(self) -> None:
        """Unmount it."""
        subprocess.run(["umount", "-l", str(self.folder)], check=False)
