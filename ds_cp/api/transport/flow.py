"""Reading in turns, and a deadline for clients that do not read what they are sent."""

from __future__ import annotations

import asyncio
import fcntl
import struct
import termios
from collections.abc import Callable

from uvicorn.protocols.http.flow_control import FlowControl

WRITE_BYTES_PER_S = 1024  # a client that reads at this rate is never closed
_LOOKS = 8  # in the time that a client gets: so much of it may be over when it is seen to stop
_LEAST_WAIT_S = 0.05  # seconds between looks at the bytes that were read


class Flow(FlowControl):
    """uvicorn's flow control, whose reading can also be held for a while, whoever resumes it."""

    def __init__(self, transport: asyncio.Transport) -> None:
        super().__init__(transport)
        self._held = False

    def hold(self, loop: asyncio.AbstractEventLoop, seconds: float) -> None:
        """Read nothing for some seconds."""
        if not self._held:
            self._held = True
            self._transport.pause_reading()
            loop.call_later(seconds, self._release)

    def resume_reading(self) -> None:
        """Read on, unless reading is held."""
        if self._held:
            self.read_paused = False
        else:
            super().resume_reading()

    def _release(self) -> None:
        self._held = False
        if not self.read_paused and not self._transport.is_closing():
            self._transport.resume_reading()


class WriteDeadline:
    """The time that a client gets to read, counted while bytes wait in the transport's buffer.

    The credit of ``seconds`` runs out while bytes wait, and every ``WRITE_BYTES_PER_S`` bytes
    taken give a second back, up to ``seconds``: who took much and stops has no more than that.
    ``on_late`` is called with the bytes that were not taken.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        transport: asyncio.Transport,
        seconds: float,
        on_late: Callable[[int], None],
    ) -> None:
        self._loop = loop
        self._transport = transport
        self._seconds = seconds
        self._credit_s = seconds
        self._on_late = on_late
        self._since = 0.0  # when the bytes began to wait
        self._waiting = 0  # how many
        self._timer: asyncio.TimerHandle | None = None

    def begin(self) -> None:
        """The transport's buffer is no longer empty."""
        self._since = self._loop.time()
        self._waiting = self._unsent()
        wait_s = max(min(self._left_s(), self._seconds / _LOOKS), _LEAST_WAIT_S)
        self._timer = self._loop.call_later(wait_s, self._look)

    def end(self) -> None:
        """The buffer is empty, or the connection is gone."""
        if self._timer is not None:
            self._credit_s = min(self._seconds, self._left_s())
            self._timer.cancel()
            self._timer = None

    def renew(self) -> None:
        """Another request begins: it has the whole time."""
        if self._timer is None:
            self._credit_s = self._seconds

    def shorten(self, seconds: float) -> None:
        """Give at most that long from now on."""
        self._seconds = min(self._seconds, seconds)
        if self._timer is None:
            self._credit_s = min(self._credit_s, seconds)
            return
        self._credit_s = min(self._left_s(), seconds)
        self._timer.cancel()
        self.begin()

    def _left_s(self) -> float:
        taken = max(0, self._waiting - self._unsent())
        return self._credit_s - (self._loop.time() - self._since) + taken / WRITE_BYTES_PER_S

    def _unsent(self) -> int:
        """Bytes that the client's host has not taken: here and in the kernel, which asks for more
        only once a third of its own are gone."""
        ours = self._transport.get_write_buffer_size()
        sock = self._transport.get_extra_info("socket")
        try:
            (kernel,) = struct.unpack("i", fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, bytes(4)))
        except (OSError, ValueError):  # not known of sockets here, or the socket is gone
            kernel = 0
        return ours + int(kernel)

    def _look(self) -> None:
        self._credit_s = min(self._seconds, self._left_s())
        if self._credit_s > 0:
            self.begin()
        else:
            self._timer = None
            self._on_late(self._transport.get_write_buffer_size())
