"""What a supervisor asks of its worker when ranks have to meet again, and what the worker says.

Orders have a socket of their own, which a thread of the worker reads: the worker may wait for a
peer, and is to leave all the same.
"""

from __future__ import annotations

import contextlib
import os
import queue
import select
import socket
import threading
from collections.abc import Callable

import msgspec

from ds_cp.errors import CommError, EngineDeadError
from ds_cp.serve.channel import Channel


class Leave(msgspec.Struct, frozen=True, tag="leave"):
    """Leave the groups of this generation, and wait."""

    generation: int


class Meet(msgspec.Struct, frozen=True, tag="meet"):
    """Join the other ranks, who are all asked to, in this generation. ``away``: ranks that are
    not."""

    generation: int
    away: tuple[int, ...] = ()


class Ping(msgspec.Struct, frozen=True, tag="ping"):
    """Give a sign of life."""


class Pong(msgspec.Struct, frozen=True, tag="pong"):
    """A sign of life: the process runs, whatever it does."""


class Left(msgspec.Struct, frozen=True, tag="left"):
    """The worker is in no group any more, of this generation or of an earlier one. ``known``: the
    cause is more than the loss of a peer: a step has failed on the rank that it names."""

    generation: int
    cause: str
    known: bool = False


class Loaded(msgspec.Struct, frozen=True, tag="loaded"):
    """A new worker has its model, and is in no group yet."""


class Met(msgspec.Struct, frozen=True, tag="met"):
    """The worker has met all others in this generation."""

    generation: int


Order = Leave | Meet | Ping
Word = Left | Loaded | Met | Pong
MAX_CAUSE = 500  # characters of a cause, at most


class Orders:
    """The worker's end. ``on_deaf`` is called, in another thread, once nothing can be heard any
    more: the supervisor is gone, or what it says makes no sense."""

    def __init__(self, sock: socket.socket, on_deaf: Callable[[], None] = lambda: None) -> None:
        self._channel = Channel(sock)
        self._on_deaf = on_deaf
        self._lock = threading.Lock()
        self._speaks = threading.Lock()
        self._generation = 0  # that this worker is in, and
        self._abandon: Callable[[], None] | None = None  # what makes it leave that
        self._told = -1  # the last generation that it was told to leave
        self._meetings: queue.SimpleQueue[Meet] = queue.SimpleQueue()
        self._wake, self._waking = os.pipe()  # readable once it is to leave
        os.set_blocking(self._wake, False)
        self._polled: select.poll | None = None  # the socket of ``wait_for``, and ``_wake``
        threading.Thread(target=self._listen, name="ds_cp orders", daemon=True).start()

    def tell(self, word: Word) -> None:
        """Say one word; nothing happens when the supervisor is gone, with which this worker
        ends."""
        with self._speaks, contextlib.suppress(EngineDeadError):
            self._channel.send(word)

    def attend(self, generation: int, abandon: Callable[[], None]) -> None:
        """This worker is in ``generation`` now. ``abandon`` is called in another thread when it is
        to leave it; at once, where that was said before."""
        with self._lock:
            self._generation, self._abandon = generation, abandon
            with contextlib.suppress(BlockingIOError):
                os.read(self._wake, 64)
            if self._told >= generation:
                self._leave()

    def next_meeting(self) -> Meet:
        """Wait to be told to meet the others. For a worker that has left."""
        with self._lock:
            self._abandon = None
        return self._meetings.get()

    def is_off(self, generation: int) -> bool:
        """Whether this worker was told to leave ``generation``, in which it may not be yet."""
        return self._told >= generation

    def wait_for(self, sock: socket.socket) -> None:
        """Wait for something to read from ``sock``, always the same one. Raises ``CommError`` when
        this worker is to leave first."""
        ready = dict(self._poll(sock).poll())
        if self._wake in ready:
            raise CommError("a rank is gone: its supervisor says so")

    def _poll(self, sock: socket.socket) -> select.poll:
        if self._polled is None:
            self._polled = select.poll()
            self._polled.register(sock, select.POLLIN)
            self._polled.register(self._wake, select.POLLIN)
        return self._polled

    def _listen(self) -> None:
        with contextlib.suppress(EngineDeadError):
            while True:
                order = self._channel.receive(Order)
                if isinstance(order, Ping):
                    self.tell(Pong())
                    continue
                if isinstance(order, Meet):
                    self._meetings.put(order)
                    continue
                with self._lock:
                    self._told = order.generation
                    if self._told >= self._generation:
                        self._leave()
        self._on_deaf()

    def _leave(self) -> None:
        if self._abandon is not None:
            abandon, self._abandon = self._abandon, None
            abandon()
            os.write(self._waking, b"!")
