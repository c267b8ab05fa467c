"""A text stream for people's eyes whose writes never block and never fail.

stderr may lead to a pipe that nobody reads, or to a full disk. A write there must neither stop an
event loop nor hide the end of a process. So a thread writes, what waits for it is bounded, and the
end of the process waits for it only so long.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import select
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from typing import Any, BinaryIO, cast

LIMIT = 1 << 20  # bytes that wait to be written, at most; later lines are dropped
LAST_WORDS_S = 1.0  # seconds that the end of a process waits for what is not written yet
_LINE = 1 << 16  # bytes of an unfinished line that are kept back, at most
_PIECE = 4096  # bytes that Linux writes to a pipe as one: lines of several processes stay whole


class LogStream(io.TextIOBase):
    """Text written to the descriptor ``fd`` by a thread, in whole lines, as UTF-8; what UTF-8 has
    no bytes for is escaped. ``write`` and ``flush`` return at once and never raise ``OSError``."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._json = False
        self._line: bytes
        self._begin()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """Of what is written."""
        return "utf-8"

    @property
    def errors(self) -> str:  # type: ignore[override]
        """What is done about text that has no bytes."""
        return "backslashreplace"

    @property
    def buffer(self) -> BinaryIO:
        """The same stream for bytes."""
        return cast(BinaryIO, _Bytes(self))

    def as_json(self) -> None:
        """From now on each line that is no object of ``say_object`` is written as one."""
        self._json = True

    def reconfigure(self, **_: Any) -> None:
        """Nothing: libraries ask for an encoding or a buffering, and this stream has its own."""

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
        self.write_bytes(text.encode("utf-8", "backslashreplace"))
        return len(text)

    def write_bytes(self, data: bytes) -> None:
        """Take ``data``, as ``write`` does."""
        with self._mine():
            lines, end, rest = (self._line + data).rpartition(b"\n")
            self._line = rest
            self._queue(lines + end)
            if len(rest) > _LINE:
                self._flush_line()

    def flush(self) -> None:
        """Send an unfinished line on its way too. Waits for nothing."""
        with self._mine():
            self._flush_line()

    def drain(self, seconds: float = LAST_WORDS_S) -> bool:
        """Wait until all is written, at most ``seconds``; whether it is."""
        with self._mine():
            self._flush_line()
            return self._changed.wait_for(lambda: not self._waiting, seconds)

    def rest(self, seconds: float = LAST_WORDS_S) -> None:
        """Write what waits, and end the thread, at most in ``seconds``. The next write starts
        another one."""
        self.drain(seconds)
        with self._mine():
            thread, self._rests = self._thread, True
            self._changed.notify_all()
        if thread is not None:
            thread.join(seconds)

    def _mine(self) -> threading.Condition:
        """The lock of this process: after a fork the thread, what waits for it, and perhaps the
        lock are the parent's."""
        if self._pid != os.getpid():
            self._begin()
        return self._changed

    def _begin(self) -> None:
        self._pid = os.getpid()
        self._changed = threading.Condition()
        self._line = b""  # begun, without its end
        self._parts: deque[bytes] = deque()
        self._waiting = 0  # bytes in parts, and in the hands of the thread
        self._dropped = 0  # lines
        self._thread: threading.Thread | None = None
        self._rests = False  # the thread ends when nothing waits

    def _flush_line(self) -> None:
        line, self._line = self._line, b""
        self._queue(line)

    def _queue(self, data: bytes) -> None:
        if self._json:
            data = b"".join(map(_json_line, data.splitlines()))
        if not data:
            return
        room = LIMIT - self._waiting
        dropped = 0
        if len(data) > room:
            keep = data.rfind(b"\n", 0, max(0, room)) + 1 or (0 if self._waiting else room)
            dropped = data.count(b"\n", keep) or 1
            data = data[:keep]
        if data and self._dropped:
            note = f"ds_cp: {self._dropped} lines are missing here: nobody read on\n".encode()
            data, self._dropped = note + data, 0
        self._dropped += dropped
        if not data:
            return
        if self._thread is None and sys.is_finalizing():  # a thread would never begin
            self._write_what_fits(data)
            return
        self._parts.append(data)
        self._waiting += len(data)
        self._rests = False
        if self._thread is None:
            self._thread = threading.Thread(target=self._write, name="ds_cp log", daemon=True)
            self._thread.start()
        self._changed.notify_all()

    def _write_what_fits(self, data: bytes) -> None:
        """Write without a thread, and without waiting for a reader: the rest is lost."""
        with contextlib.suppress(OSError, ValueError):
            for at in range(0, len(data), select.PIPE_BUF):
                if not select.select([], [self._fd], [], 0)[1]:
                    break
                os.write(self._fd, data[at : at + select.PIPE_BUF])

    def _write(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._parts) or self._rests)
                if not self._parts:
                    self._thread = None
                    return
                data = b"".join(self._parts)
                self._parts.clear()
            with contextlib.suppress(OSError):  # closed, or the disk is full: the rest is lost
                for left in _pieces(data):
                    while left:
                        left = left[os.write(self._fd, left) :]
            with self._changed:
                self._waiting -= len(data)
                self._changed.notify_all()


