"""A text stream for people's eyes whose writes never block and never fail.

stderr may lead to a pipe that nobody reads, or to a full disk. A write there must neither stop an
event loop nor hide the end of a process. So a thread writes, what waits for it is bounded, and the
end of the process waits for it only so long.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import threading
import time
from collections import deque

LIMIT = 1 << 20  # bytes that wait to be written, at most; later lines are dropped
LAST_WORDS_S = 1.0  # seconds that the end of a process waits for what is not written yet
_LINE = 1 << 16  # bytes of an unfinished line that are kept back, at most


class LogStream(io.TextIOBase):
    """Text written to the descriptor ``fd`` by a thread, in whole lines, as UTF-8; what UTF-8 has
    no bytes for is escaped. ``write`` and ``flush`` return at once and never raise ``OSError``."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._line: bytes
        self._begin()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """Of what is written."""
        return "utf-8"

    def fileno(self) -> int:
        """The descriptor; what is written to it directly may come before what waits here."""
        return self._fd

    def isatty(self) -> bool:
        """Whether the descriptor is a terminal."""
        try:
            return os.isatty(self._fd)
        except OSError:
            return False

    def writable(self) -> bool:
        """True."""
        return True

    def write(self, text: str) -> int:
        """Take ``text``; its whole lines are on their way. Returns its length."""
        data = text.encode("utf-8", "backslashreplace")
        if self._pid != os.getpid():  # a fork: the thread, and what waits for it, are the parent's
            self._begin()
        with self._changed:
            lines, end, rest = (self._line + data).rpartition(b"\n")
            self._line = rest
            self._queue(lines + end)
            if len(rest) > _LINE:
                self._flush_line()
        return len(text)

    def flush(self) -> None:
        """Send an unfinished line on its way too. Waits for nothing."""
        if self._pid == os.getpid():
            with self._changed:
                self._flush_line()

    def drain(self, seconds: float = LAST_WORDS_S) -> bool:
        """Wait until all is written, at most ``seconds``; whether it is."""
        self.flush()
        with self._changed:
            return self._changed.wait_for(lambda: not self._waiting, seconds)

    def _begin(self) -> None:
        self._pid = os.getpid()
        self._changed = threading.Condition()
        self._line = b""  # begun, without its end
        self._parts: deque[bytes] = deque()
        self._waiting = 0  # bytes in parts, and in the hands of the thread
        self._dropped = 0  # lines
        self._thread: threading.Thread | None = None

    def _flush_line(self) -> None:
        line, self._line = self._line, b""
        self._queue(line)

    def _queue(self, data: bytes) -> None:
        if not data:
            return
        if self._waiting + len(data) > LIMIT:
            self._dropped += max(1, data.count(b"\n"))
            return
        if self._dropped:
            note = f"ds_cp: {self._dropped} lines are missing here: nobody read on\n".encode()
            data, self._dropped = note + data, 0
        self._parts.append(data)
        self._waiting += len(data)
        if self._thread is None:
            self._thread = threading.Thread(target=self._write, name="ds_cp log", daemon=True)
            self._thread.start()
        self._changed.notify_all()

    def _write(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._parts))
                data = b"".join(self._parts)
                self._parts.clear()
            left = data
            with contextlib.suppress(OSError):  # closed, or the disk is full: the rest is lost
                while left:
                    left = left[os.write(self._fd, left) :]
            with self._changed:
                self._waiting -= len(data)
                self._changed.notify_all()


def take_over(*names: str) -> None:
    """Let ``sys.stderr``, ``sys.stdout`` or both be a ``LogStream``, for the whole process. Only
    for streams that hold no results: what is written may be lost."""
    for name in names:
        stream = getattr(sys, name)
        if not isinstance(stream, LogStream):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
            setattr(sys, name, LogStream({"stdout": 1, "stderr": 2}[name]))


def drain_streams(seconds: float = LAST_WORDS_S) -> None:
    """Wait until stdout and stderr are written where they are a ``LogStream``, at most
    ``seconds`` together."""
    end = time.monotonic() + seconds
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, LogStream):
            stream.drain(max(0.0, end - time.monotonic()))
