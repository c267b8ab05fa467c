"""A supervisor's end of its fork server: what it asks for, and the workers that come of it."""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
from collections.abc import Callable

import msgspec

from ds_cp.errors import EngineDeadError
from ds_cp.facts import Facts
from ds_cp.serve.detached import Adopted, adopt

LIMIT = 1 << 17  # bytes of a message
FORK_S = 5.0  # seconds for a worker to be forked; a server that takes longer is given up


class Settle(msgspec.Struct, frozen=True, tag="settle"):
    """The job has started, with these facts: make all of a worker that needs no other."""

    facts: Facts


class Fork(msgspec.Struct, frozen=True, tag="fork"):
    """Fork a worker, which gets the descriptors that come along: its channel, its orders, and the
    store's listening socket where ``listens``. ``folder``: for its temporary files."""

    folder: str
    listens: bool


class Serving(msgspec.Struct, frozen=True, tag="serving"):
    """The server is there."""

    pid: int


class Forked(msgspec.Struct, frozen=True, tag="forked"):
    """A worker is there."""

    pid: int


class Unfit(msgspec.Struct, frozen=True, tag="unfit"):
    """There is no server, or no worker can be forked; ``why``."""

    why: str


ToServer = Settle | Fork
FromServer = Serving | Forked | Unfit


class Forks:
    """The fork server of one rank, as its supervisor knows it: made by the first worker, to which
    ``theirs`` is handed down. A thread hears it; ``on_end`` is called in that when there is no
    server any more, or when there is to be none.
    """

    def __init__(self, on_end: Callable[[], None] = lambda: None) -> None:
        self._ours, self.theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._on_end = on_end
        self._answers: queue.SimpleQueue[Forked | Unfit | None] = queue.SimpleQueue()
        self._server: Adopted | None = None
        self.is_open = True  # there is a server, or it is still to come
        self.why = ""  # there is none
        adopt(True)
        threading.Thread(target=self._hear, name="ds_cp fork server", daemon=True).start()

    @property
    def is_serving(self) -> bool:
        """Whether the server is there."""
        return self.is_open and self._server is not None

    def settle(self, facts: Facts) -> None:
        """The job has started, with these facts."""
        with contextlib.suppress(OSError):
            self._ours.send(msgspec.msgpack.encode(Settle(facts)))

    def fork(self, folder: str, fds: list[int]) -> Adopted:
        """Another worker, with these descriptors: channel, orders, and the store's socket if there
        is one. Waits ``FORK_S`` at most. Raises ``EngineDeadError`` where none comes: then there
        is no server any more. Not in two threads at a time."""
        if not self.is_open:
            raise EngineDeadError(f"there is no fork server: {self.why}")
        adopt(True)
        try:
            message = msgspec.msgpack.encode(Fork(folder, len(fds) > 2))
            socket.send_fds(self._ours, [message], fds)
            answer = self._answers.get(timeout=FORK_S)
        except (OSError, queue.Empty) as err:
            late = isinstance(err, queue.Empty)
            self._give_up(f"it did not answer within {FORK_S:g} s" if late else "it has ended")
            raise EngineDeadError(f"the fork server {self.why}") from err
        finally:
            adopt(False)
        if isinstance(answer, Forked):
            return Adopted(answer.pid)
        self._give_up(answer.why if answer is not None else "it has ended")
        raise EngineDeadError(f"the fork server gave no worker: {self.why}")

    def close(self) -> None:
        """End the server."""
        self.theirs.close()
        with contextlib.suppress(OSError):
            self._ours.shutdown(socket.SHUT_RDWR)
        if self._server is not None:
            self._server.kill()
            self._server.wait()

    def _give_up(self, why: str) -> None:
        self.is_open, self.why = False, self.why or why
        if self._server is not None:
            self._server.kill()

    def _hear(self) -> None:
        while True:
            try:
                data = self._ours.recv(LIMIT)
                word = msgspec.msgpack.decode(data, type=FromServer) if data else None
            except (OSError, msgspec.MsgspecError):
                word = None
            if isinstance(word, Serving):
                adopt(False)
                self._server = Adopted(word.pid)
                continue
            if isinstance(word, Unfit):
                self.why = self.why or word.why
            if not isinstance(word, Forked):
                self.is_open, self.why = False, self.why or "it has ended"
            self._answers.put(word)
            if word is None:
                break
        if self._server is None:
            adopt(False)
        else:
            self._server.kill()  # it is of no use any more
            self._server.wait()
        self._ours.close()
        self._on_end()