class _Bytes(io.RawIOBase):
    """A ``LogStream`` as others write bytes to it."""

    def __init__(self, text: LogStream) -> None:
        self._text = text

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._text.fileno()

    def isatty(self) -> bool:
        return self._text.isatty()

    def write(self, data: Any) -> int:
        taken = bytes(data)
        self._text.write_bytes(taken)
        return len(taken)

    def flush(self) -> None:
        self._text.flush()

    def close(self) -> None:
        pass  # the text goes on


def _pieces(data: bytes) -> Iterator[bytes]:
    """``data`` in whole lines, as many as ``_PIECE`` holds; a longer line alone."""
    at = 0
    while at < len(data):
        end = len(data)
        if end - at > _PIECE:
            end = data.rfind(b"\n", at, at + _PIECE) + 1 or data.find(b"\n", at) + 1 or end
        yield data[at:end]
        at = end


def take_over(*names: str) -> None:
    """Let ``sys.stderr``, ``sys.stdout`` or both be a ``LogStream``, for the whole process. Only
    for streams that hold no results: what is written may be lost."""
    for name in names:
        stream = getattr(sys, name)
        if not isinstance(stream, LogStream):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
            setattr(sys, name, LogStream({"stdout": 1, "stderr": 2}[name]))


def write_json_lines() -> None:
    """Let stdout and stderr, where they are a ``LogStream``, write JSON objects, one a line."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, LogStream):
            stream.as_json()
    logging.getLogger().addHandler(_ObjectHandler())


class _ObjectHandler(logging.Handler):
    """Writes what Python's loggers are told as objects."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            message = record.getMessage()
        except Exception:  # values that do not fit the text must not end what the logger was told
            message = str(record.msg)
        fields: dict[str, Any] = {
            "time": round(record.created, 3), "level": record.levelname.lower(),
            "logger": record.name, "message": message,
        }  # fmt: skip
        if record.exc_info:
            fields["traceback"] = logging.Formatter().formatException(record.exc_info)
        say_object(fields)


_OBJECT = b'{"time": '  # how a line of ``say_object`` begins
_LEVELS = {"ds_cp: error": "error", "ds_cp: warning": "warning"}


def _json_line(line: bytes) -> bytes:
    """A line as a JSON object, with its end; nothing for an empty one."""
    if line.startswith(_OBJECT):
        return line + b"\n"
    text = line.decode("utf-8", "backslashreplace")
    if not text.strip():
        return b""
    level = next((level for head, level in _LEVELS.items() if text.startswith(head)), "info")
    plain = {"time": round(time.time(), 3), "level": level, "message": text.removeprefix("ds_cp: ")}
    return json.dumps(plain).encode() + b"\n"


def rest_streams() -> None:
    """Write what stdout and stderr have, where they are a ``LogStream``, and end their threads,
    which start again with the next write."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, LogStream):
            stream.rest()


def say_object(fields: dict[str, Any]) -> None:
    """A line for programs, on stderr: a JSON object, whose first field is ``time``."""
    with contextlib.suppress(OSError, ValueError):
        print(json.dumps(fields), file=sys.stderr, flush=True)


def drain_streams(seconds: float = LAST_WORDS_S) -> None:
    """Wait until stdout and stderr are written where they are a ``LogStream``, at most
    ``seconds`` together."""
    end = time.monotonic() + seconds
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, LogStream):
            stream.drain(max(0.0, end - time.monotonic()))


def say(line: str) -> None:
    """A line for people, on stderr. Where that is a ``LogStream`` it waits for nobody."""
    with contextlib.suppress(OSError, ValueError):  # ValueError: it was closed
        print(f"ds_cp: {line}", file=sys.stderr, flush=True)
