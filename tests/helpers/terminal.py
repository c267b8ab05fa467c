"""A command on a terminal of its own, as a person uses it."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 60.0  # seconds to wait for what must come, on a busy machine


class Terminal:
    """``ds-cp argv`` on a pseudoterminal of ``columns`` by ``rows``. ``shown``: all that it has
    shown so far. The block's end kills what is left."""

    def __init__(
        self, *argv: str, env: Mapping[str, str] | None = None, columns: int = 100, rows: int = 30
    ) -> None:
        self.shown = ""
        self._seen = 0
        master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        kept = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
        self._master = master
        self.process = subprocess.Popen(
            [sys.executable, "-m", "ds_cp.cli", *argv],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            cwd=ROOT,
            env={**kept, "TERM": "xterm", "INPUTRC": "/dev/null", "PYTHONUTF8": "1", **(env or {})},
            start_new_session=True,
            preexec_fn=_take_terminal,
        )
        os.close(slave)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, at: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._master)

    def send(self, text: str) -> None:
        """Type."""
        os.write(self._master, text.encode())

    def line(self, text: str) -> None:
        """Type a line."""
        self.send(text + "\r")

    def until(self, text: str) -> str:
        """Wait until ``text`` is shown after what was waited for before; what came up to its
        end."""
        end = time.monotonic() + PATIENCE_S
        while (at := self.shown.find(text, self._seen)) < 0:
            assert time.monotonic() < end, f"{text!r} did not come:\n{self.shown!r}"
            if not self._read(1.0) and self.process.poll() is not None and not self._read(0.5):
                raise AssertionError(f"it ended before {text!r}:\n{self.shown!r}")
        begin, self._seen = self._seen, at + len(text)
        return self.shown[begin : self._seen]

    def insist(self, key: str, text: str) -> None:
        """Type ``key`` until ``text`` is shown: Python's readline may miss a signal that comes just
        when it begins to wait. What was typed before is to be shown already: where the terminal
        drops it between readline's look and its read, readline hears no signal until a key."""
        end = time.monotonic() + PATIENCE_S
        while self.shown.find(text, self._seen) < 0:
            assert time.monotonic() < end, f"{text!r} did not come:\n{self.shown!r}"
            self.send(key)
            again = time.monotonic() + 1.0
            while time.monotonic() < again and self.shown.find(text, self._seen) < 0:
                self._read(0.1)
        self.until(text)

    @property
    def echoes(self) -> bool:
        """Whether the terminal shows what is typed by itself."""
        return bool(termios.tcgetattr(self._master)[3] & termios.ECHO)

    def ends(self) -> int:
        """Wait for the end; the exit code."""
        end = time.monotonic() + PATIENCE_S
        while self.process.poll() is None:
            assert time.monotonic() < end, f"it does not end:\n{self.shown!r}"
            self._read(0.2)
        while self._read(0.0):
            pass
        return self.process.wait()

    def _read(self, seconds: float) -> bool:
        ready, _, _ = select.select([self._master], [], [], seconds)
        if not ready:
            return False
        try:
            data = os.read(self._master, 1 << 16)
        except OSError:  # the other end is closed
            return False
        self.shown += data.decode("utf-8", "replace")
        return bool(data)


def _take_terminal() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # tests in the background of a shell ignore it
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # so that Ctrl-C is a signal


def variables(prefix: str = "DS_CP_") -> Sequence[str]:
    """The environment's names that a command may take for twins of its flags."""
    return [name for name in os.environ if name.startswith(prefix)]
