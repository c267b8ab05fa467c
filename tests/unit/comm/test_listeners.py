"""A process that lets nobody in any more."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import socket
from ds_cp.comm.listeners import close_listeners

kept = socket.create_server(("127.0.0.1", 0))
closed = socket.create_server(("127.0.0.1", 0))
port, other = (one.getsockname()[1] for one in (kept, closed))
before = socket.create_connection(("127.0.0.1", other))
peer, _ = closed.accept()
assert close_listeners(keep=port) == 1
try:
    socket.create_connection(("127.0.0.1", other), 5)
except ConnectionRefusedError:
    print("refused")
peer.sendall(b"still here")  # what was let in before stays
print(before.recv(100).decode())
socket.create_connection(("127.0.0.1", port), 5)
descriptor = closed.fileno()
closed.close()  # the number is still its own
assert close_listeners() == 1
print("closed")
"""


def test_all_but_one_are_closed() -> None:
    """In a process of its own: this one may listen for other tests."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout.split("\n") == ["refused", "still here", "closed", ""], done.stderr


CUT = """
import socket
from ds_cp.comm.listeners import cut_connections

server, store = (socket.create_server(("127.0.0.1", 0)) for _ in range(2))
pair, stored = (socket.create_connection(one.getsockname()) for one in (server, store))
peer, _ = server.accept()
beside, _ = store.accept()
assert cut_connections(store.getsockname()[1]) == 2
print([one.recv(1) for one in (pair, peer)])
stored.sendall(b"!")
print(beside.recv(1))
socket.create_connection(server.getsockname(), 5)
print("listens")
"""


def test_connections_are_cut_but_the_stores() -> None:
    done = subprocess.run(
        [sys.executable, "-c", CUT], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout.split("\n") == ["[b'', b'']", "b'!'", "listens", ""], done.stderr
